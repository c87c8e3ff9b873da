// The recurrence over the layers for a tile of tokens, for any rank: R streams through shared memory, the state of the
// layer before is read back from global memory.
//   h_l = Cell(pre_l, R h_{l-1})
#pragma once

#include "cuda/pipeline.cuh"
#include "cuda/read_common.cuh"

namespace pyeff::gpu {

struct RecurParams {
  const void* pre;  // [layers, tokens, pre_ld]: the input's share
  const void *w_hh, *b_hh, *h0, *c0;
  void* h;           // layer l at h + l % h_period * h_stride: all layers, or two in turns
  void *c, *c_last;  // c null: not kept; c_last carries the LSTM's state from layer to layer
  void* gates;       // [layers, tokens, pre_ld] or null; may be `pre` itself
  void* out;
  float* total;  // [tokens, rank]: the sum over the layers so far; null for Reduce::last
  int64_t pre_stride, pre_ld, h_stride, h_period, c_stride, layers, tokens, rank;
  bool pairs;                             // two neighbouring units lie in one aligned word of every array
  bool h_aligned, h0_aligned, w_aligned;  // rows start at multiples of 16 bytes
};

// What a unit pair of one token needs beside the recurrent sums, and where its results go. Whole: the rank is even and
// every pair lies in one aligned word.
template <class T, Cell C, bool Whole = false>
struct RecurCell {
  const RecurParams& p;

  PYEFF_DEVICE const T* previous_h(int64_t l) const {
    return static_cast<const T*>(l == 0 ? p.h0 : at(p.h, (l - 1) % p.h_period * p.h_stride));
  }
  PYEFF_DEVICE static T* at(void* base, int64_t offset) { return static_cast<T*>(base) + offset; }

  // The input's share for units `unit` and the next of token n at layer l; where they do not exist, 0.
  PYEFF_DEVICE void inputs(int64_t l, int64_t n, int64_t unit, float (&x)[gates_of(C)][2]) const {
    const int count = n < p.tokens ? count_at(unit) : 0;
    const T* from = static_cast<const T*>(p.pre) + (count ? l * p.pre_stride + n * p.pre_ld + unit : 0);
    PYEFF_UNROLL
    for (int g = 0; g < gates_of(C); ++g) load_two(x[g], from + (count ? g * p.rank : 0), count, pairs());
  }

  // Their new states. `sum(gate, 0 or 1)` is R h.
  template <class Sum>
  PYEFF_DEVICE void step(int64_t l, int64_t n, int64_t unit, const float (&x)[gates_of(C)][2], const Sum& sum,
                         float (&h)[2]) const {
    constexpr int kGates = gates_of(C);
    h[0] = h[1] = 0.0f;
    if (n >= p.tokens || (!Whole && unit >= p.rank)) return;
    const int count = count_at(unit);
    const int64_t row = l * p.pre_stride + n * p.pre_ld + unit, state = n * p.rank + unit;
    float b[kGates][2] = {}, h_previous[2] = {}, c_previous[2] = {};
    PYEFF_UNROLL
    for (int g = 0; g < kGates; ++g) {
      if (p.b_hh) load_two(b[g], static_cast<const T*>(p.b_hh) + g * p.rank + unit, count, pairs());
    }
    if (C == Cell::gru && (l > 0 || p.h0)) load_two(h_previous, previous_h(l) + state, count, pairs());
    if (C == Cell::lstm && l > 0) load_two(c_previous, at(p.c_last, state), count, pairs());
    if (C == Cell::lstm && l == 0 && p.c0) load_two(c_previous, static_cast<const T*>(p.c0) + state, count, pairs());
    float saved[4][2] = {}, c[2] = {};
    PYEFF_UNROLL
    for (int e = 0; e < 2; ++e) {
      float gate_x[kGates], gate_a[kGates];
      PYEFF_UNROLL
      for (int g = 0; g < kGates; ++g) gate_x[g] = x[g][e], gate_a[g] = sum(g, e) + b[g][e];
      const CellStep<T, C> step(gate_x, gate_a, h_previous[e], c_previous[e]);
      h[e] = step.h;
      if constexpr (C == Cell::lstm) c[e] = step.c;
      if constexpr (C != Cell::rnn) {
        PYEFF_UNROLL
        for (int g = 0; g < 4; ++g) saved[g][e] = step.saved[g];
      }
    }
    store_two(at(p.h, l % p.h_period * p.h_stride + state), h[0], h[1], count, pairs());
    if constexpr (C == Cell::lstm) {
      store_two(at(p.c_last, state), c[0], c[1], count, pairs());
      if (p.c) store_two(at(p.c, l * p.c_stride + state), c[0], c[1], count, pairs());
    }
    if constexpr (C != Cell::rnn) {
      if (p.gates) {
        PYEFF_UNROLL
        for (int g = 0; g < 4; ++g) store_two(at(p.gates, row + g * p.rank), saved[g][0], saved[g][1], count, pairs());
      }
    }
    reduce(l, state, h, count);
  }

 private:
  PYEFF_DEVICE int count_at(int64_t unit) const { return Whole || unit + 1 < p.rank ? 2 : unit < p.rank ? 1 : 0; }
  PYEFF_DEVICE bool pairs() const { return Whole || p.pairs; }

  // The mean is of the states in full precision. Each sum is read and written by one thread alone.
  PYEFF_DEVICE void reduce(int64_t l, int64_t state, const float (&h)[2], int count) const {
    if (!p.out) return;
    float total[2] = {h[0], h[1]};
    if (p.total) {
      PYEFF_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (e >= count) break;
        if (l > 0) total[e] += load(p.total + state + e);
        if (l + 1 < p.layers) store(p.total + state + e, total[e]);
        total[e] /= static_cast<float>(p.layers);
      }
    }
    if (l + 1 == p.layers) store_two(at(p.out, state), total[0], total[1], count, pairs());
  }
};

template <Cell C>
struct RecurTile {
  static constexpr int kGates = gates_of(C), kRows = 64, kUnits = 64;
  static constexpr int kNT = kGates * 4;  // 4 warps along the tokens, 2 along the units: 32 units of each gate a warp
  static constexpr int kStages = C == Cell::lstm ? 2 : 3;
  static constexpr int kStage = (kRows + kGates * kUnits) * kRowBytes;
  static constexpr int kShared = kStages * kStage;
};

// One stage: 64 rows of the state before, and 64 units of each gate of R, kDepth<T> deep.
template <class T, Cell C>
PYEFF_DEVICE void copy_recurrent(const RecurParams& p, char* stage, const T* h, bool h_aligned, int64_t row0,
                                 int64_t unit0, int64_t k) {
  using Tile = RecurTile<C>;
  const int chunk = thread_index() % 8;
  k += chunk * kChunk<T>;
  const int left = static_cast<int>(p.rank - k < kChunk<T> ? p.rank - k : kChunk<T>);
  for (int i = thread_index() / 8; i < Tile::kRows; i += kThreads / 8) {
    const bool there = row0 + i < p.tokens && left > 0;
    copy_chunk<T>(stage + chunk_at(i, chunk), h + (there ? (row0 + i) * p.rank + k : 0), there ? left : 0, h_aligned);
  }
  char* weights = stage + Tile::kRows * kRowBytes;
  for (int i = thread_index() / 8; i < Tile::kGates * Tile::kUnits; i += kThreads / 8) {
    const int64_t unit = unit0 + i % Tile::kUnits, row = i / Tile::kUnits * p.rank + unit;
    const bool there = unit < p.rank && left > 0;
    copy_chunk<T>(weights + chunk_at(i, chunk), static_cast<const T*>(p.w_hh) + (there ? row * p.rank + k : 0),
                  there ? left : 0, p.w_aligned);
  }
}

template <class T, Cell C>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_recur(const PYEFF_GRID_CONSTANT RecurParams p) {
  using Tile = RecurTile<C>;
  const RecurCell<T, C> cell{p};
  const int64_t row0 = int64_t{block_index_x()} * Tile::kRows;
  const int m = warp() % 4 * 16, n = warp() / 4 * 32;
  const int chunks = static_cast<int>(div_up(p.rank, int64_t{Tile::kUnits}));
  const int depth = static_cast<int>(div_up(p.rank, int64_t{kDepth<T>}));
  float sums[1][Tile::kNT][4];
  clear(sums);
  for (int64_t l = 0; l < p.layers; ++l) {
    const auto finish = [&](int chunk) {
      PYEFF_UNROLL
      for (int i = 0; i < 2; ++i) {
        PYEFF_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int64_t row = row0 + m + i * 8 + lane() / 4;
          const int64_t unit = int64_t{chunk} * Tile::kUnits + n + j * 8 + 2 * (lane() % 4);
          float x[gates_of(C)][2], h[2];
          cell.inputs(l, row, unit, x);
          cell.step(l, row, unit, x, [&](int gate, int e) { return sums[0][gate * 4 + j][i * 2 + e]; }, h);
        }
      }
      clear(sums);
    };
    if (l == 0 && !p.h0) {
      for (int chunk = 0; chunk < chunks; ++chunk) finish(chunk);
    } else {
      const T* before = cell.previous_h(l);
      const bool aligned = l == 0 ? p.h0_aligned : p.h_aligned;
      // One run over all chunks of units: the copies for the next chunk are on their way while this one is finished.
      run_pipeline<Tile::kStages>(
          chunks * depth, Tile::kStage,
          [&](char* stage, int i) {
            copy_recurrent<T, C>(p, stage, before, aligned, row0, int64_t{i / depth} * Tile::kUnits,
                                 int64_t{i % depth} * kDepth<T>);
          },
          [&](const char* stage, int i) {
            multiply<T, 1, Tile::kNT, Major::k, Major::k>(sums, stage, m, stage + Tile::kRows * kRowBytes,
                                                          Columns{n, 4, Tile::kUnits});
            if (i % depth == depth - 1) finish(i / depth);
          });
    }
    // The states that this block wrote are what it copies next.
    barrier();
  }
}

}  // namespace pyeff::gpu
