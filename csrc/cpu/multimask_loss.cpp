#include "multimask_loss.h"

#include "multimask_loss_sweep.h"

namespace pyeff {
namespace PYEFF_ISA {
namespace {

template <class T, MaskLossKind K>
struct LossWith {
  using Number = T;
  static constexpr MaskLossKind kKind = K;
};

template <class T, class Function>
bool with_kind(const MaskLossProblem& p, const Function& run) {
  switch (p.kind) {
    case MaskLossKind::l2:
      return run(LossWith<T, MaskLossKind::l2>{});
    case MaskLossKind::cosine:
      return run(LossWith<T, MaskLossKind::cosine>{});
    case MaskLossKind::smooth_l1:
      if (p.beta > 0) return run(LossWith<T, MaskLossKind::smooth_l1>{});
      [[fallthrough]];
    default:
      return run(LossWith<T, MaskLossKind::l1>{});
  }
}

template <class Function>
bool with_types(const MaskLossProblem& p, const Function& run) {
  switch (p.number) {
    case Number::f64:
      return with_kind<double>(p, run);
    case Number::f32:
      return with_kind<float>(p, run);
    default:
      return with_kind<bf16>(p, run);
  }
}

}  // namespace

bool multimask_loss(const MaskLossProblem& p, const MaskLossForward& out, const Parallel& parallel) {
  return with_types(p, [&](auto with) {
    using T = typename decltype(with)::Number;
    return LossSweep<T, decltype(with)::kKind>(
        p, {static_cast<Compute<T>*>(out.loss), nullptr, out.each, static_cast<T*>(out.dpred), nullptr, out.moments,
            out.streamed})(parallel);
  });
}

bool multimask_loss_backward(const MaskLossProblem& p, const MaskLossBackward& out, const Parallel& parallel) {
  return with_types(p, [&](auto with) {
    using T = typename decltype(with)::Number;
    using C = Compute<T>;
    return LossSweep<T, decltype(with)::kKind>(
        p, {nullptr, static_cast<const C*>(out.grad), out.each, static_cast<T*>(out.dpred),
            static_cast<C*>(out.dtarget), nullptr, out.streamed})(parallel);
  });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
