#include "ticket.h"

#include "ticket_outer.h"
#include "ticket_small.h"
#include "ticket_store.h"
#include "ticket_sweep.h"

namespace pyeff {
namespace PYEFF_ISA {
namespace {

template <class T, Activation A>
struct With {
  using Number = T;
  static constexpr Activation kActivation = A;
};

template <class T, class Function>
bool with_activation(Activation activation, const Function& run) {
  switch (activation) {
    case Activation::relu:
      return run(With<T, Activation::relu>{});
    case Activation::gelu:
      return run(With<T, Activation::gelu>{});
    default:
      return run(With<T, Activation::none>{});
  }
}

template <class Function>
bool with_types(const TicketProblem& p, const Function& run) {
  switch (p.number) {
    case Number::f64:
      return with_activation<double>(p.activation, run);
    case Number::f32:
      return with_activation<float>(p.activation, run);
    default:
      return with_activation<bf16>(p.activation, run);
  }
}

}  // namespace

const char* ticket_index_error(const TicketProblem& p) { return ticket_index_problem(TicketParts(p)); }

bool ticket_forward(const TicketProblem& p, const TicketForward& out, const Parallel& parallel) {
  const TicketParts index(p);
  return with_types(p, [&](auto with) {
    using T = typename decltype(with)::Number;
    using Store = StoreOutput<T, decltype(with)::kActivation>;
    const bool few = few_tokens<T>(p.tokens, p.bi);
    const Store store(out.y, out.z, out.bias, p.out, p.tokens, few ? INT64_MAX : out.streamed);
    if (few) return run_small_forward<T>(p, index, store, parallel);
    const PlainSource<T> x{static_cast<const T*>(p.x), p.x_stride};
    return Sweep<T, false, PlainSource<T>, Store>(p.tokens, {p.out, p.bo}, {p.in, p.bi}, index.row_start, index.column,
                                                  nullptr, static_cast<const T*>(p.values), x, store)(parallel);
  });
}

bool ticket_backward(const TicketProblem& p, const TicketBackward& out, const Parallel& parallel) {
  const TicketParts index(p);
  return with_types(p, [&](auto with) {
    using T = typename decltype(with)::Number;
    using Gradient = GradientSource<T, decltype(with)::kActivation>;
    using Store = StoreOutput<T, Activation::none>;
    const Gradient gradient{static_cast<const T*>(out.grad), out.grad_stride, static_cast<const T*>(out.saved), p.out};
    if (out.dx) {
      const bool few = few_tokens<T>(p.tokens, p.bi);
      const Store store(out.dx, nullptr, nullptr, p.in, p.tokens, few ? INT64_MAX : out.streamed);
      const bool done =
          few ? run_small_backward<T>(p, index, gradient, store, parallel)
              : Sweep<T, true, Gradient, Store>(p.tokens, {p.in, p.bi}, {p.out, p.bo}, index.column_start, index.row,
                                                index.slot, static_cast<const T*>(p.values), gradient, store)(parallel);
      if (!done) return false;
    }
    if (!out.dvalues && !out.dbias) return true;
    const PlainSource<T> x{static_cast<const T*>(p.x), p.x_stride};
    return Outer<T, Gradient>(p, index, gradient, x, static_cast<T*>(out.dvalues),
                              static_cast<T*>(out.dbias))(parallel);
  });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
