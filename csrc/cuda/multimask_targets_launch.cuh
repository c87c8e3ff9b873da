// Which kernels normalise layers, and how they are launched: shared by both directions of the targets.
#pragma once

#include "cuda/multimask_targets_grad.cuh"
#include "cuda/scratch.h"

namespace pyeff::gpu {

static_assert(TargetsTile<bf16, true, 8>::shared(TargetsTile<bf16, true, 8>::kTokens) <= kSharedAnywhere, "");
static_assert(TargetsTile<float, true, 2>::shared(TargetsTile<float, true, 2>::kTokens) <= kSharedAnywhere, "");

constexpr int64_t kTargetsSlice = TargetsTile<float, true, 2>::kTokens;  // tokens that stay on the chip

// Statistics of channels need two stages where no block sees all their tokens, or where nothing else is made of them.
inline bool by_stages(MultimaskNorm norm, int64_t tokens, bool gradient) {
  return norm == MultimaskNorm::batch || (norm == MultimaskNorm::instance && (gradient || tokens > kTargetsSlice));
}

// The scratch of the statistics of up to `layers` layers at once.
struct TargetsScratch {
  float *partial, *stats, *sums;
  TargetsScratch(Scratch& scratch, const MultimaskSizes& s, int64_t layers, bool gradient) {
    layers = layers < kTargetsLayers ? layers : kTargetsLayers;
    partial = scratch.take<float>(layers * s.batch * targets_parts(s.tokens) * 3 * s.width * 4);
    stats = scratch.take<float>(layers * s.batch * 3 * s.width * 4);
    sums = gradient ? scratch.take<float>(layers * s.batch * 3 * s.width * 4) : nullptr;
  }
};

// What all kernels are told of layers [first, first + count) of those that there are.
template <class T, bool Vector>
MultimaskTargetsParams targets_params(const MultimaskTargets& t, int64_t first) {
  MultimaskTargetsParams p{};
  const MultimaskSizes& s = t.sizes;
  p.count = static_cast<int>(t.count - first < kTargetsLayers ? t.count - first : kTargetsLayers);
  for (int k = 0; k < p.count; ++k) p.layers[k] = t.layers[first + k];
  p.lengths = t.lengths, p.out = t.out, p.batch = s.batch, p.tokens = s.tokens, p.width = static_cast<int>(s.width);
  p.units = static_cast<int>(div_up(s.width, int64_t{kMaskChunk<T, Vector>}));
  p.eps = t.eps, p.weight = t.weight, p.accumulate = t.accumulate || first > 0;
  return p;
}

inline bool layers_by_vectors(const MultimaskTargets& t) {
  bool vector = vectors(t.out, t.sizes.width, 4);
  for (int64_t k = 0; k < t.count; ++k) vector = vector && vectors(t.layers[k], t.sizes.width, size_of(t.sizes.number));
  return vector;
}

// Both stages of statistics, of layers or, with a gradient, of it.
template <class T, bool Vector, bool Gradient>
void run_stats(Launches& launches, MultimaskTargetsParams& p, const TargetsScratch& scratch, MultimaskNorm norm,
               const MultimaskRows& grad) {
  MultimaskStatsParams s{};
  s.all = norm == MultimaskNorm::batch;
  s.parts = targets_parts(p.tokens), s.partial = scratch.partial, s.grad = grad;
  s.to = Gradient ? scratch.sums : scratch.stats;
  p.stats = scratch.stats;
  p.stats_sample = s.all ? 0 : 3 * int64_t{p.width}, p.stats_layer = (s.all ? 1 : p.batch) * 3 * int64_t{p.width};
  s.p = p;
  using Tile = TargetsTile<T, Vector, 8>;
  launches.run("multimask_targets_part", multimask_targets_part<T, Vector, Gradient>,
               {p.batch * s.parts * div_up(p.units, 8), p.count}, kThreads, Tile::kSums, s);
  launches.run("multimask_targets_whole", multimask_targets_whole<Gradient>,
               {div_up(p.count * (s.all ? 1 : p.batch) * p.width, int64_t{kThreads})}, kThreads, 0, s);
}

template <class T, bool Vector, int Columns>
void run_slice(Launches& launches, const MultimaskTargetsParams& p) {
  using Tile = TargetsTile<T, Vector, Columns>;
  launches.run("multimask_targets_slice", multimask_targets_slice<T, Vector, Columns>,
               {p.batch * div_up(p.units, Columns)}, kThreads, Tile::shared(p.tokens), p);
}

// One norm of layers, and their sum.
template <class T, bool Vector>
void run_norm(Launches& launches, const MultimaskTargets& t, MultimaskNorm norm, const TargetsScratch& scratch,
              const Machine& machine) {
  const MultimaskSizes& s = t.sizes;
  for (int64_t first = 0; first < t.count; first += kTargetsLayers) {
    MultimaskTargetsParams p = targets_params<T, Vector>(t, first);
    const Grid flat{div_up(s.batch * s.tokens * p.units, int64_t{kThreads})};
    if (norm == MultimaskNorm::layer) {
      using Tile = TokenTile<T, Vector, true>;
      if (s.width <= Tile::kWidth) {
        launches.run("multimask_targets_warp", multimask_targets_warp<T, Vector>,
                     {div_up(s.batch * s.tokens, int64_t{Tile::kTokens})}, kThreads, 0, p);
      } else {
        launches.run("multimask_targets_block", multimask_targets_block<T, Vector>, {s.batch * s.tokens}, kThreads,
                     TokenTile<T, Vector, false>::kShared, p);
      }
    } else if (norm == MultimaskNorm::instance && !by_stages(norm, s.tokens, false)) {
      // The widest slices of which there is more than one for a processor.
      const auto enough = [&](int columns) {
        return s.tokens <= 2048 / columns &&
               (columns == 2 || s.batch * div_up(p.units, columns) >= 2 * machine.processors);
      };
      if (enough(8)) {
        run_slice<T, Vector, 8>(launches, p);
      } else if (enough(4)) {
        run_slice<T, Vector, 4>(launches, p);
      } else {
        run_slice<T, Vector, 2>(launches, p);
      }
    } else {
      if (norm != MultimaskNorm::none) run_stats<T, Vector, false>(launches, p, scratch, norm, {});
      launches.run("multimask_targets_apply", multimask_targets_apply<T, Vector>, flat, kThreads, 0, p);
    }
  }
}

// The norm of a float tensor in its own place.
inline void run_post_norm(Launches& launches, const MultimaskTargets& t, const TargetsScratch& scratch,
                          const Machine& machine) {
  const MultimaskRows rows{t.out, t.sizes.tokens * t.sizes.width, t.sizes.width};
  MultimaskTargets post = t;
  post.sizes.number = Number::f32, post.layers = &rows, post.count = 1, post.weight = 1.0f, post.accumulate = false;
  if (layers_by_vectors(post)) {
    run_norm<float, true>(launches, post, t.post_norm, scratch, machine);
  } else {
    run_norm<float, false>(launches, post, t.post_norm, scratch, machine);
  }
}

}  // namespace pyeff::gpu
