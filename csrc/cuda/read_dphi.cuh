// The input's gradient, only where a layer output asks for one: u = da (W * gamma), which read_norm_backward finishes.
#pragma once

#include "cuda/pipeline.cuh"
#include "cuda/read_common.cuh"

namespace pyeff::gpu {

struct DphiParams {
  void* dphi[kMaxLayers];  // [all tokens, width]; null where not wanted
  const void* da;          // [layers, tokens, derivatives, padded] of T, with da_stride
  const void* weight;      // [gates * rank, ld] of T, aligned
  int64_t da_stride, da_ld, tokens, first, width, ld, rank, padded;
  int gates;
};

template <class T>
struct DphiTile {
  static constexpr int kRows = 128, kColumns = 128, kMT = 4, kNT = 4, kStages = 3;
  static constexpr int kStage = (kRows + kColumns) * kRowBytes;
  static constexpr int kShared = kStages * kStage;
};

template <class T>
PYEFF_DEVICE void copy_dphi(const DphiParams& p, char* stage, const T* da, int64_t row0, int64_t column0, int gate,
                            int64_t k0) {
  using Tile = DphiTile<T>;
  const int64_t k = k0 + thread_index() % 8 * kChunk<T>;
  for (int i = thread_index() / 8; i < Tile::kRows; i += kThreads / 8) {
    const bool there = row0 + i < p.tokens && k < p.padded;
    copy_async16(stage + chunk_at(i, thread_index() % 8), da + (there ? (row0 + i) * p.da_ld + gate * p.padded + k : 0),
                 there);
  }
  constexpr int kChunks = Tile::kColumns / kChunk<T>;
  char* right = stage + Tile::kRows * kRowBytes;
  for (int i = thread_index(); i < kDepth<T> * kChunks; i += kThreads) {
    const int step = i / kChunks, chunk = i % kChunks;
    const int64_t row = k0 + step, column = column0 + chunk * kChunk<T>;
    const bool there = row < p.rank && column < p.ld;
    copy_async16(right + chunk / 8 * (kDepth<T> * kRowBytes) + chunk_at(step, chunk % 8),
                 static_cast<const T*>(p.weight) + (there ? (gate * p.rank + row) * p.ld + column : 0), there);
  }
}

template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_dphi(const PYEFF_GRID_CONSTANT DphiParams p) {
  using Tile = DphiTile<T>;
  T* to = static_cast<T*>(p.dphi[block_index_z()]);
  if (!to) return;
  const T* da = static_cast<const T*>(p.da) + block_index_z() * p.da_stride;
  const int64_t row0 = int64_t{block_index_y()} * Tile::kRows, column0 = int64_t{block_index_x()} * Tile::kColumns;
  const int m = warp() % 2 * 64, n = warp() / 2 * 32;
  const int depth = static_cast<int>(div_up(p.rank, int64_t{kDepth<T>}));
  float sums[Tile::kMT][Tile::kNT][4];
  clear(sums);
  run_pipeline<Tile::kStages>(
      p.gates * depth, Tile::kStage,
      [&](char* stage, int i) { copy_dphi<T>(p, stage, da, row0, column0, i / depth, int64_t{i % depth} * kDepth<T>); },
      [&](const char* stage, int) {
        multiply<T, Tile::kMT, Tile::kNT, Major::k, Major::mn>(sums, stage, m, stage + Tile::kRows * kRowBytes,
                                                               Columns{n, Tile::kNT, 0});
      });
  PYEFF_UNROLL
  for (int i = 0; i < 2 * Tile::kMT; ++i) {
    const int64_t row = row0 + m + i * 8 + lane() / 4;
    PYEFF_UNROLL
    for (int j = 0; j < Tile::kNT; ++j) {
      const int64_t column = column0 + n + j * 8 + 2 * (lane() % 4);
      if (row >= p.tokens || column >= p.width) continue;
      const float* pair = sums[i / 2][j] + i % 2 * 2;
      store_two(to + (p.first + row) * p.width + column, pair[0], pair[1], column + 1 < p.width ? 2 : 1,
                p.width % 2 == 0);
    }
  }
}

}  // namespace pyeff::gpu
