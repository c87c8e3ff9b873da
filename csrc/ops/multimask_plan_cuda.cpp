// Masks of blocks, the bias of distances and the moving average by CUDA kernels for the dispatcher; see
// multimask_cuda.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#if !defined(PYEFF_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(pyeff_cuda, m) {
  m.def("multimask_relative_bias(Tensor ids_keep, Tensor keep_len, Tensor slopes, int prefix, Tensor(a!) out) -> ()");
  m.def(
      "multimask_relative_bias_backward(Tensor grad, Tensor ids_keep, Tensor keep_len, int prefix, "
      "Tensor(a!) dslopes) -> ()");
  m.def(
      "multimask_block_mask(Tensor seed, Tensor? sample_ids, Tensor lengths, int masks, int grid_width, float keep, "
      "float share, int length, bool inverse, Tensor(a!) ids_keep, Tensor(b!) keep_len, Tensor(c!) kept_slot) -> ()");
  m.def("multimask_ema_update(Tensor(a!)[] ema, Tensor[] params, Tensor decay, Tensor(b!)[] copies) -> ()");
}
#endif

#if defined(PYEFF_CUDA) || defined(PYEFF_EMULATED)

#include "cuda/multimask_plan.h"

#include <vector>

#include "ops/averages.h"
#include "ops/checked.h"
#include "ops/gpu.h"

namespace pyeff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int32_t* read_index(const Checked& checked, const Tensor& t, int64_t count, const char* name) {
  return static_cast<const int32_t*>(checked.read(t, count, ScalarType::Int, name));
}

// What both directions of the bias are given; `numbers` is the bias or its gradient.
struct BiasCall {
  Checked checked;
  gpu::MultimaskBias problem = {};

  BiasCall(const Tensor& numbers, const Tensor& ids_keep, const Tensor& keep_len, int64_t heads, int64_t prefix,
           const char* name) {
    checked.type = numbers.scalar_type();
    checked.device = gpu_device(numbers);
    STD_TORCH_CHECK(ids_keep.dim() == 2, "ids_keep has ", ids_keep.dim(), " dimensions, expected 2");
    STD_TORCH_CHECK(prefix >= 0, "prefix is ", prefix, ", expected at least 0");
    problem.number = gpu_number(numbers, name), problem.prefix = prefix, problem.heads = heads;
    problem.rows = ids_keep.sizes()[0], problem.slots = ids_keep.sizes()[1];
    problem.ids_keep = read_index(checked, ids_keep, problem.rows * problem.slots, "ids_keep");
    problem.keep_len = read_index(checked, keep_len, problem.rows, "keep_len");
  }
  int64_t numel() const { return problem.rows * problem.heads * problem.slots * problem.slots; }
};

void relative_bias(Tensor ids_keep, Tensor keep_len, Tensor slopes, int64_t prefix, Tensor out) {
  const BiasCall a(out, ids_keep, keep_len, slopes.numel(), prefix, "out");
  const auto* from = static_cast<const float*>(a.checked.read(slopes, slopes.numel(), ScalarType::Float, "slopes"));
  void* to = a.checked.write(out, a.numel(), "out");
  if (!to) return;
  const GpuCall call(out);
  report(gpu::multimask_relative_bias(a.problem, from, to, call.machine, call.stream), "multimask_relative_bias");
}

void relative_bias_backward(Tensor grad, Tensor ids_keep, Tensor keep_len, int64_t prefix, Tensor dslopes) {
  const BiasCall a(grad, ids_keep, keep_len, dslopes.numel(), prefix, "grad");
  const void* from = a.checked.read(grad, a.numel(), "grad");
  auto* to = static_cast<float*>(a.checked.write(dslopes, dslopes.numel(), ScalarType::Float, "dslopes"));
  STD_TORCH_CHECK(to && a.numel() > 0, "dslopes or grad is empty");
  const GpuCall call(grad);
  const Tensor scratch = call.scratch(grad, gpu::multimask_relative_bias_scratch(a.problem));
  a.checked.may_write(scratch.mutable_data_ptr(), scratch.numel(), "scratch");
  report(
      gpu::multimask_relative_bias_backward(a.problem, from, to, scratch.mutable_data_ptr(), call.machine, call.stream),
      "multimask_relative_bias_backward");
}

void block_mask(Tensor seed, MaybeTensor sample_ids, Tensor lengths, int64_t masks, int64_t grid_width, double keep,
                double share, int64_t length, bool inverse, Tensor ids_keep, Tensor keep_len, Tensor kept_slot) {
  Checked checked;
  checked.type = ScalarType::Int;
  checked.device = gpu_device(lengths);
  STD_TORCH_CHECK(ids_keep.dim() == 2 && kept_slot.dim() == 2, "ids_keep and kept_slot have 2 dimensions");
  gpu::MultimaskBlocks p{};
  const int64_t batch = lengths.numel();
  p.rows = kept_slot.sizes()[0], p.tokens = kept_slot.sizes()[1], p.slots = ids_keep.sizes()[1], p.masks = masks;
  STD_TORCH_CHECK(masks > 0 && p.rows == batch * masks, "kept_slot has ", p.rows, " rows, expected ", masks, " for ",
                  batch, " samples");
  STD_TORCH_CHECK(p.tokens > 0 && length > 0 && grid_width >= 0 && (grid_width == 0 || p.tokens % grid_width == 0),
                  "blocks of ", length, " do not fit ", p.tokens, " tokens in lines of ", grid_width);
  p.grid_width = grid_width, p.length = length, p.keep = keep, p.share = share, p.inverse = inverse;
  p.seed = static_cast<const int64_t*>(checked.read(seed, 1, ScalarType::Long, "seed"));
  if (sample_ids)
    p.sample_ids = static_cast<const int64_t*>(checked.read(*sample_ids, batch, ScalarType::Long, "sample_ids"));
  p.lengths = read_index(checked, lengths, batch, "lengths");
  p.ids_keep = static_cast<int32_t*>(checked.write(ids_keep, p.rows * p.slots, "ids_keep"));
  p.keep_len = static_cast<int32_t*>(checked.write(keep_len, p.rows, "keep_len"));
  p.kept_slot = static_cast<int32_t*>(checked.write(kept_slot, p.rows * p.tokens, "kept_slot"));
  const GpuCall call(lengths);
  const Tensor scratch = call.scratch(lengths, gpu::multimask_block_mask_scratch(p));
  checked.may_write(scratch.mutable_data_ptr(), scratch.numel(), "scratch");
  report(gpu::multimask_block_mask(p, scratch.mutable_data_ptr(), call.machine, call.stream), "multimask_block_mask");
}

void ema_update(std::vector<Tensor> ema, std::vector<Tensor> params, Tensor decay, std::vector<Tensor> copies) {
  check_averages(ema, params, copies);
  if (ema.empty()) return;
  Checked checked;
  checked.device = gpu_device(ema.front());
  std::vector<gpu::MultimaskAverage> tensors;
  tensors.reserve(ema.size());
  for (size_t i = 0; i < ema.size(); ++i) {
    gpu::MultimaskAverage t{};
    t.count = ema[i].numel();
    if (t.count == 0) continue;
    t.ema_number = gpu_number(ema[i], "ema"), t.param_number = gpu_number(params[i], "params");
    t.ema = checked.write(ema[i], t.count, ema[i].scalar_type(), "ema");
    t.param = checked.read(params[i], t.count, params[i].scalar_type(), "params");
    if (!copies.empty()) {
      t.copy_number = gpu_number(copies[i], "copies");
      t.copy = checked.write(copies[i], t.count, copies[i].scalar_type(), "copies");
      STD_TORCH_CHECK(t.copy, "a copy is empty");
    }
    tensors.push_back(t);
  }
  const auto* from = static_cast<const double*>(checked.read(decay, 1, ScalarType::Double, "decay"));
  const GpuCall call(ema.front());
  report(
      gpu::multimask_ema_update(tensors.data(), static_cast<int64_t>(tensors.size()), from, call.machine, call.stream),
      "multimask_ema_update");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cuda, PYEFF_GPU_KEY, m) {
  m.impl("multimask_relative_bias", TORCH_BOX(&relative_bias));
  m.impl("multimask_relative_bias_backward", TORCH_BOX(&relative_bias_backward));
  m.impl("multimask_block_mask", TORCH_BOX(&block_mask));
  m.impl("multimask_ema_update", TORCH_BOX(&ema_update));
}

}  // namespace
}  // namespace pyeff

#endif
