#include "read_call.h"

namespace check {

pyeff::ReadProblem ReadCall::problem() const {
  return {number,       phi_number,    sizes.cell,    sizes.norm,           sizes.reduce,       sizes.eps,
          sizes.layers, sizes.tokens,  sizes.width,   sizes.rank,           rows_.data(),       w_ih_.data(),
          w_hh_.data(), b_ih_.maybe(), b_hh_.maybe(), norm_weight_.maybe(), norm_bias_.maybe(), h0_.maybe(),
          c0_.maybe()};
}

ForwardOutputs ReadCall::forward(int isa, const pyeff::Parallel& parallel, bool save, bool save_gates) const {
  ForwardOutputs o = forward_outputs(save, save_gates, false);
  const pyeff::ReadForward f{o.out.data(), o.c_last.maybe(), o.h.maybe(),
                             o.c.maybe(),  o.gates.maybe(),  o.stats.maybe()};
  CHECK(PYEFF_ALL_OF(read_forward).of[isa](problem(), f, parallel));
  for (const Output* output : o.all()) CHECK(output->guarded());
  return o;
}

BackwardOutputs ReadCall::backward(int isa, const pyeff::Parallel& parallel, const ForwardOutputs& saved,
                                   Wanted wanted) const {
  BackwardOutputs o = backward_outputs(wanted, false);
  std::vector<void*> dphi;
  for (const Output& output : o.dphi) dphi.push_back(output.maybe());
  const pyeff::ReadBackward b{grad_out_.maybe(),    grad_c_.maybe(),     saved.h.maybe(), saved.c.maybe(),
                              saved.gates.maybe(),  saved.stats.maybe(), dphi.data(),     o.dw_ih.maybe(),
                              o.dw_hh.maybe(),      o.db_ih.maybe(),     o.db_hh.maybe(), o.dnorm_weight.maybe(),
                              o.dnorm_bias.maybe(), o.dh0.maybe(),       o.dc0.maybe()};
  CHECK(PYEFF_ALL_OF(read_backward).of[isa](problem(), b, parallel));
  for (const Output* output : o.all()) CHECK(output->guarded());
  return o;
}

}  // namespace check
