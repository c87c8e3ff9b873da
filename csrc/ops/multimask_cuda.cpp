// The multimask family's CUDA kernels for the dispatcher: of CUDA tensors; or, built with PYEFF_EMULATED, of CPU
// tensors, by the same kernels built for the CPU. The caller has checked its user's arguments and allocated the
// outputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#if !defined(PYEFF_EMULATED)
// The schemas are here whether the kernels were built or not: their emulation is registered for them, too.
STABLE_TORCH_LIBRARY_FRAGMENT(pyeff_cuda, m) {
  m.def("multimask_gather(Tensor x, Tensor ids_keep, Tensor keep_len, Tensor(a!) out) -> ()");
  m.def("multimask_gather_backward(Tensor grad, Tensor inverse, Tensor(a!) dx) -> ()");
  m.def(
      "multimask_scatter(Tensor x, Tensor inverse, Tensor lengths, Tensor? fill, Tensor seed, Tensor? sample_ids, "
      "float noise_std, Tensor(a!) out) -> ()");
  m.def(
      "multimask_scatter_backward(Tensor grad, Tensor ids_keep, Tensor keep_len, Tensor inverse, Tensor lengths, "
      "Tensor(a!) dx, Tensor(b!) dfill) -> ()");
  m.def(
      "multimask_targets(Tensor[] layers, Tensor lengths, int norm, int post_norm, float eps, float weight, "
      "bool accumulate, Tensor(a!) out) -> ()");
  m.def(
      "multimask_targets_backward(Tensor grad, Tensor[] layers, Tensor lengths, int norm, int post_norm, float eps, "
      "Tensor(a!)[] dlayers) -> ()");
  m.def(
      "multimask_loss(Tensor pred, Tensor target, Tensor inverse, Tensor lengths, Tensor? count, int kind, float beta, "
      "float scale, Tensor(a!) loss, Tensor(b!) dpred, Tensor(c!) moments) -> ()");
  m.def(
      "multimask_loss_backward(Tensor grad, Tensor pred, Tensor target, Tensor inverse, Tensor lengths, Tensor? count, "
      "int kind, float beta, float scale, Tensor(a!) dpred, Tensor(b!) dtarget) -> ()");
  m.def("multimask_rescale(Tensor(a!) t, Tensor factor) -> ()");
}
#endif

#if defined(PYEFF_CUDA) || defined(PYEFF_EMULATED)

#include "cuda/multimask.h"

#include <vector>

#include "ops/checked.h"
#include "ops/gpu.h"

namespace pyeff {
namespace {

using gpu::MultimaskRows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMost = int64_t{1} << 30;

// What the arguments of one call are checked against.
struct MultimaskCall {
  Checked checked;
  gpu::MultimaskSizes sizes = {};

  MultimaskCall(const Tensor& like, const char* name) {
    sizes.number = gpu_number(like, name);
    checked.type = like.scalar_type();
    checked.device = gpu_device(like);
  }

  // A tensor of three dimensions whose rows are contiguous.
  MultimaskRows rows(const Tensor& t, int64_t outer, int64_t inner, ScalarType type, const char* name) const {
    STD_TORCH_CHECK(checked.here(t) && t.scalar_type() == type, name, " is on another device or of another dtype");
    STD_TORCH_CHECK(t.dim() == 3 && t.sizes()[0] == outer && t.sizes()[1] == inner && t.sizes()[2] == sizes.width, name,
                    " has a wrong shape");
    STD_TORCH_CHECK(sizes.width == 1 || t.strides()[2] == 1, name, " has rows that are not contiguous");
    const MultimaskRows rows{t.const_data_ptr(), outer > 1 ? t.strides()[0] : 0, inner > 1 ? t.strides()[1] : 0};
    STD_TORCH_CHECK(rows.outer >= 0 && rows.inner >= 0, name, " has a negative stride");
    if (outer > 0 && inner > 0)
      checked.may_read(
          rows.data,
          ((outer - 1) * rows.outer + (inner - 1) * rows.inner + sizes.width) * static_cast<int64_t>(t.element_size()),
          name);
    return rows;
  }
  MultimaskRows rows(const Tensor& t, int64_t outer, int64_t inner, const char* name) const {
    return rows(t, outer, inner, checked.type, name);
  }

  const int32_t* index(const Tensor& t, int64_t count, const char* name) const {
    return static_cast<const int32_t*>(checked.read(t, count, ScalarType::Int, name));
  }
  const int64_t* longs(const MaybeTensor& t, int64_t count, const char* name) const {
    return t ? static_cast<const int64_t*>(checked.read(*t, count, ScalarType::Long, name)) : nullptr;
  }

  void check_sizes() const {
    for (int64_t size : {sizes.batch, sizes.masks, sizes.tokens, sizes.width})
      STD_TORCH_CHECK(0 < size && size < kMost, "a dimension is ", size,
                      ", the CUDA kernels take more than 0 and less than 2^30");
    STD_TORCH_CHECK(sizes.slots < kMost && sizes.batch * sizes.masks < kMost, "a plan is too large");
  }
  // Of an index [rows, tokens] and the samples that it is about.
  void set_plan(int64_t rows, int64_t batch, int64_t tokens) {
    STD_TORCH_CHECK(batch > 0 && rows % batch == 0, "a plan has ", rows, " rows, expected a multiple of the ", batch,
                    " samples");
    sizes.batch = batch, sizes.masks = rows / batch, sizes.tokens = tokens;
  }
};

void check_dims(const Tensor& t, int64_t dims, const char* name) {
  STD_TORCH_CHECK(t.dim() == dims, name, " has ", t.dim(), " dimensions, expected ", dims);
}

void gather(Tensor x, Tensor ids_keep, Tensor keep_len, Tensor out) {
  check_dims(x, 3, "x"), check_dims(ids_keep, 2, "ids_keep");
  MultimaskCall a(x, "x");
  const int64_t rows = ids_keep.sizes()[0];
  a.set_plan(rows, x.sizes()[0], x.sizes()[1]);
  a.sizes.slots = ids_keep.sizes()[1], a.sizes.width = x.sizes()[2];
  a.check_sizes();
  gpu::MultimaskGather g{};
  g.sizes = a.sizes, g.x = a.rows(x, a.sizes.batch, a.sizes.tokens, "x");
  g.ids_keep = a.index(ids_keep, ids_keep.numel(), "ids_keep"), g.keep_len = a.index(keep_len, rows, "keep_len");
  g.out = a.checked.write(out, rows * a.sizes.slots * a.sizes.width, "out");
  if (!g.out) return;
  const GpuCall call(x);
  report(gpu::multimask_gather(g, call.machine, call.stream), "multimask_gather");
}

// Sums over rows, into an output that may be absent.
void run_sums(const MultimaskCall& a, gpu::MultimaskSums s, const Tensor& from, const Tensor& to, const char* name,
              const char* op) {
  s.sizes = a.sizes;
  s.to = a.checked.write(to, (s.all ? 1 : a.sizes.batch) * a.sizes.tokens * a.sizes.width, name);
  if (!s.to) return;
  const GpuCall call(from);
  const Tensor scratch = call.scratch(from, gpu::multimask_sums_scratch(s, call.machine));
  a.checked.may_write(scratch.mutable_data_ptr(), scratch.numel(), "scratch");
  report(gpu::multimask_sums(s, scratch.mutable_data_ptr(), call.machine, call.stream), op);
}

void gather_backward(Tensor grad, Tensor inverse, Tensor dx) {
  check_dims(grad, 3, "grad"), check_dims(inverse, 2, "inverse"), check_dims(dx, 3, "dx");
  MultimaskCall a(grad, "grad");
  const int64_t rows = inverse.sizes()[0];
  a.set_plan(rows, dx.sizes()[0], inverse.sizes()[1]);
  a.sizes.slots = grad.sizes()[1], a.sizes.width = grad.sizes()[2];
  a.check_sizes();
  gpu::MultimaskSums s{};
  s.from = a.rows(grad, rows, a.sizes.slots, "grad");
  s.inverse = a.index(inverse, inverse.numel(), "inverse");
  run_sums(a, s, grad, dx, "dx", "multimask_gather_backward");
}

void scatter(Tensor x, Tensor inverse, Tensor lengths, MaybeTensor fill, Tensor seed, MaybeTensor sample_ids,
             double noise_std, Tensor out) {
  check_dims(x, 3, "x"), check_dims(inverse, 2, "inverse"), check_dims(lengths, 1, "lengths");
  MultimaskCall a(x, "x");
  const int64_t rows = inverse.sizes()[0], batch = lengths.sizes()[0];
  a.set_plan(rows, batch, inverse.sizes()[1]);
  a.sizes.slots = x.sizes()[1], a.sizes.width = x.sizes()[2];
  a.check_sizes();
  gpu::MultimaskScatter s{};
  s.sizes = a.sizes, s.x = a.rows(x, rows, a.sizes.slots, "x");
  if (fill) {
    check_dims(*fill, 3, "fill");
    s.fill = a.rows(*fill, fill->sizes()[0] == 1 ? 1 : batch, a.sizes.tokens, "fill");
  }
  s.inverse = a.index(inverse, inverse.numel(), "inverse"), s.lengths = a.index(lengths, batch, "lengths");
  s.seed = a.longs(seed, 1, "seed"), s.sample_ids = a.longs(sample_ids, batch, "sample_ids");
  s.noise_std = static_cast<float>(noise_std);
  s.out = a.checked.write(out, rows * a.sizes.tokens * a.sizes.width, "out");
  STD_TORCH_CHECK(s.out, "out is empty");
  const GpuCall call(x);
  report(gpu::multimask_scatter(s, call.machine, call.stream), "multimask_scatter");
}

void scatter_backward(Tensor grad, Tensor ids_keep, Tensor keep_len, Tensor inverse, Tensor lengths, Tensor dx,
                      Tensor dfill) {
  check_dims(grad, 3, "grad"), check_dims(ids_keep, 2, "ids_keep"), check_dims(lengths, 1, "lengths");
  MultimaskCall a(grad, "grad");
  const int64_t rows = grad.sizes()[0], batch = lengths.sizes()[0];
  a.set_plan(rows, batch, grad.sizes()[1]);
  a.sizes.slots = ids_keep.sizes()[1], a.sizes.width = grad.sizes()[2];
  a.check_sizes();
  const MultimaskRows from = a.rows(grad, rows, a.sizes.tokens, "grad");
  gpu::MultimaskGather g{};
  g.sizes = a.sizes, g.x = from, g.of_rows = true;
  g.ids_keep = a.index(ids_keep, rows * a.sizes.slots, "ids_keep"), g.keep_len = a.index(keep_len, rows, "keep_len");
  g.out = a.checked.write(dx, rows * a.sizes.slots * a.sizes.width, "dx");
  if (g.out) {
    const GpuCall call(grad);
    report(gpu::multimask_gather(g, call.machine, call.stream), "multimask_scatter_backward");
  }
  gpu::MultimaskSums s{};
  s.from = from, s.hidden = true;
  s.inverse = a.index(inverse, rows * a.sizes.tokens, "inverse"), s.lengths = a.index(lengths, batch, "lengths");
  s.all = batch > 1 && dfill.numel() > 0 && dfill.sizes()[0] == 1;
  // One sample's rows are all rows; they may be many.
  s.all = s.all || batch == 1;
  run_sums(a, s, grad, dfill, "dfill", "multimask_scatter_backward");
}

// The layers of a call of targets, in either direction.
struct TargetsCall : MultimaskCall {
  std::vector<MultimaskRows> layers;
  gpu::MultimaskTargets problem = {};

  TargetsCall(const std::vector<Tensor>& tensors, const Tensor& lengths, int64_t norm, int64_t post_norm, double eps)
      : MultimaskCall(first_of(tensors), "layers") {
    const Tensor& first = tensors.front();
    check_dims(first, 3, "layers");
    STD_TORCH_CHECK(0 <= norm && norm <= 3 && 0 <= post_norm && post_norm <= 3, "unknown norm");
    set_plan(first.sizes()[0], first.sizes()[0], first.sizes()[1]);
    sizes.width = first.sizes()[2];
    check_sizes();
    for (const Tensor& t : tensors) layers.push_back(rows(t, sizes.batch, sizes.tokens, "a layer"));
    problem.sizes = sizes, problem.layers = layers.data(), problem.count = static_cast<int64_t>(layers.size());
    problem.lengths = index(lengths, sizes.batch, "lengths");
    problem.norm = static_cast<gpu::MultimaskNorm>(norm);
    problem.post_norm = static_cast<gpu::MultimaskNorm>(post_norm);
    problem.eps = static_cast<float>(eps);
  }
  static const Tensor& first_of(const std::vector<Tensor>& tensors) {
    STD_TORCH_CHECK(!tensors.empty(), "there are no layers");
    return tensors.front();
  }
  int64_t numel() const { return sizes.batch * sizes.tokens * sizes.width; }
};

void targets(std::vector<Tensor> layers, Tensor lengths, int64_t norm, int64_t post_norm, double eps, double weight,
             bool accumulate, Tensor out) {
  TargetsCall a(layers, lengths, norm, post_norm, eps);
  STD_TORCH_CHECK(!accumulate || post_norm == 0, "a sum that grows has no norm of its own");
  a.problem.weight = static_cast<float>(weight), a.problem.accumulate = accumulate;
  a.problem.out = static_cast<float*>(a.checked.write(out, a.numel(), ScalarType::Float, "out"));
  STD_TORCH_CHECK(a.problem.out, "out is empty");
  const GpuCall call(layers.front());
  const Tensor scratch = call.scratch(layers.front(), gpu::multimask_targets_scratch(a.problem, call.machine));
  a.checked.may_write(scratch.mutable_data_ptr(), scratch.numel(), "scratch");
  report(gpu::multimask_targets(a.problem, scratch.mutable_data_ptr(), call.machine, call.stream), "multimask_targets");
}

void targets_backward(Tensor grad, std::vector<Tensor> layers, Tensor lengths, int64_t norm, int64_t post_norm,
                      double eps, std::vector<Tensor> dlayers) {
  TargetsCall a(layers, lengths, norm, post_norm, eps);
  STD_TORCH_CHECK(dlayers.size() == layers.size(), "there are ", dlayers.size(), " gradients of ", layers.size(),
                  " layers");
  a.problem.weight = static_cast<float>(1.0 / static_cast<double>(layers.size()));
  std::vector<void*> to;
  for (const Tensor& t : dlayers) {
    to.push_back(a.checked.write(t, a.numel(), "a layer's gradient"));
    STD_TORCH_CHECK(to.back(), "a layer's gradient is empty");
  }
  gpu::MultimaskTargetsBackward b{};
  b.forward = a.problem, b.dlayers = to.data();
  b.grad = a.rows(grad, a.sizes.batch, a.sizes.tokens, ScalarType::Float, "grad");
  const GpuCall call(grad);
  const Tensor scratch = call.scratch(grad, gpu::multimask_targets_backward_scratch(b, call.machine));
  a.checked.may_write(scratch.mutable_data_ptr(), scratch.numel(), "scratch");
  report(gpu::multimask_targets_backward(b, scratch.mutable_data_ptr(), call.machine, call.stream),
         "multimask_targets_backward");
}

// What both directions of the loss are given.
struct LossCall : MultimaskCall {
  gpu::MultimaskLoss problem = {};

  LossCall(const Tensor& pred, const Tensor& target, const Tensor& inverse, const Tensor& lengths,
           const MaybeTensor& count, int64_t kind, double beta, double scale)
      : MultimaskCall(pred, "pred") {
    check_dims(pred, 3, "pred"), check_dims(target, 3, "target");
    STD_TORCH_CHECK(0 <= kind && kind <= 3, "unknown kind of loss");
    set_plan(pred.sizes()[0], target.sizes()[0], pred.sizes()[1]);
    sizes.width = pred.sizes()[2];
    check_sizes();
    problem.sizes = sizes, problem.pred = rows(pred, sizes.rows(), sizes.tokens, "pred");
    problem.target = rows(target, sizes.batch, sizes.tokens, ScalarType::Float, "target");
    problem.inverse = index(inverse, by_token(), "inverse"), problem.lengths = index(lengths, sizes.batch, "lengths");
    problem.count = longs(count, 1, "count");
    problem.kind = static_cast<gpu::MultimaskKind>(kind), problem.beta = static_cast<float>(beta);
    problem.scale = scale;
  }
  int64_t by_token() const { return sizes.rows() * sizes.tokens; }

  void run(const Tensor& like, const char* op) {
    const GpuCall call(like);
    const Tensor scratch = call.scratch(like, gpu::multimask_loss_scratch(problem, call.machine));
    checked.may_write(scratch.mutable_data_ptr(), scratch.numel(), "scratch");
    report(gpu::multimask_loss(problem, scratch.mutable_data_ptr(), call.machine, call.stream), op);
  }
};

void loss(Tensor pred, Tensor target, Tensor inverse, Tensor lengths, MaybeTensor count, int64_t kind, double beta,
          double scale, Tensor loss, Tensor dpred, Tensor moments) {
  LossCall a(pred, target, inverse, lengths, count, kind, beta, scale);
  a.problem.by_token = loss.dim() > 0;
  a.problem.loss =
      static_cast<float*>(a.checked.write(loss, a.problem.by_token ? a.by_token() : 1, ScalarType::Float, "loss"));
  a.problem.dpred = a.checked.write(dpred, a.by_token() * a.sizes.width, "dpred");
  a.problem.moments =
      static_cast<double*>(a.checked.write(moments, 1 + 4 * a.sizes.width, ScalarType::Double, "moments"));
  a.run(pred, "multimask_loss");
}

void loss_backward(Tensor grad, Tensor pred, Tensor target, Tensor inverse, Tensor lengths, MaybeTensor count,
                   int64_t kind, double beta, double scale, Tensor dpred, Tensor dtarget) {
  LossCall a(pred, target, inverse, lengths, count, kind, beta, scale);
  a.problem.by_token = grad.dim() > 0;
  a.problem.grad =
      static_cast<const float*>(a.checked.read(grad, a.problem.by_token ? a.by_token() : 1, ScalarType::Float, "grad"));
  a.problem.dpred = a.checked.write(dpred, a.by_token() * a.sizes.width, "dpred");
  a.problem.dtarget = static_cast<float*>(
      a.checked.write(dtarget, a.sizes.batch * a.sizes.tokens * a.sizes.width, ScalarType::Float, "dtarget"));
  a.run(pred, "multimask_loss_backward");
}

void rescale(Tensor t, Tensor factor) {
  const MultimaskCall a(t, "t");
  const gpu::MultimaskRescale r{a.sizes.number, t.numel(), a.checked.write(t, t.numel(), "t"),
                                static_cast<const float*>(a.checked.read(factor, 1, ScalarType::Float, "factor"))};
  if (!r.t) return;
  const GpuCall call(t);
  report(gpu::multimask_rescale(r, call.machine, call.stream), "multimask_rescale");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cuda, PYEFF_GPU_KEY, m) {
  m.impl("multimask_gather", TORCH_BOX(&gather));
  m.impl("multimask_gather_backward", TORCH_BOX(&gather_backward));
  m.impl("multimask_scatter", TORCH_BOX(&scatter));
  m.impl("multimask_scatter_backward", TORCH_BOX(&scatter_backward));
  m.impl("multimask_targets", TORCH_BOX(&targets));
  m.impl("multimask_targets_backward", TORCH_BOX(&targets_backward));
  m.impl("multimask_loss", TORCH_BOX(&loss));
  m.impl("multimask_loss_backward", TORCH_BOX(&loss_backward));
  m.impl("multimask_rescale", TORCH_BOX(&rescale));
}

}  // namespace
}  // namespace pyeff

#endif
