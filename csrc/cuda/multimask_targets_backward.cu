// Teacher targets on the GPU, backward: the mean of the layers again where a norm came after it, then each layer.
#include "cuda/multimask_targets_launch.cuh"

namespace pyeff::gpu {
namespace {

struct BackwardScratch {
  float* mean = nullptr;  // [B, T, D]: what the last norm was taken of, and then its gradient
  TargetsScratch stats;

  BackwardScratch(Scratch& scratch, const MultimaskTargets& t)
      : mean(t.post_norm == MultimaskNorm::none ? nullptr : scratch.take<float>(bytes(t))),
        stats(scratch, t.sizes, layers(t), true) {}
  static int64_t bytes(const MultimaskTargets& t) { return t.sizes.batch * t.sizes.tokens * t.sizes.width * 4; }
  static int64_t layers(const MultimaskTargets& t) {
    return by_stages(t.norm, t.sizes.tokens, true) ? t.count : by_stages(t.post_norm, t.sizes.tokens, true) ? 1 : 0;
  }
};

template <class T, bool Vector>
void run_gradient(Launches& launches, const MultimaskTargets& t, MultimaskNorm norm, const MultimaskRows& grad,
                  void* const* to, const TargetsScratch& scratch) {
  const MultimaskSizes& s = t.sizes;
  for (int64_t first = 0; first < t.count; first += kTargetsLayers) {
    MultimaskTargetsGradParams g{};
    g.p = targets_params<T, Vector>(t, first);
    g.grad = grad, g.sums = scratch.sums;
    for (int k = 0; k < g.p.count; ++k) g.to[k] = to[first + k];
    if (norm == MultimaskNorm::layer) {
      using Tile = TokenTile<T, Vector, true>;
      if (s.width <= Tile::kWidth) {
        launches.run("multimask_targets_grad_token", multimask_targets_grad_token<T, Vector, true>,
                     {div_up(s.batch * s.tokens, int64_t{Tile::kTokens})}, kThreads, 0, g);
      } else {
        launches.run("multimask_targets_grad_token", multimask_targets_grad_token<T, Vector, false>,
                     {s.batch * s.tokens}, kThreads, TokenTile<T, Vector, false>::kShared, g);
      }
      continue;
    }
    if (norm != MultimaskNorm::none) {
      run_stats<T, Vector, false>(launches, g.p, scratch, norm, {});
      run_stats<T, Vector, true>(launches, g.p, scratch, norm, grad);
    }
    launches.run("multimask_targets_grad", multimask_targets_grad<T, Vector>,
                 {div_up(s.batch * s.tokens * g.p.units, int64_t{kThreads}), g.p.count}, kThreads, 0, g);
  }
}

}  // namespace

int64_t multimask_targets_backward_scratch(const MultimaskTargetsBackward& b, const Machine&) {
  Scratch scratch(nullptr);
  BackwardScratch(scratch, b.forward);
  return scratch.used();
}

const char* multimask_targets_backward(const MultimaskTargetsBackward& b, void* base, const Machine& machine,
                                       void* stream) {
  Scratch scratch(base);
  const MultimaskTargets& t = b.forward;
  const MultimaskSizes& s = t.sizes;
  const BackwardScratch local(scratch, t);
  Launches launches(stream);
  MultimaskRows grad = b.grad;
  if (local.mean) {
    MultimaskTargets mean = t;
    mean.out = local.mean, mean.accumulate = false;
    with_chunks(s.number, layers_by_vectors(mean), [&](auto type, auto by_vectors) {
      run_norm<decltype(type), decltype(by_vectors)::value>(launches, mean, t.norm, local.stats, machine);
    });
    const MultimaskRows rows{local.mean, s.tokens * s.width, s.width};
    MultimaskTargets post = t;
    post.sizes.number = Number::f32, post.layers = &rows, post.count = 1, post.weight = 1.0f;
    void* const to[] = {local.mean};
    if (vectors(rows, s.width, 4) && vectors(grad, s.width, 4)) {
      run_gradient<float, true>(launches, post, t.post_norm, grad, to, local.stats);
    } else {
      run_gradient<float, false>(launches, post, t.post_norm, grad, to, local.stats);
    }
    grad = rows;
  }
  bool vector = vectors(grad, s.width, 4);
  for (int64_t k = 0; k < t.count; ++k)
    vector =
        vector && vectors(t.layers[k], s.width, size_of(s.number)) && vectors(b.dlayers[k], s.width, size_of(s.number));
  with_chunks(s.number, vector, [&](auto type, auto by_vectors) {
    run_gradient<decltype(type), decltype(by_vectors)::value>(launches, t, t.norm, grad, b.dlayers, local.stats);
  });
  return launches.error;
}

}  // namespace pyeff::gpu
