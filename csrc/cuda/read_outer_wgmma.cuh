// The long products of read_outer.cuh by the matrix instructions of a warpgroup (sm_90a): tiles of 128 by 256.
#pragma once

#include "cuda/read_outer.cuh"

namespace pyeff::gpu {

struct OuterWgmmaTile {
  static constexpr int kRows = 128, kColumns = 256, kStages = 4;
  static constexpr int kStage = (kRows + kColumns) * kRowBytes;
  static constexpr int kShared = kStages * kStage;
};

// A thread's part of the stages: 8 columns of every 8th token of the rows. What it copied it also normalises, in place,
// before the others see it.
template <class T>
class OuterRows {
 public:
  static constexpr int kAcross = OuterWgmmaTile::kColumns / 8, kTokens = kDepth<T> / (kThreads / kAcross);

  PYEFF_DEVICE OuterRows(const OuterParams& p, int64_t end) : p_(p), end_(end) {}

  // The tokens' statistics for a step that comes later.
  PYEFF_DEVICE void ask(int64_t i) {
    if (!p_.rstd) return;
    const OuterStep<T> step(p_, i);
    PYEFF_UNROLL
    for (int j = 0; j < kTokens; ++j) {
      const int64_t token = step.token + row(j), at = step.layer * p_.stats_stride + token;
      const bool there = i < end_ && token < p_.tokens;
      rstd_[j] = there ? load(p_.rstd + at) : 0.0f;
      mean_[j] = there && p_.mean ? load(p_.mean + at) : 0.0f;
    }
  }

  PYEFF_DEVICE void normalize(char* rows) const {
    if (!p_.rstd) return;
    const int chunk = thread_index() % kAcross;
    PYEFF_UNROLL
    for (int j = 0; j < kTokens; ++j) {
      char* at = rows + chunk / 8 * (kDepth<T> * kRowBytes) + chunk_at(row(j), chunk % 8);
      Vec16 v = load_shared16(at);
      PYEFF_UNROLL
      for (int i = 0; i < 4; ++i) {
        v.x[i] = pack2<T>((low_of<T>(v.x[i]) - mean_[j]) * rstd_[j], (high_of<T>(v.x[i]) - mean_[j]) * rstd_[j]);
      }
      store_shared16(at, v);
    }
  }

 private:
  PYEFF_DEVICE static int row(int j) { return thread_index() / kAcross + j * (kThreads / kAcross); }

  const OuterParams& p_;
  const int64_t end_;
  float rstd_[kTokens], mean_[kTokens];
};

// 64 rows by 256 columns, 64 tokens deep. Both operands have their tokens along the rows of the panels.
template <class T>
PYEFF_DEVICE void start_outer(float (&sums)[128], const char* rows, const char* columns, bool accumulate) {
  constexpr int kEightTokens = 8 * kRowBytes, kPanel = kDepth<T> * kRowBytes;
  wgmma_pin(sums);
  wgmma_fence();
  PYEFF_UNROLL
  for (int k = 0; k < kDepth<T>; k += 16) {
    wgmma<T, 256, true, true>(sums, wgmma_descriptor(rows + k * kRowBytes, kPanel, kEightTokens),
                              wgmma_descriptor(columns + k * kRowBytes, kPanel, kEightTokens), accumulate || k > 0);
  }
  wgmma_commit();
}

template <class T, class From>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_outer_wgmma(const PYEFF_GRID_CONSTANT OuterParams p) {
  if constexpr (kHasWgmma) {
    using Tile = OuterWgmmaTile;
    const int64_t column0 = int64_t{block_index_x()} * Tile::kColumns, row0 = int64_t{block_index_y()} * Tile::kRows;
    const int64_t steps = p.layers * div_up(p.tokens, int64_t{kDepth<T>});
    const int64_t begin = steps * block_index_z() / p.splits, end = steps * (block_index_z() + 1) / p.splits;
    const int count = static_cast<int>(end - begin);
    const bool first = block_index_x() == 0;
    float sums[128];
    OuterSums<T> columns;
    OuterRows<T> own(p, end);
    const auto fill = [&](int i) {
      if (i < count)
        copy_outer<T, From, Tile::kColumns>(p, shared_memory() + i % Tile::kStages * Tile::kStage,
                                            OuterStep<T>(p, begin + i), row0, column0);
      copy_async_commit();
    };
    fill(0);
    fill(1);
    own.ask(begin);
    for (int i = 0; i < count; ++i) {
      char* stage = shared_memory() + i % Tile::kStages * Tile::kStage;
      // As in read_project_wgmma; in between, a thread normalises what it copied itself, while the products of the
      // stage before go on.
      copy_async_wait<1>();
      own.normalize(stage + Tile::kRows * kRowBytes);
      async_proxy_fence();
      wgmma_wait<1>();
      barrier();
      start_outer<T>(sums, stage + warp() / 4 * (kDepth<T> * kRowBytes), stage + Tile::kRows * kRowBytes, i > 0);
      fill(i + 2);
      if (first) columns.add(stage);
      own.ask(begin + i + 1);
    }
    wgmma_wait<0>();
    wgmma_pin(sums);
    const int64_t all = p.gates * p.padded;
    float* to = p.partial + block_index_z() * all * p.width;
    PYEFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row0 + warp() * 16 + i * 8 + lane() / 4;
      PYEFF_UNROLL
      for (int j = 0; j < 64; ++j) {
        const int64_t column = column0 + j / 2 * 8 + 2 * (lane() % 4) + j % 2;
        if (row >= all || column >= p.width) continue;
        float* at = to + row * p.width + column;
        // A split without a step has no sums.
        const float sum = count > 0 ? sums[j / 2 * 4 + i * 2 + j % 2] : 0.0f;
        store(at, sum + (p.accumulate ? load(at) : 0.0f));
      }
    }
    if (first) {
      barrier();
      columns.finish(p, row0);
    }
  } else {
    trap();
  }
}

}  // namespace pyeff::gpu
