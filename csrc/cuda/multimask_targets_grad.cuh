// The derivative of the targets: through each layer's norm, with what the forward pass knew computed again.
#pragma once

#include "cuda/multimask_token.cuh"

namespace pyeff::gpu {

struct MultimaskTargetsGradParams {
  MultimaskTargetsParams p;  // weight: of each layer
  MultimaskRows grad;        // float
  const float* sums;         // [layers, samples or 1, 3, D]: means of the gradient, and of it times what was normalised
  void* to[kTargetsLayers];  // [B, T, D] each
};

// With statistics that are known, or without a norm. One layer for each y of the grid.
template <class T, bool Vector>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_targets_grad(const PYEFF_GRID_CONSTANT MultimaskTargetsGradParams s) {
  constexpr int N = kMaskChunk<T, Vector>;
  const MultimaskTargetsParams& p = s.p;
  const int64_t i = int64_t{block_index_x()} * kThreads + thread_index(), row = i / p.units;
  if (row >= p.batch * p.tokens) return;
  const int k = block_index_y();
  const int64_t sample = row / p.tokens, token = row - sample * p.tokens;
  const int column = static_cast<int>(i - row * p.units) * N, left = p.width - column;
  float g[N] = {};
  if (token < clamped_length(p.lengths, sample, p.tokens)) {
    read_floats<N, Vector>(g, token_of<float>(s.grad, sample, token) + column, left);
    if (p.stats) {
      Piece<T, Vector> piece;
      piece.read(token_of<T>(p.layers[k], sample, token) + column, left);
      const TargetsStats<T, Vector> stats(p, k, sample, column, left);
      const TargetsStats<T, Vector> means(s.sums + k * p.stats_layer + sample * p.stats_sample + column, p.width, left);
      float x[N];
      piece.numbers(x);
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j)
        g[j] = stats.factor[j] * (g[j] - means.mean[j] - stats.normal(x[j], j) * means.factor[j]);
    }
    PYEFF_UNROLL
    for (int j = 0; j < N; ++j) g[j] *= p.weight;
  }
  Piece<T, Vector> piece;
  piece.set(g);
  piece.write(static_cast<T*>(s.to[k]) + row * p.width + column, left);
}

// Layer norm: a warp, or for long tokens a block, has a token of every layer.
template <class T, bool Vector, bool Resident>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, Vector ? 2 : 1)
    multimask_targets_grad_token(const PYEFF_GRID_CONSTANT MultimaskTargetsGradParams s) {
  using Tile = TokenTile<T, Vector, Resident>;
  using Row = TokenRow<T, Vector, Resident>;
  constexpr int N = Tile::kNumbers, C = Tile::kChunks;
  const MultimaskTargetsParams& p = s.p;
  const int64_t row = Tile::token();
  if (row >= p.batch * p.tokens) return;
  const int64_t sample = row / p.tokens, token = row - sample * p.tokens;
  const bool here = token < clamped_length(p.lengths, sample, p.tokens);
  const float* grad = token_of<float>(s.grad, sample, token);
  float kept[C][N] = {};
  if constexpr (Resident) {
    PYEFF_UNROLL
    for (int c = 0; c < C; ++c)
      if (here && Row::column_of(c) < p.width)
        read_floats<N, Vector>(kept[c], grad + Row::column_of(c), p.width - Row::column_of(c));
  }
  const auto gradient = [&](int c, int column, float (&g)[N]) {
    if constexpr (Resident) {
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) g[j] = kept[c][j];
    } else {
      read_floats<N, Vector>(g, grad + column, p.width - column);
    }
  };
  PYEFF_NO_UNROLL
  for (int k = 0; k < p.count; ++k) {
    T* to = static_cast<T*>(s.to[k]) + row * p.width;
    if (!here) {
      for (int column = Row::column_of(0); column < p.width; column += Tile::kMembers * N)
        Piece<T, Vector>().write(to + column, p.width - column);
      continue;
    }
    Row layer;
    layer.open(token_of<T>(p.layers[k], sample, token), p.width);
    float mean, rest, factor, a = 0.0f, b = 0.0f;
    layer.moments(p.eps, mean, rest, factor);
    layer.each([&](int c, int column, const float (&x)[N]) {
      float g[N];
      gradient(c, column, g);
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) a += g[j], b = fmaf(g[j], centred<T>(x[j], mean, rest) * factor, b);
    });
    const float share = 1.0f / static_cast<float>(p.width);
    a = Tile::sum(a) * share, b = Tile::sum(b) * share;
    layer.each([&](int c, int column, const float (&x)[N]) {
      float g[N];
      gradient(c, column, g);
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) g[j] = p.weight * factor * (g[j] - a - centred<T>(x[j], mean, rest) * factor * b);
      Piece<T, Vector> piece;
      piece.set(g);
      piece.write(to + column, p.width - column);
    });
  }
}

}  // namespace pyeff::gpu
