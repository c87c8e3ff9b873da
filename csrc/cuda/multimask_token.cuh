// Norms over the channels of a token: a warp has the token in registers where it fits, else a block reads it again.
#pragma once

#include "cuda/multimask_targets.cuh"

namespace pyeff::gpu {

// The channels of a token among the threads that have it. Resident: those of a warp, with everything in registers.
template <class T, bool Vector, bool Resident>
struct TokenTile {
  static constexpr int kNumbers = kMaskChunk<T, Vector>, kMembers = Resident ? kWarp : kThreads;
  static constexpr int kChunks = Resident ? 32 / kNumbers : 1;  // what is resident of a thread
  static constexpr int kWidth = kChunks * kMembers * kNumbers;
  static constexpr int kTokens = kThreads / kMembers;  // of a block
  static constexpr int kShared =
      Resident ? 0 : (kThreads / kWarp + 3 * kTargetsLayers) * static_cast<int>(sizeof(float));

  PYEFF_DEVICE static int member() { return Resident ? lane() : thread_index(); }
  PYEFF_DEVICE static int64_t token() { return int64_t{block_index_x()} * kTokens + (Resident ? warp() : 0); }
  PYEFF_DEVICE static float sum(float x) {
    if constexpr (Resident) {
      return warp_sum(x);
    } else {
      return block_sum(x, reinterpret_cast<float*>(shared_memory()));
    }
  }
};

// A token's chunks of this thread: body(chunk, column, left) for each, in registers or read where it is asked for.
template <class T, bool Vector, bool Resident>
class TokenRow {
 public:
  using Tile = TokenTile<T, Vector, Resident>;
  static constexpr int N = Tile::kNumbers;

  PYEFF_DEVICE void open(const T* from, int width) {
    from_ = from, width_ = width;
    if constexpr (Resident) {
      PYEFF_UNROLL
      for (int c = 0; c < Tile::kChunks; ++c) {
        const int column = column_of(c);
        if (column < width) piece_[c].read(from + column, width - column);
      }
    }
  }
  PYEFF_DEVICE static int column_of(int c) { return (c * Tile::kMembers + Tile::member()) * N; }

  // body(c, column, x): x has zeros past the end.
  template <class Body>
  PYEFF_DEVICE void each(const Body& body) const {
    if constexpr (Resident) {
      PYEFF_UNROLL
      for (int c = 0; c < Tile::kChunks; ++c) {
        float x[N];
        piece_[c].numbers(x);
        if (column_of(c) < width_) body(c, column_of(c), x);
      }
    } else {
      for (int column = column_of(0); column < width_; column += Tile::kMembers * N) {
        Piece<T, Vector> piece;
        piece.read(from_ + column, width_ - column);
        float x[N];
        piece.numbers(x);
        body(0, column, x);
      }
    }
  }

  // The mean of the token, what it was rounded by, and one over the deviation.
  PYEFF_DEVICE void moments(float eps, float& mean, float& rest, float& factor) const {
    const float share = 1.0f / static_cast<float>(width_);
    float sum = 0.0f, squares = 0.0f, off = 0.0f;
    each([&](int, int, const float (&x)[N]) {
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) sum += x[j];
    });
    const float about = Tile::sum(sum) * share;
    each([&](int, int column, const float (&x)[N]) {
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) {
        const float d = Vector || column + j < width_ ? x[j] - about : 0.0f;
        if constexpr (sizeof(T) == 4) off += d;
        squares = fmaf(d, d, squares);
      }
    });
    squares = Tile::sum(squares) * share;
    rest = 0.0f;
    if constexpr (sizeof(T) == 4) {
      rest = Tile::sum(off) * share;
      squares -= rest * rest;
    }
    mean = about;
    factor = rsqrt(squares + eps);
  }

 private:
  Piece<T, Vector> piece_[Tile::kChunks];
  const T* from_ = nullptr;
  int width_ = 0;
};

template <class T>
PYEFF_DEVICE const T* token_of(const MultimaskRows& rows, int64_t sample, int64_t token) {
  return static_cast<const T*>(rows.data) + sample * rows.outer + token * rows.inner;
}

// Layer norm, resident: the sum over the layers stays in registers, and the next layer is under way.
template <class T, bool Vector>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, Vector ? 2 : 1)
    multimask_targets_warp(const PYEFF_GRID_CONSTANT MultimaskTargetsParams p) {
  using Tile = TokenTile<T, Vector, true>;
  constexpr int N = Tile::kNumbers, C = Tile::kChunks;
  const int64_t row = Tile::token();
  if (row >= p.batch * p.tokens) return;
  const int64_t sample = row / p.tokens, token = row - sample * p.tokens;
  const bool here = token < clamped_length(p.lengths, sample, p.tokens);
  if (p.accumulate && !here) return;
  float sum[C][N] = {};
  if (here) {
    TokenRow<T, Vector, true> next;
    next.open(token_of<T>(p.layers[0], sample, token), p.width);
    PYEFF_NO_UNROLL
    for (int k = 0; k < p.count; ++k) {
      const TokenRow<T, Vector, true> now = next;
      if (k + 1 < p.count) next.open(token_of<T>(p.layers[k + 1], sample, token), p.width);
      float mean, rest, factor;
      now.moments(p.eps, mean, rest, factor);
      now.each([&](int c, int, const float (&x)[N]) {
        PYEFF_UNROLL
        for (int j = 0; j < N; ++j) sum[c][j] = fmaf(centred<T>(x[j], mean, rest), factor, sum[c][j]);
      });
    }
  }
  PYEFF_UNROLL
  for (int c = 0; c < C; ++c) {
    const int column = TokenRow<T, Vector, true>::column_of(c), left = p.width - column;
    if (left <= 0) continue;
    float* to = p.out + row * p.width + column;
    float x[N] = {};
    if (p.accumulate) read_floats<N, Vector>(x, to, left);
    PYEFF_UNROLL
    for (int j = 0; j < N; ++j) x[j] = fmaf(p.weight, sum[c][j], x[j]);
    write_floats<N, Vector>(to, x, left);
  }
}

// Layer norm of long tokens: the moments of all layers first.
template <class T, bool Vector>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_targets_block(const PYEFF_GRID_CONSTANT MultimaskTargetsParams p) {
  using Tile = TokenTile<T, Vector, false>;
  constexpr int N = Tile::kNumbers;
  const int64_t row = Tile::token(), sample = row / p.tokens, token = row - sample * p.tokens;
  const bool here = token < clamped_length(p.lengths, sample, p.tokens);
  if (p.accumulate && !here) return;
  float* shared = reinterpret_cast<float*>(shared_memory()) + kThreads / kWarp;
  for (int k = 0; k < p.count && here; ++k) {
    TokenRow<T, Vector, false> layer;
    layer.open(token_of<T>(p.layers[k], sample, token), p.width);
    float mean, rest, factor;
    layer.moments(p.eps, mean, rest, factor);
    if (thread_index() == 0) {
      store_shared(shared + 3 * k, mean);
      store_shared(shared + 3 * k + 1, rest);
      store_shared(shared + 3 * k + 2, factor * p.weight);
    }
  }
  barrier();
  for (int column = TokenRow<T, Vector, false>::column_of(0); column < p.width; column += Tile::kMembers * N) {
    const int left = p.width - column;
    float* to = p.out + row * p.width + column;
    float x[N] = {};
    if (p.accumulate) read_floats<N, Vector>(x, to, left);
    for (int k = 0; k < p.count && here; ++k) {
      Piece<T, Vector> piece;
      float y[N];
      piece.read(token_of<T>(p.layers[k], sample, token) + column, left);
      piece.numbers(y);
      const float mean = load_shared(shared + 3 * k), rest = load_shared(shared + 3 * k + 1);
      const float factor = load_shared(shared + 3 * k + 2);
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) x[j] = fmaf(centred<T>(y[j], mean, rest), factor, x[j]);
    }
    write_floats<N, Vector>(to, x, left);
  }
}

}  // namespace pyeff::gpu
