// The ticket's CUDA kernels for the dispatcher: of CUDA tensors; or, built with PYEFF_EMULATED, of CPU tensors, by the
// same kernels built for the CPU. The caller has checked its user's arguments and allocated the outputs.
#if defined(PYEFF_CUDA) || defined(PYEFF_EMULATED)

#include "cuda/ticket.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "ops/checked.h"
#include "ops/gpu.h"

namespace pyeff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A matrix whose rows are contiguous, at any distance.
const void* rows_of(const Checked& checked, const Tensor& t, int64_t rows, int64_t width, const char* name,
                    int64_t* stride) {
  STD_TORCH_CHECK(checked.here(t) && t.scalar_type() == checked.type, name,
                  " is on another device or of another dtype");
  STD_TORCH_CHECK(t.dim() == 2 && t.sizes()[0] == rows && t.sizes()[1] == width, name, " has a wrong shape");
  STD_TORCH_CHECK(width == 1 || t.strides()[1] == 1, name, " has rows that are not contiguous");
  *stride = rows > 1 ? t.strides()[0] : width;
  STD_TORCH_CHECK(*stride >= 0, name, " has a negative stride");
  checked.may_read(t.const_data_ptr(), ((rows - 1) * *stride + width) * static_cast<int64_t>(t.element_size()), name);
  return t.const_data_ptr();
}

struct TicketArguments {
  gpu::TicketProblem problem;
  Checked checked;

  TicketArguments(const Tensor& x, const Tensor& values, const Tensor& index, int64_t out, int64_t activation) {
    STD_TORCH_CHECK(values.dim() == 3 && x.dim() == 2, "values has ", values.dim(), " dimensions and x ", x.dim(),
                    ", expected 3 and 2");
    STD_TORCH_CHECK(0 <= activation && activation <= 2, "unknown activation");
    gpu::TicketProblem& p = problem;
    p = {};
    p.number = gpu_number(values, "values");
    p.blocks = values.sizes()[0], p.block_out = values.sizes()[1], p.block_in = values.sizes()[2];
    p.tokens = x.sizes()[0], p.width = x.sizes()[1], p.out = out;
    constexpr int64_t kMost = int64_t{1} << 30;
    STD_TORCH_CHECK(p.block_out > 0 && p.block_in > 0 && p.tokens > 0 && p.width > 0 && p.out > 0,
                    "x or a block is empty");
    STD_TORCH_CHECK(p.tokens < 2 * kMost && p.width < kMost && p.out < kMost && p.block_out < kMost &&
                        p.block_in < kMost && p.blocks < 2 * kMost,
                    "x or values has a dimension that is too large for the CUDA kernels");
    checked.type = values.scalar_type();
    checked.device = gpu_device(values);
    p.values = checked.read(values, values.numel(), "values");
    const int64_t length = 2 * p.rows() + 2 * p.columns() + 2 + 3 * p.blocks;
    p.index = static_cast<const int32_t*>(checked.read(index, length, ScalarType::Int, "index"));
    p.x = rows_of(checked, x, p.tokens, p.width, "x", &p.x_stride);
    p.activation = static_cast<gpu::TicketActivation>(activation);
  }
};

void ticket_forward(Tensor x, Tensor values, Tensor index, MaybeTensor bias, int64_t activation, Tensor y, Tensor z) {
  STD_TORCH_CHECK(y.dim() == 2, "y has ", y.dim(), " dimensions, expected 2");
  const TicketArguments a(x, values, index, y.sizes()[1], activation);
  const gpu::TicketProblem& p = a.problem;
  gpu::TicketForward f{};
  f.bias = a.checked.read(bias, p.out, "bias");
  f.y = a.checked.write(y, p.tokens * p.out, "y");
  f.z = a.checked.write(z, p.tokens * p.out, "z");
  STD_TORCH_CHECK(f.y, "y is empty");
  const GpuCall call(values);
  report(gpu::ticket_forward(p, f, call.machine, call.stream), "ticket_forward");
}

void ticket_backward(Tensor grad, Tensor x, Tensor values, Tensor index, Tensor saved, int64_t activation, Tensor dx,
                     Tensor dvalues, Tensor dbias) {
  STD_TORCH_CHECK(grad.dim() == 2, "grad has ", grad.dim(), " dimensions, expected 2");
  const TicketArguments a(x, values, index, grad.sizes()[1], activation);
  const gpu::TicketProblem& p = a.problem;
  gpu::TicketBackward b{};
  b.grad = rows_of(a.checked, grad, p.tokens, p.out, "grad", &b.grad_stride);
  if (p.activation != gpu::TicketActivation::none) b.saved = a.checked.read(saved, p.tokens * p.out, "saved");
  b.dx = a.checked.write(dx, p.tokens * p.width, "dx");
  b.dvalues = a.checked.write(dvalues, values.numel(), "dvalues");
  b.dbias = a.checked.write(dbias, p.out, "dbias");
  const GpuCall call(values);
  const Tensor scratch = call.scratch(values, gpu::ticket_backward_scratch(p, b, call.machine));
  a.checked.may_write(scratch.mutable_data_ptr(), scratch.numel(), "scratch");
  report(gpu::ticket_backward(p, b, scratch.mutable_data_ptr(), call.machine, call.stream), "ticket_backward");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cuda, PYEFF_GPU_KEY, m) {
  m.impl("ticket_forward", TORCH_BOX(&ticket_forward));
  m.impl("ticket_backward", TORCH_BOX(&ticket_backward));
}

}  // namespace
}  // namespace pyeff

#endif
