// READ's CUDA kernels for the dispatcher: of CUDA tensors; or, built with PYEFF_EMULATED, of CPU tensors, by the same
// kernels built for the CPU. As in read.cpp, the caller has checked its user's arguments and allocated the outputs.
#if defined(PYEFF_CUDA) || defined(PYEFF_EMULATED)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cuda/read.h"
#include "ops/checked.h"
#include "ops/gpu.h"

namespace pyeff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The leading dimensions of [*, d] as two strides.
gpu::ReadLayer layer_of(const Tensor& phi, ScalarType type, const Checked& checked, int64_t tokens, int64_t width) {
  const auto sizes = phi.sizes(), strides = phi.strides();
  const int64_t dims = phi.dim(), size = static_cast<int64_t>(phi.element_size());
  STD_TORCH_CHECK(checked.here(phi) && phi.scalar_type() == type, "phi is on another device, or its layers differ");
  STD_TORCH_CHECK(dims >= 1 && sizes[dims - 1] == width && phi.numel() == tokens * width, "phi has a wrong shape");
  STD_TORCH_CHECK(width == 1 || strides[dims - 1] == 1, "phi has rows that are not contiguous");
  int64_t fold[2] = {1, 1}, stride[2] = {0, 0};
  int used = 0;
  for (int64_t i = 0; i < dims - 1; ++i) {
    if (sizes[i] == 1) continue;
    if (used && stride[used - 1] == strides[i] * sizes[i]) {
      fold[used - 1] *= sizes[i];
      stride[used - 1] = strides[i];
      continue;
    }
    STD_TORCH_CHECK(used < 2, "phi has leading dimensions that do not fold into two");
    fold[used] = sizes[i];
    stride[used++] = strides[i];
  }
  gpu::ReadLayer layer{};
  layer.data = phi.const_data_ptr();
  layer.outer = used == 2 ? stride[0] : 0;
  layer.inner = used == 2 ? stride[1] : stride[0];
  layer.columns = used == 2 ? fold[1] : fold[0];
  const int64_t last =
      (used > 1 ? (fold[0] - 1) * stride[0] : 0) + (used ? (fold[used - 1] - 1) * stride[used - 1] : 0);
  if (tokens > 0) checked.may_read(layer.data, (last + width) * size, "phi");
  layer.aligned =
      reinterpret_cast<uintptr_t>(layer.data) % 16 == 0 && layer.outer * size % 16 == 0 && layer.inner * size % 16 == 0;
  return layer;
}

struct Arguments {
  gpu::ReadProblem problem;
  std::vector<gpu::ReadLayer> phi;
  Checked checked;

  Arguments(const std::vector<Tensor>& layers, const Tensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih,
            const MaybeTensor& b_hh, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
            const MaybeTensor& h0, const MaybeTensor& c0, int64_t cell, int64_t norm, double eps, int64_t reduce) {
    STD_TORCH_CHECK(!layers.empty() && w_hh.dim() == 2 && w_ih.dim() == 2, "phi is empty or a weight is no matrix");
    STD_TORCH_CHECK(0 <= cell && cell <= 2 && 0 <= norm && norm <= 2 && 0 <= reduce && reduce <= 1, "unknown option");
    gpu::ReadProblem& p = problem;
    p = {};
    p.number = gpu_number(w_ih, "w_ih");
    p.phi_number = gpu_number(layers[0], "phi");
    STD_TORCH_CHECK(p.phi_number == p.number || p.phi_number == gpu::Number::f32,
                    "phi has another dtype than w_ih, expected the same, or float32 beside 16 bits");
    p.cell = static_cast<Cell>(cell);
    p.norm = static_cast<Norm>(norm);
    p.reduce = static_cast<Reduce>(reduce);
    p.eps = static_cast<float>(eps);
    p.layers = static_cast<int64_t>(layers.size());
    p.width = w_ih.sizes()[1];
    p.rank = w_hh.sizes()[1];
    STD_TORCH_CHECK(p.width > 0 && p.rank > 0, "a weight is empty");
    p.tokens = layers[0].numel() / p.width;
    STD_TORCH_CHECK(p.tokens < int64_t{1} << 31, "phi has ", p.tokens, " tokens, expected fewer than 2^31");
    checked.type = w_ih.scalar_type();
    checked.device = gpu_device(w_ih);
    phi.reserve(layers.size());
    for (const Tensor& layer : layers) {
      phi.push_back(layer_of(layer, layers[0].scalar_type(), checked, p.tokens, p.width));
    }
    p.phi = phi.data();
    const int64_t gates = (p.cell == Cell::rnn ? 1 : p.cell == Cell::gru ? 3 : 4) * p.rank, state = state_numel();
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
    return (problem.norm == Norm::layer ? 2 : problem.norm == Norm::rms ? 1 : 0) * problem.layers * problem.tokens;
  }
  int64_t gates_numel() const { return problem.cell == Cell::rnn ? 0 : 4 * problem.layers * state_numel(); }
  int64_t state_numel() const { return problem.tokens * problem.rank; }
};

void forward(std::vector<Tensor> phi, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh,
             MaybeTensor norm_weight, MaybeTensor norm_bias, MaybeTensor h0, MaybeTensor c0, int64_t cell, int64_t norm,
             double eps, int64_t reduce, Tensor out, Tensor c_last, Tensor h, Tensor c, Tensor gates, Tensor stats) {
  const Arguments a(phi, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, cell, norm, eps, reduce);
  const gpu::ReadProblem& p = a.problem;
  const int64_t state = a.state_numel();
  if (state == 0) return;
  gpu::ReadForward result{};
  result.out = a.checked.write(out, state, "out");
  STD_TORCH_CHECK(result.out, "out is empty");
  if (p.cell == Cell::lstm) {
    result.c_last = a.checked.write(c_last, state, "c_last");
    STD_TORCH_CHECK(result.c_last, "c_last is empty");
    result.c = a.checked.write(c, p.layers * state, "c");
  }
  result.h = a.checked.write(h, p.layers * state, "h");
  if (p.cell != Cell::rnn) result.gates = a.checked.write(gates, a.gates_numel(), "gates");
  result.stats = static_cast<float*>(a.checked.write(stats, a.stats_numel(), ScalarType::Float, "stats"));
  const GpuCall call(w_ih);
  const Tensor scratch = call.scratch(w_ih, gpu::read_forward_scratch(p, result, call.machine));
  a.checked.may_write(scratch.mutable_data_ptr(), scratch.numel(), "scratch");
  report(gpu::read_forward(p, result, scratch.mutable_data_ptr(), call.machine, call.stream), "read_forward");
}

void backward(MaybeTensor grad_out, MaybeTensor grad_c, std::vector<Tensor> phi, Tensor w_ih, Tensor w_hh,
              MaybeTensor b_ih, MaybeTensor b_hh, MaybeTensor norm_weight, MaybeTensor norm_bias, MaybeTensor h0,
              MaybeTensor c0, Tensor h, Tensor c, Tensor gates, Tensor stats, int64_t cell, int64_t norm, double eps,
              int64_t reduce, std::vector<Tensor> dphi, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh,
              Tensor dnorm_weight, Tensor dnorm_bias, Tensor dh0, Tensor dc0) {
  const Arguments a(phi, w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, cell, norm, eps, reduce);
  const gpu::ReadProblem& p = a.problem;
  const int64_t state = a.state_numel(), rows = w_hh.sizes()[0];
  STD_TORCH_CHECK(state > 0, "there are no tokens");
  STD_TORCH_CHECK(dphi.size() == phi.size(), "dphi has ", dphi.size(), " tensors, expected ", phi.size());
  gpu::ReadBackward r{};
  r.grad_out = a.checked.read(grad_out, state, "grad_out");
  r.grad_c = a.checked.read(grad_c, state, "grad_c");
  STD_TORCH_CHECK(!r.grad_c || p.cell == Cell::lstm, "grad_c was given without an lstm");
  r.h = a.checked.read(h, p.layers * state, "h");
  if (p.cell == Cell::lstm) r.c = a.checked.read(c, p.layers * state, "c");
  if (p.cell != Cell::rnn) r.gates = a.checked.read_saved(gates, a.gates_numel(), "gates");
  if (a.stats_numel()) {
    r.stats = static_cast<const float*>(a.checked.read(stats, a.stats_numel(), ScalarType::Float, "stats"));
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
  const GpuCall call(w_ih);
  const Tensor scratch = call.scratch(w_ih, gpu::read_backward_scratch(p, r, call.machine));
  a.checked.may_write(scratch.mutable_data_ptr(), scratch.numel(), "scratch");
  report(gpu::read_backward(p, r, scratch.mutable_data_ptr(), call.machine, call.stream), "read_backward");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cuda, PYEFF_GPU_KEY, m) {
  m.impl("read_forward", TORCH_BOX(&forward));
  m.impl("read_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace pyeff

#endif
