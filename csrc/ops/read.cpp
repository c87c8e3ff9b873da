// READ's kernels for the dispatcher. The caller, pyeff/ops/read.py, has checked the arguments of its user and allocated
// the outputs; what is checked here is that no kernel can be led outside of its tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/read.h"
#include "ops/checked.h"
#include "ops/number.h"
#include "ops/parallel.h"

namespace pyeff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t gates_of(Cell cell) { return cell == Cell::rnn ? 1 : cell == Cell::gru ? 3 : 4; }
int64_t saved_gates_of(Cell cell) { return cell == Cell::rnn ? 0 : 4; }

// Folds the leading dimensions of [*, d] into as few strided ones as they allow.
ReadRows rows_of(const Tensor& phi, ScalarType type, int64_t tokens, int64_t width) {
  const auto sizes = phi.sizes(), strides = phi.strides();
  const int64_t dims = phi.dim();
  STD_TORCH_CHECK(phi.is_cpu() && phi.scalar_type() == type, "phi is not on the CPU, or its layers differ in dtype");
  STD_TORCH_CHECK(dims >= 1 && sizes[dims - 1] == width && phi.numel() == tokens * width,
                  "phi has an unexpected shape");
  ReadRows rows{};
  rows.data = phi.const_data_ptr();
  rows.inner = strides[dims - 1];
  for (int64_t i = 0; i < dims - 1; ++i) {
    if (sizes[i] == 1) continue;
    const int last = rows.dims - 1;
    if (rows.dims && rows.stride[last] == strides[i] * sizes[i]) {
      rows.size[last] *= sizes[i];
      rows.stride[last] = strides[i];
      continue;
    }
    STD_TORCH_CHECK(rows.dims < ReadRows::kMaxDims, "phi has more than ", int(ReadRows::kMaxDims),
                    " leading dimensions that do not fold into each other");
    rows.size[rows.dims] = sizes[i];
    rows.stride[rows.dims++] = strides[i];
  }
  if (rows.dims == 0) rows.dims = 1, rows.size[0] = 1, rows.stride[0] = 0;
  return rows;
}

struct Arguments {
  ReadProblem problem;
  std::vector<ReadRows> phi;
  Checked checked;
  ScalarType wide;

  Arguments(const std::vector<Tensor>& layers, const Tensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih,
            const MaybeTensor& b_hh, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
            const MaybeTensor& h0, const MaybeTensor& c0, int64_t cell, int64_t norm, double eps, int64_t reduce) {
    STD_TORCH_CHECK(!layers.empty() && w_hh.dim() == 2 && w_ih.dim() == 2, "phi is empty or a weight is no matrix");
    STD_TORCH_CHECK(0 <= cell && cell <= 2 && 0 <= norm && norm <= 2 && 0 <= reduce && reduce <= 1, "unknown option");
    ReadProblem& p = problem;
    p = {};
    p.number = number_of(w_ih, "w_ih");
    p.phi_number = number_of(layers[0], "phi");
    STD_TORCH_CHECK(p.phi_number == p.number || (p.number == Number::bf16 && p.phi_number == Number::f32),
                    "phi has another dtype than w_ih, expected the same, or float32 beside bfloat16");
    p.cell = static_cast<Cell>(cell);
    p.norm = static_cast<Norm>(norm);
    p.reduce = static_cast<Reduce>(reduce);
    p.eps = eps;
    p.layers = static_cast<int64_t>(layers.size());
    p.width = w_ih.sizes()[1];
    p.rank = w_hh.sizes()[1];
    STD_TORCH_CHECK(p.width > 0 && p.rank > 0, "a weight is empty");
    p.tokens = layers[0].numel() / p.width;
    checked.type = w_ih.scalar_type();
    wide = checked.type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    phi.reserve(layers.size());
    for (const Tensor& layer : layers) phi.push_back(rows_of(layer, layers[0].scalar_type(), p.tokens, p.width));
    p.phi = phi.data();
    const int64_t gates = gates_of(p.cell) * p.rank, state = p.tokens * p.rank;
    p.w_ih = checked.read(w_ih, gates * p.width, "w_ih");
    p.w_hh = checked.read(w_hh, gates * p.rank, "w_hh");
    p.b_ih = checked.read(b_ih, gates, "b_ih");
    p.b_hh = checked.read(b_hh, gates, "b_hh");
    p.norm_weight = checked.read(norm_weight, p.width, "norm_weight");
    p.norm_bias = checked.read(norm_bias, p.width, "norm_bias");
    p.h0 = checked.read(h0, state, "h0");
    p.c0 = checked.read(c0, state, "c0");
  }
  int64_t stats_numel() const {
    const int kinds = problem.norm == Norm::layer ? 2 : problem.norm == Norm::rms ? 1 : 0;
    return kinds * problem.layers * problem.tokens;
  }
  int64_t state_numel() const { return problem.tokens * problem.rank; }
};

void forward(std::vector<Tensor> phi, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh,
             MaybeTensor norm_weight, MaybeTensor norm_bias, MaybeTensor h0, MaybeTensor c0, int64_t cell, int64_t norm,
             double eps, int64_t reduce, Tensor out, Tensor c_last, Tensor h, Tensor c, Tensor gates, Tensor stats) {
  const Arguments a(phi, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, cell, norm, eps, reduce);
  const ReadProblem& p = a.problem;
  const int64_t state = a.state_numel();
  if (state == 0) return;
  ReadForward result{};
  result.out = a.checked.write(out, state, "out");
  STD_TORCH_CHECK(result.out, "out is empty");
  if (p.cell == Cell::lstm) result.c_last = a.checked.write(c_last, state, "c_last");
  result.h = a.checked.write(h, p.layers * state, "h");
  if (p.cell == Cell::lstm) result.c = a.checked.write(c, p.layers * state, "c");
  result.gates = a.checked.write(gates, saved_gates_of(p.cell) * p.layers * state, "gates");
  result.stats = a.checked.write(stats, a.stats_numel(), a.wide, "stats");
  STD_TORCH_CHECK(PYEFF_CHOSEN(read_forward)(p, result, torch_parallel()), "read_forward: out of memory");
}

void backward(MaybeTensor grad_out, MaybeTensor grad_c, std::vector<Tensor> phi, Tensor w_ih, Tensor w_hh,
              MaybeTensor b_ih, MaybeTensor b_hh, MaybeTensor norm_weight, MaybeTensor norm_bias, MaybeTensor h0,
              MaybeTensor c0, Tensor h, Tensor c, Tensor gates, Tensor stats, int64_t cell, int64_t norm, double eps,
              int64_t reduce, std::vector<Tensor> dphi, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh,
              Tensor dnorm_weight, Tensor dnorm_bias, Tensor dh0, Tensor dc0) {
  const Arguments a(phi, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, cell, norm, eps, reduce);
  const ReadProblem& p = a.problem;
  const int64_t state = a.state_numel(), rows = gates_of(p.cell) * p.rank;
  STD_TORCH_CHECK(state > 0, "there are no tokens");
  STD_TORCH_CHECK(dphi.size() == phi.size(), "dphi has ", dphi.size(), " tensors, expected ", phi.size());
  ReadBackward r{};
  r.grad_out = a.checked.read(grad_out, state, "grad_out");
  r.grad_c = a.checked.read(grad_c, state, "grad_c");
  STD_TORCH_CHECK(!r.grad_c || p.cell == Cell::lstm, "grad_c was given without an lstm");
  r.h = a.checked.read(h, p.layers * state, "h");
  if (p.cell == Cell::lstm) r.c = a.checked.read(c, p.layers * state, "c");
  r.gates = a.checked.read_saved(gates, saved_gates_of(p.cell) * p.layers * state, "gates");
  if (a.stats_numel()) {
    a.checked.check(stats, a.stats_numel(), a.wide, "stats");
    r.stats = stats.const_data_ptr();
  }
  std::vector<void*> dphi_data;
  for (const Tensor& d : dphi) dphi_data.push_back(a.checked.write(d, p.tokens * p.width, "dphi"));
  r.dphi = dphi_data.data();
  r.dw_ih = a.checked.write(dw_ih, rows * p.width, "dw_ih");
  r.dw_hh = a.checked.write(dw_hh, rows * p.rank, "dw_hh");
  r.db_ih = a.checked.write(db_ih, rows, "db_ih");
  r.db_hh = a.checked.write(db_hh, rows, "db_hh");
  r.dnorm_weight = a.checked.write(dnorm_weight, p.width, "dnorm_weight");
  r.dnorm_bias = a.checked.write(dnorm_bias, p.width, "dnorm_bias");
  r.dh0 = a.checked.write(dh0, state, "dh0");
  if (p.cell == Cell::lstm) r.dc0 = a.checked.write(dc0, state, "dc0");
  STD_TORCH_CHECK(PYEFF_CHOSEN(read_backward)(p, r, torch_parallel()), "read_backward: out of memory");
}

#define PYEFF_READ_PROBLEM                                                                                       \
  "Tensor[] phi, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? norm_weight, Tensor? norm_bias, " \
  "Tensor? h0, Tensor? c0"

STABLE_TORCH_LIBRARY_FRAGMENT(pyeff_cpu, m) {
  m.def("read_forward(" PYEFF_READ_PROBLEM
        ", int cell, int norm, float eps, int reduce, Tensor(a!) out, Tensor(b!) c_last, Tensor(c!) h, Tensor(d!) c, "
        "Tensor(e!) gates, Tensor(f!) stats) -> ()");
  m.def("read_backward(Tensor? grad_out, Tensor? grad_c, " PYEFF_READ_PROBLEM
        ", Tensor h, Tensor c, Tensor gates, Tensor stats, int cell, int norm, float eps, int reduce, "
        "Tensor(a!)[] dphi, Tensor(b!) dw_ih, Tensor(c!) dw_hh, Tensor(d!) db_ih, Tensor(e!) db_hh, "
        "Tensor(f!) dnorm_weight, Tensor(g!) dnorm_bias, Tensor(h!) dh0, Tensor(i!) dc0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cpu, CPU, m) {
  m.impl("read_forward", TORCH_BOX(&forward));
  m.impl("read_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace pyeff
