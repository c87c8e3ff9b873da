// The kernels of targets and losses under many masks for the dispatcher. The callers, pyeff/ops/multimask_targets.py
// and multimask_loss.py, have checked the arguments of their user and allocated the outputs; what is checked here is
// that no kernel can be led outside of its tensors.
#include "cpu/multimask_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "ops/checked.h"
#include "ops/number.h"
#include "ops/parallel.h"

namespace pyeff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType wide_of(ScalarType type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

struct Shape {
  int64_t samples, tokens, width;
  explicit Shape(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 3 && t.numel() > 0, name, " is not [B, T, D], or is empty");
    samples = t.sizes()[0], tokens = t.sizes()[1], width = t.sizes()[2];
  }
};

// A tensor [samples, tokens, width] of any strides but for its rows, which are contiguous.
MaskRows rows_of(const Tensor& t, int64_t samples, const Shape& shape, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type, name,
                  " is not on the CPU, or has another dtype than expected");
  STD_TORCH_CHECK(
      t.dim() == 3 && t.sizes()[0] == samples && t.sizes()[1] == shape.tokens && t.sizes()[2] == shape.width, name,
      " is not [", samples, ", ", shape.tokens, ", ", shape.width, "]");
  STD_TORCH_CHECK(shape.width == 1 || t.strides()[2] == 1, name, " has rows that are not contiguous");
  return {t.const_data_ptr(), t.strides()[0], t.strides()[1]};
}

const int32_t* lengths_of(const Checked& checked, const Tensor& t, const Shape& shape) {
  const auto* lengths = static_cast<const int32_t*>(checked.read(t, shape.samples, ScalarType::Int, "lengths"));
  for (int64_t b = 0; b < shape.samples; ++b)
    STD_TORCH_CHECK(0 <= lengths[b] && lengths[b] <= shape.tokens, "lengths[", b, "] is ", lengths[b],
                    ", expected 0 to ", shape.tokens);
  return lengths;
}

struct TargetsArguments {
  TargetsProblem problem{};
  Checked checked;
  ScalarType wide;
  std::vector<MaskRows> rows;
  int64_t numel;

  TargetsArguments(const std::vector<Tensor>& layers, const Tensor& lengths, int64_t norm, int64_t post_norm,
                   double eps) {
    STD_TORCH_CHECK(!layers.empty(), "layers is empty");
    STD_TORCH_CHECK(0 <= norm && norm <= 3, "norm is ", norm, ", expected 0 to 3");
    STD_TORCH_CHECK(0 <= post_norm && post_norm <= 3, "post_norm is ", post_norm, ", expected 0 to 3");
    STD_TORCH_CHECK(eps > 0, "eps is ", eps, ", expected a number above 0");
    const Shape shape(layers[0], "layers[0]");
    TargetsProblem& p = problem;
    p.number = number_of(layers[0], "layers[0]");
    checked.type = layers[0].scalar_type(), wide = wide_of(checked.type);
    p.norm = static_cast<MaskNorm>(norm), p.post_norm = static_cast<MaskNorm>(post_norm), p.eps = eps;
    p.batch = shape.samples, p.tokens = shape.tokens, p.width = shape.width;
    p.count = static_cast<int64_t>(layers.size());
    numel = layers[0].numel();
    for (const Tensor& layer : layers) rows.push_back(rows_of(layer, shape.samples, shape, checked.type, "layers"));
    p.layers = rows.data();
    p.lengths = lengths_of(checked, lengths, shape);
  }
};

void targets(std::vector<Tensor> layers, Tensor lengths, int64_t norm, int64_t post_norm, double eps, double weight,
             bool accumulate, Tensor out) {
  const TargetsArguments a(layers, lengths, norm, post_norm, eps);
  STD_TORCH_CHECK(!accumulate || post_norm == 0, "post_norm is ", post_norm, " where out is added to, expected 0");
  TargetsForward result{};
  result.weight = weight, result.accumulate = accumulate;
  result.out = a.checked.write(out, a.numel, a.wide, "out");
  STD_TORCH_CHECK(result.out, "out is empty");
  STD_TORCH_CHECK(PYEFF_CHOSEN(multimask_targets)(a.problem, result, torch_parallel()),
                  "multimask_targets: out of memory");
}

void targets_backward(Tensor grad, std::vector<Tensor> layers, Tensor lengths, int64_t norm, int64_t post_norm,
                      double eps, std::vector<Tensor> dlayers) {
  const TargetsArguments a(layers, lengths, norm, post_norm, eps);
  STD_TORCH_CHECK(dlayers.size() == layers.size(), "dlayers has ", dlayers.size(), " tensors, expected ",
                  layers.size());
  TargetsBackward result{};
  result.grad = rows_of(grad, a.problem.batch, Shape(layers[0], "layers[0]"), a.wide, "grad");
  std::vector<void*> data;
  for (const Tensor& d : dlayers) {
    data.push_back(a.checked.write(d, a.numel, "dlayers"));
    STD_TORCH_CHECK(data.back(), "dlayers has an empty tensor");
  }
  result.dlayers = data.data();
  STD_TORCH_CHECK(PYEFF_CHOSEN(multimask_targets_backward)(a.problem, result, torch_parallel()),
                  "multimask_targets_backward: out of memory");
}

struct LossArguments {
  MaskLossProblem problem{};
  Checked checked;
  ScalarType wide;
  int64_t rows;

  LossArguments(const Tensor& pred, const Tensor& target, const Tensor& inverse, const Tensor& lengths,
                const MaybeTensor& count, int64_t kind, double beta, double scale) {
    STD_TORCH_CHECK(0 <= kind && kind <= 3, "kind is ", kind, ", expected 0 to 3");
    STD_TORCH_CHECK(beta >= 0, "beta is ", beta, ", expected at least 0");
    const Shape shape(target, "target");
    MaskLossProblem& p = problem;
    p.number = number_of(pred, "pred");
    checked.type = pred.scalar_type(), wide = wide_of(checked.type);
    p.kind = static_cast<MaskLossKind>(kind), p.beta = beta, p.scale = scale;
    rows = Shape(pred, "pred").samples;
    STD_TORCH_CHECK(rows % shape.samples == 0, "pred has ", rows, " rows, expected a multiple of the ", shape.samples,
                    " samples of target");
    p.batch = shape.samples, p.masks = rows / shape.samples, p.tokens = shape.tokens, p.width = shape.width;
    p.pred = rows_of(pred, rows, shape, checked.type, "pred");
    p.target = rows_of(target, shape.samples, shape, wide, "target");
    p.inverse = static_cast<const int32_t*>(checked.read(inverse, rows * p.tokens, ScalarType::Int, "inverse"));
    p.lengths = lengths_of(checked, lengths, shape);
    if (count) p.count = static_cast<const int64_t*>(checked.read(*count, 1, ScalarType::Long, "count"));
  }

  // Whether a loss, or its derivative, is of each row's tokens.
  bool each(const Tensor& t, const char* name) const {
    if (t.dim() == 0) return false;
    STD_TORCH_CHECK(t.dim() == 2 && t.sizes()[0] == rows && t.sizes()[1] == problem.tokens, name, " is not [] or [",
                    rows, ", ", problem.tokens, "]");
    return true;
  }
};

void loss(Tensor pred, Tensor target, Tensor inverse, Tensor lengths, MaybeTensor count, int64_t kind, double beta,
          double scale, Tensor loss, Tensor dpred, Tensor moments) {
  const LossArguments a(pred, target, inverse, lengths, count, kind, beta, scale);
  MaskLossForward result{};
  result.each = a.each(loss, "loss");
  result.loss = a.checked.write(loss, result.each ? a.rows * a.problem.tokens : 1, a.wide, "loss");
  result.dpred = a.checked.write(dpred, pred.numel(), "dpred");
  result.moments =
      static_cast<double*>(a.checked.write(moments, 1 + 4 * a.problem.width, ScalarType::Double, "moments"));
  STD_TORCH_CHECK(PYEFF_CHOSEN(multimask_loss)(a.problem, result, torch_parallel()), "multimask_loss: out of memory");
}

void loss_backward(Tensor grad, Tensor pred, Tensor target, Tensor inverse, Tensor lengths, MaybeTensor count,
                   int64_t kind, double beta, double scale, Tensor dpred, Tensor dtarget) {
  const LossArguments a(pred, target, inverse, lengths, count, kind, beta, scale);
  MaskLossBackward result{};
  result.each = a.each(grad, "grad");
  result.grad = a.checked.read(grad, result.each ? a.rows * a.problem.tokens : 1, a.wide, "grad");
  result.dpred = a.checked.write(dpred, pred.numel(), "dpred");
  result.dtarget = a.checked.write(dtarget, target.numel(), a.wide, "dtarget");
  STD_TORCH_CHECK(PYEFF_CHOSEN(multimask_loss_backward)(a.problem, result, torch_parallel()),
                  "multimask_loss_backward: out of memory");
}

#define PYEFF_LOSS_PROBLEM                                                                                  \
  "Tensor pred, Tensor target, Tensor inverse, Tensor lengths, Tensor? count, int kind, float beta, float " \
  "scale, "

STABLE_TORCH_LIBRARY_FRAGMENT(pyeff_cpu, m) {
  m.def(
      "multimask_targets(Tensor[] layers, Tensor lengths, int norm, int post_norm, float eps, float weight, bool "
      "accumulate, Tensor(a!) out) -> ()");
  m.def(
      "multimask_targets_backward(Tensor grad, Tensor[] layers, Tensor lengths, int norm, int post_norm, float eps, "
      "Tensor(a!)[] dlayers) -> ()");
  m.def("multimask_loss(" PYEFF_LOSS_PROBLEM "Tensor(a!) loss, Tensor(b!) dpred, Tensor(c!) moments) -> ()");
  m.def("multimask_loss_backward(Tensor grad, " PYEFF_LOSS_PROBLEM "Tensor(a!) dpred, Tensor(b!) dtarget) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cpu, CPU, m) {
  m.impl("multimask_targets", TORCH_BOX(&targets));
  m.impl("multimask_targets_backward", TORCH_BOX(&targets_backward));
  m.impl("multimask_loss", TORCH_BOX(&loss));
  m.impl("multimask_loss_backward", TORCH_BOX(&loss_backward));
}

}  // namespace
}  // namespace pyeff
