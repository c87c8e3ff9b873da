#include "multimask_targets_sweep.h"

namespace pyeff {
namespace PYEFF_ISA {
namespace {

template <class Function>
bool with_number(Number number, const Function& run) {
  switch (number) {
    case Number::f64:
      return run(double{});
    case Number::f32:
      return run(float{});
    default:
      return run(bf16{});
  }
}

// Scratch, as the kernels' calls are: one block.
template <class T>
struct Layers {
  explicit Layers(const TargetsProblem& p) : scratch(p.count * int64_t(sizeof(MaskTensor<const T>))) {
    auto* to = static_cast<MaskTensor<const T>*>(scratch.block);
    for (int64_t k = 0; to && k < p.count; ++k)
      to[k] = {static_cast<const T*>(p.layers[k].data), p.layers[k].sample, p.layers[k].token};
  }
  const MaskTensor<const T>* all() const { return static_cast<const MaskTensor<const T>*>(scratch.block); }
  Scratch scratch;
};

template <class T>
NormCall<T> call_of(const TargetsProblem& p, MaskNorm norm, double weight, int64_t count,
                    const MaskTensor<const T>* layers) {
  return {norm, p.eps, weight, p.batch, p.tokens, p.width, count, p.lengths, layers};
}

// The sum of the normalised layers, and what a second norm makes of it.
template <class T>
bool forward(const TargetsProblem& p, const TargetsForward& out, MaskNorm post_norm, const Parallel& parallel) {
  using C = Compute<T>;
  C* to = static_cast<C*>(out.out);
  const int64_t bytes = p.batch * p.tokens * p.width * int64_t(sizeof(C));
  const bool streamed = bytes >= out.streamed && can_stream(to, p.width);
  if (!out.accumulate) expect_writes(to, bytes);
  const Layers<T> layers(p);
  if (!layers.all()) return false;
  const bool by_token = post_norm == MaskNorm::layer, again = post_norm != MaskNorm::none && !by_token;
  const auto call = call_of<T>(p, p.norm, out.weight, p.count, layers.all());
  if (!norm_forward<T>(call, by_token, out.accumulate, to, streamed && !again, parallel)) return false;
  if (!again) return true;
  const MaskTensor<const C> sum{to, p.tokens * p.width, p.width};
  return norm_forward<C>(call_of<C>(p, post_norm, 1, 1, &sum), false, false, to, streamed, parallel);
}

template <class T>
bool backward(const TargetsProblem& p, const TargetsBackward& out, const Parallel& parallel) {
  using C = Compute<T>;
  const Layers<T> layers(p);
  if (!layers.all()) return false;
  MaskTensor<const C> grad{static_cast<const C*>(out.grad.data), out.grad.sample, out.grad.token};
  const int64_t sum_bytes = p.post_norm == MaskNorm::none ? 0 : p.batch * p.tokens * p.width * int64_t(sizeof(C));
  Scratch scratch(sum_bytes);
  if (!scratch.block) return false;
  const double weight = 1 / double(p.count);
  if (sum_bytes) {
    // What the second norm was taken of, which then makes room for its gradient.
    C* sum = static_cast<C*>(scratch.block);
    if (!forward<T>(p, {weight, false, sum}, MaskNorm::none, parallel)) return false;
    const MaskTensor<const C> made{sum, p.tokens * p.width, p.width};
    if (!norm_backward<C>(call_of<C>(p, p.post_norm, 1, 1, &made), grad, &sum, false, parallel)) return false;
    grad = made;
  }
  T* const* dlayers = reinterpret_cast<T* const*>(out.dlayers);
  const int64_t bytes = p.batch * p.tokens * p.width * int64_t(sizeof(T));
  bool streamed = bytes * p.count >= out.streamed;
  for (int64_t k = 0; k < p.count; ++k) {
    streamed &= can_stream(dlayers[k], p.width);
    expect_writes(dlayers[k], bytes);
  }
  return norm_backward<T>(call_of<T>(p, p.norm, weight, p.count, layers.all()), grad, dlayers, streamed, parallel);
}

}  // namespace

bool multimask_targets(const TargetsProblem& p, const TargetsForward& out, const Parallel& parallel) {
  return with_number(p.number, [&](auto type) { return forward<decltype(type)>(p, out, p.post_norm, parallel); });
}

bool multimask_targets_backward(const TargetsProblem& p, const TargetsBackward& out, const Parallel& parallel) {
  return with_number(p.number, [&](auto type) { return backward<decltype(type)>(p, out, parallel); });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
