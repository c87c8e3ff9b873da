// The recurrence backwards for a tile of tokens: the derivatives of the gates' sums, from the last layer to the first.
//   dh_l = dout_l + carry_{l+1} + R^T da_{l+1}
#pragma once

#include "cuda/pipeline.cuh"
#include "cuda/read_common.cuh"

namespace pyeff::gpu {

struct ReverseParams {
  const void *grad_out, *grad_c;  // [tokens, rank] or null
  const void *w_hh, *h0, *c0;
  const void *h, *c;         // [layers, tokens, rank] with state_stride from layer to layer
  const void* gates;         // [layers, tokens, 4 rank] with gates_stride
  void* da;                  // [layers, tokens, derivatives, padded] of T; padding is written as 0
  float *carry_h, *carry_c;  // [tokens, rank]
  void *dh0, *dc0;           // null where not wanted
  int64_t state_stride, gates_stride, da_stride, layers, tokens, rank, padded;
  float share;  // of grad_out in each layer's state: 1 / layers, or 0 but for the last
  bool last_only, pairs, w_aligned;
};

// Tile of a block: 64 tokens by 128 units, 4 warps along the tokens and 2 along the units.
template <class T>
struct ReverseTile {
  static constexpr int kRows = 64, kUnits = 128, kNT = 8, kStages = 3;
  static constexpr int kStage = (kRows + kUnits) * kRowBytes;
  static constexpr int kShared = kStages * kStage;
};

// The columns of da that the recurrent product takes for a gate: of the GRU's n those times r.
template <Cell C>
PYEFF_DEVICE int recurrent_block(int gate) {
  return C == Cell::gru && gate == 2 ? 3 : gate;
}

template <class T, Cell C>
struct ReverseCell {
  const ReverseParams& p;

  // Units `unit` and the next of token n at layer l (-1: the first state). `sum(0 or 1)` is R^T da of the layer after.
  template <class Sum>
  PYEFF_DEVICE void operator()(int64_t l, int64_t n, int64_t unit, const Sum& sum) const {
    if (n >= p.tokens || unit >= p.padded) return;
    const int count = unit + 1 < p.rank ? 2 : unit < p.rank ? 1 : 0;
    const int64_t state = n * p.rank + unit;
    float dh[2] = {}, dc[2] = {};
    PYEFF_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (e >= count) break;
      if (l + 1 < p.layers) {
        dh[e] = sum(e) + (C == Cell::gru ? load(p.carry_h + state + e) : 0.0f);
        if (C == Cell::lstm) dc[e] = load(p.carry_c + state + e);
      } else if (C == Cell::lstm && p.grad_c) {
        dc[e] = to_float(load(static_cast<const T*>(p.grad_c) + state + e));
      }
    }
    if (l < 0) {
      if (p.dh0) store_two(static_cast<T*>(p.dh0) + state, dh[0], dh[1], count, p.pairs);
      if (C == Cell::lstm && p.dc0) store_two(static_cast<T*>(p.dc0) + state, dc[0], dc[1], count, p.pairs);
      return;
    }
    if (p.grad_out && (!p.last_only || l + 1 == p.layers)) {
      float g[2];
      load_two(g, static_cast<const T*>(p.grad_out) + state, count, p.pairs);
      dh[0] = fmaf(g[0], p.share, dh[0]), dh[1] = fmaf(g[1], p.share, dh[1]);
    }
    float saved[4][2] = {}, h[2] = {}, h_previous[2] = {}, c[2] = {}, c_previous[2] = {};
    if constexpr (C == Cell::rnn) {
      load_two(h, layer(p.h, l) + state, count, p.pairs);
    } else {
      const T* gates = static_cast<const T*>(p.gates) + l * p.gates_stride + n * 4 * p.rank + unit;
      PYEFF_UNROLL
      for (int g = 0; g < 4; ++g) load_two(saved[g], gates + g * p.rank, count, p.pairs);
    }
    if constexpr (C == Cell::gru) load_previous(h_previous, p.h, p.h0, l, state, count);
    if constexpr (C == Cell::lstm) {
      load_two(c, layer(p.c, l) + state, count, p.pairs);
      load_previous(c_previous, p.c, p.c0, l, state, count);
    }
    float da[derivatives_of(C)][2] = {};
    PYEFF_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (e >= count) break;
      const float unit_saved[4] = {saved[0][e], saved[1][e], saved[2][e], saved[3][e]};
      const CellBackward<T, C> back(dh[e], dc[e], unit_saved, h[e], h_previous[e], c[e], c_previous[e]);
      PYEFF_UNROLL
      for (int g = 0; g < derivatives_of(C); ++g) da[g][e] = back.da[g];
      if (C == Cell::gru) store(p.carry_h + state + e, back.dh_previous);
      if (C == Cell::lstm) store(p.carry_c + state + e, back.dc_previous);
    }
    T* to = static_cast<T*>(p.da) + l * p.da_stride + n * derivatives_of(C) * p.padded + unit;
    PYEFF_UNROLL
    for (int g = 0; g < derivatives_of(C); ++g) store_two(to + g * p.padded, da[g][0], da[g][1], 2, true);
  }

 private:
  PYEFF_DEVICE const T* layer(const void* base, int64_t l) const {
    return static_cast<const T*>(base) + l * p.state_stride;
  }
  PYEFF_DEVICE void load_previous(float (&x)[2], const void* states, const void* first, int64_t l, int64_t state,
                                  int count) const {
    if (l > 0) {
      load_two(x, layer(states, l - 1) + state, count, p.pairs);
    } else if (first) {
      load_two(x, static_cast<const T*>(first) + state, count, p.pairs);
    }
  }
};

// One stage: 64 rows of da for one gate, and as many rows of R by 128 units, kDepth<T> deep.
template <class T, Cell C>
PYEFF_DEVICE void copy_reverse(const ReverseParams& p, char* stage, const T* da, int64_t row0, int64_t unit0, int gate,
                               int64_t k) {
  using Tile = ReverseTile<T>;
  const int64_t column = k + thread_index() % 8 * kChunk<T>;
  for (int i = thread_index() / 8; i < Tile::kRows; i += kThreads / 8) {
    const bool there = row0 + i < p.tokens && column < p.padded;
    const int64_t at = (row0 + i) * derivatives_of(C) * p.padded + recurrent_block<C>(gate) * p.padded + column;
    copy_async16(stage + chunk_at(i, thread_index() % 8), da + (there ? at : 0), there);
  }
  constexpr int kChunks = Tile::kUnits / kChunk<T>;  // of a row of R
  char* weights = stage + Tile::kRows * kRowBytes;
  for (int i = thread_index(); i < kDepth<T> * kChunks; i += kThreads) {
    const int step = i / kChunks, chunk = i % kChunks;
    const int64_t unit = unit0 + chunk * kChunk<T>, row = k + step;
    const bool there = row < p.rank && unit < p.rank;
    const int left = static_cast<int>(p.rank - unit < kChunk<T> ? p.rank - unit : kChunk<T>);
    copy_chunk<T>(weights + chunk / 8 * (kDepth<T> * kRowBytes) + chunk_at(step, chunk % 8),
                  static_cast<const T*>(p.w_hh) + (there ? (gate * p.rank + row) * p.rank + unit : 0), there ? left : 0,
                  p.w_aligned);
  }
}

template <class T, Cell C>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_reverse(const PYEFF_GRID_CONSTANT ReverseParams p) {
  using Tile = ReverseTile<T>;
  const ReverseCell<T, C> cell{p};
  const int64_t row0 = int64_t{block_index_x()} * Tile::kRows;
  const int m = warp() % 4 * 16, n = warp() / 4 * 64;
  const int chunks = static_cast<int>(div_up(p.padded, int64_t{Tile::kUnits}));
  const int depth = static_cast<int>(div_up(p.rank, int64_t{kDepth<T>}));
  const int steps = gates_of(C) * depth;
  float sums[1][Tile::kNT][4];
  clear(sums);
  const bool first_wanted = p.dh0 || p.dc0;
  for (int64_t l = p.layers - 1; l >= (first_wanted ? -1 : 0); --l) {
    const auto finish = [&](int chunk) {
      PYEFF_UNROLL
      for (int i = 0; i < 2; ++i) {
        PYEFF_UNROLL
        for (int j = 0; j < Tile::kNT; ++j) {
          cell(l, row0 + m + i * 8 + lane() / 4, int64_t{chunk} * Tile::kUnits + n + j * 8 + 2 * (lane() % 4),
               [&](int e) { return sums[0][j][i * 2 + e]; });
        }
      }
      clear(sums);
    };
    if (l == p.layers - 1) {
      for (int chunk = 0; chunk < chunks; ++chunk) finish(chunk);
    } else {
      const T* da = static_cast<const T*>(p.da) + (l + 1) * p.da_stride;
      run_pipeline<Tile::kStages>(
          chunks * steps, Tile::kStage,
          [&](char* stage, int i) {
            copy_reverse<T, C>(p, stage, da, row0, int64_t{i / steps} * Tile::kUnits, i % steps / depth,
                               int64_t{i % depth} * kDepth<T>);
          },
          [&](const char* stage, int i) {
            multiply<T, 1, Tile::kNT, Major::k, Major::mn>(sums, stage, m, stage + Tile::kRows * kRowBytes,
                                                           Columns{n, Tile::kNT, 0});
            if (i % steps == steps - 1) finish(i / steps);
          });
    }
    // The derivatives that this block wrote are what it copies next.
    barrier();
  }
}

}  // namespace pyeff::gpu
