// The product of a few tokens with a line of blocks, without matrix tiles: what it takes is reading the values once.
#pragma once

#include "cuda/ticket_common.cuh"

namespace pyeff::gpu {

struct TicketVector {
  // Tokens of a block; blocks of values that a lane has asked for before it uses the first; chunks of a block's line
  // that a warp reads side by side where its sums are along the other side.
  static constexpr int kTokens = 8, kAhead = 4, kMostAcross = 4;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kShared = kWarps * kWarp * kTokens * static_cast<int>(sizeof(float));
};

// Lanes that read a line of a block, a chunk each: a power of two.
template <class T>
int vector_lanes(int64_t block_in, bool transposed) {
  int lanes = 1;
  while (lanes * kChunk<T> < block_in && lanes < (transposed ? TicketVector::kMostAcross : kWarp)) lanes *= 2;
  return lanes;
}

struct TicketVectorParams {
  TicketProductParams p;
  int lanes;
};

// Outputs are along the lines of the blocks: each lane has a chunk of one, and the lanes of a line are added.
template <class T>
PYEFF_DEVICE void vector_forward(const TicketVectorParams& v, const TicketLine& line, int part, int64_t token0,
                                 int tokens) {
  const TicketProductParams& p = v.p;
  const int column = part * (kWarp / v.lanes) + lane() / v.lanes, inner = lane() % v.lanes * kChunk<T>;
  const bool mine = column < p.columns && inner < p.depth;
  const T* rows = static_cast<const T*>(p.rows) + token0 * p.stride;
  float sums[TicketVector::kTokens] = {};
  for (int e = warp(); e < line.count; e += TicketVector::kWarps * TicketVector::kAhead) {
    Vec16 values[TicketVector::kAhead];
    int at[TicketVector::kAhead];
    PYEFF_UNROLL
    for (int i = 0; i < TicketVector::kAhead; ++i) {
      const TicketStep step(p.side, line, (e + i * TicketVector::kWarps) * p.depth + inner, p.depth, p.width);
      at[i] = mine && step.left > 0 ? step.at : -1;
      values[i] = {};
      if (at[i] >= 0)
        values[i] = load16(static_cast<const T*>(p.values) + (step.slot * p.columns + column) * p.depth + inner);
    }
    PYEFF_UNROLL
    for (int i = 0; i < TicketVector::kAhead; ++i) {
      if (at[i] < 0) continue;
      float w[kChunk<T>];
      unpack_chunk<T>(w, values[i]);
      PYEFF_UNROLL
      for (int t = 0; t < TicketVector::kTokens; ++t) {
        if (t >= tokens) continue;
        float x[kChunk<T>];
        unpack_chunk<T>(x, load16(rows + t * p.stride + at[i]));
        PYEFF_UNROLL
        for (int j = 0; j < kChunk<T>; ++j) sums[t] = fmaf(x[j], w[j], sums[t]);
      }
    }
  }
  float* shared = reinterpret_cast<float*>(shared_memory());
  PYEFF_UNROLL
  for (int t = 0; t < TicketVector::kTokens; ++t) {
    for (int mask = v.lanes / 2; mask > 0; mask /= 2) sums[t] += shuffle_xor(sums[t], mask);
    if (lane() % v.lanes == 0)
      store_shared(shared + (warp() * kWarp + lane() / v.lanes) * TicketVector::kTokens + t, sums[t]);
  }
}

// Outputs are across the lines: each lane has a chunk of them, of every so many steps of the depth.
template <class T>
PYEFF_DEVICE void vector_transposed(const TicketVectorParams& v, const TicketLine& line, int part, int64_t token0,
                                    int tokens) {
  const TicketProductParams& p = v.p;
  const int steps = kWarp / v.lanes, column = (part * v.lanes + lane() % v.lanes) * kChunk<T>;
  const bool mine = column < p.columns;
  const T* rows = static_cast<const T*>(p.rows) + token0 * p.stride;
  const int all = line.count * p.depth;
  float sums[TicketVector::kTokens][kChunk<T>] = {};
  for (int k = warp() * steps + lane() / v.lanes; k < all; k += steps * TicketVector::kWarps * TicketVector::kAhead) {
    Vec16 values[TicketVector::kAhead];
    int at[TicketVector::kAhead];
    PYEFF_UNROLL
    for (int i = 0; i < TicketVector::kAhead; ++i) {
      const TicketStep step(p.side, line, k + i * steps * TicketVector::kWarps, p.depth, p.width);
      at[i] = mine && step.left > 0 ? step.at : -1;
      values[i] = {};
      if (at[i] >= 0)
        values[i] = load16(static_cast<const T*>(p.values) + (step.slot * p.depth + step.inner) * p.columns + column);
    }
    PYEFF_UNROLL
    for (int i = 0; i < TicketVector::kAhead; ++i) {
      if (at[i] < 0) continue;
      float w[kChunk<T>];
      unpack_chunk<T>(w, values[i]);
      PYEFF_UNROLL
      for (int t = 0; t < TicketVector::kTokens; ++t) {
        if (t >= tokens) continue;
        const float x = to_float(load(rows + t * p.stride + at[i]));
        PYEFF_UNROLL
        for (int j = 0; j < kChunk<T>; ++j) sums[t][j] = fmaf(x, w[j], sums[t][j]);
      }
    }
  }
  float* shared = reinterpret_cast<float*>(shared_memory());
  PYEFF_UNROLL
  for (int t = 0; t < TicketVector::kTokens; ++t) {
    PYEFF_UNROLL
    for (int j = 0; j < kChunk<T>; ++j) {
      for (int mask = kWarp / 2; mask >= v.lanes; mask /= 2) sums[t][j] += shuffle_xor(sums[t][j], mask);
      if (lane() < v.lanes)
        store_shared(shared + (warp() * kWarp + lane() * kChunk<T> + j) * TicketVector::kTokens + t, sums[t][j]);
    }
  }
}

// A block for each share of a line: its warps have every eighth piece of the depth, and are added in order.
template <class T, bool Transposed>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) ticket_vector(const PYEFF_GRID_CONSTANT TicketVectorParams v) {
  const TicketPlace place(v.p, TicketVector::kTokens);
  if (place.line < 0) return;
  const TicketLine line(v.p.side, place.line);
  const int64_t token0 = place.tile * TicketVector::kTokens, left = v.p.tokens - token0;
  const int tokens = static_cast<int>(left < TicketVector::kTokens ? left : TicketVector::kTokens);
  int columns = kWarp / v.lanes;
  if constexpr (Transposed) {
    columns = v.lanes * kChunk<T>;
    vector_transposed<T>(v, line, place.part, token0, tokens);
  } else {
    vector_forward<T>(v, line, place.part, token0, tokens);
  }
  barrier();
  const float* shared = reinterpret_cast<const float*>(shared_memory());
  for (int i = thread_index(); i < columns * TicketVector::kTokens; i += kThreads) {
    const int column = i / TicketVector::kTokens, t = i % TicketVector::kTokens;
    if (t >= tokens) continue;
    float sum = 0.0f;
    for (int w = 0; w < TicketVector::kWarps; ++w)
      sum += load_shared(shared + (w * kWarp + column) * TicketVector::kTokens + t);
    store_product<T>(v.p, token0 + t, place.line, place.part * columns + column, sum);
  }
}

}  // namespace pyeff::gpu
