// The projection of read_project.cuh by the matrix instructions of a warpgroup (sm_90a): tiles of 128 by 256, each of
// two warpgroups half of the rows.
#pragma once

#include "cuda/read_project.cuh"

namespace pyeff::gpu {

struct ProjectWgmmaTile {
  static constexpr int kRows = 128, kColumns = 256, kStages = 4;
  static constexpr int kStage = (kRows + kColumns) * kRowBytes;
  // Behind the stages: rstd and mean of each row, row sum of W and bias of each column.
  static constexpr int kShared = kStages * kStage + 2 * (kRows + kColumns) * static_cast<int>(sizeof(float));
};

// One stage: the accumulators of 64 rows by 256 columns, 64 deep. The products run on while the caller goes on.
template <class T>
PYEFF_DEVICE void start_stage(float (&sums)[128], const char* rows, const char* columns, bool accumulate) {
  constexpr int kEightRows = 8 * kRowBytes;
  wgmma_pin(sums);
  wgmma_fence();
  PYEFF_UNROLL
  for (int k = 0; k < kDepth<T>; k += 16) {
    const int step = k * static_cast<int>(sizeof(T));
    wgmma<T, 256, false>(sums, wgmma_descriptor(rows + step, 16, kEightRows),
                         wgmma_descriptor(columns + step, 16, kEightRows), accumulate || k > 0);
  }
  wgmma_commit();
}

// A block's rows go out through the stages, which are free by then: each thread has pairs of numbers, and the memory
// wants whole rows.
struct StagedRows {
  // 16 bytes more than a row: eight rows of a column of pairs lie in different banks.
  static constexpr int kPitch = ProjectWgmmaTile::kColumns * 2 + 16;

  PYEFF_DEVICE static char* at(int row, int column) { return shared_memory() + row * kPitch + column * 2; }

  template <class T>
  PYEFF_DEVICE static void store(const ProjectParams& p, int64_t row0, int64_t column0) {
    constexpr int kChunks = ProjectWgmmaTile::kColumns / 8;
    T* to = static_cast<T*>(p.pre) + block_index_z() * p.pre_stride;
    for (int i = thread_index(); i < ProjectWgmmaTile::kRows * kChunks; i += kThreads) {
      const int64_t row = row0 + i / kChunks, column = column0 + i % kChunks * 8;
      if (row >= p.tokens || column >= p.columns) continue;
      char* from = at(i / kChunks, i % kChunks * 8);
      if (p.pre_aligned && column + 8 <= p.columns) {
        store16(to + row * p.pre_ld + column, load_shared16(from));
      } else {
        for (int j = 0; j < 8 && column + j < p.columns; ++j)
          gpu::store(to + row * p.pre_ld + column + j, load_shared(reinterpret_cast<const T*>(from) + j));
      }
    }
  }
};

static_assert(ProjectWgmmaTile::kColumns == kThreads, "each thread brings one column's sum and bias");

template <class T, class From>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_project_wgmma(const PYEFF_GRID_CONSTANT ProjectParams p) {
  if constexpr (kHasWgmma) {
    using Tile = ProjectWgmmaTile;
    const ReadLayer& layer = p.phi.layer[block_index_z()];
    const int64_t row0 = int64_t{block_index_y()} * Tile::kRows, column0 = int64_t{block_index_x()} * Tile::kColumns;
    const RowPointers<From, Tile::kRows> rows(p, layer, row0, nullptr);
    const int group = warp() / 4;
    const int count = static_cast<int>(div_up(p.width, int64_t{kDepth<T>}));
    float sums[128];
    RunningStats<T> stats;
    const auto fill = [&](int i) {
      char* stage = shared_memory() + i % Tile::kStages * Tile::kStage;
      const int64_t k = int64_t{i} * kDepth<T>;
      if (i < count) {
        rows.template copy<T>(stage, k);
        copy_panel<T, Tile::kColumns>(stage + Tile::kRows * kRowBytes, static_cast<const T*>(p.weight), p.ld, column0,
                                      p.columns, k);
      }
      copy_async_commit();
    };
    fill(0);
    fill(1);
    for (int i = 0; i < count; ++i) {
      char* stage = shared_memory() + i % Tile::kStages * Tile::kStage;
      // This stage has arrived, and the matrix units will see it. The products of the stage before the last are done
      // once all threads have passed, so that stage can be filled; those of the last one go on meanwhile.
      copy_async_wait<1>();
      async_proxy_fence();
      wgmma_wait<1>();
      barrier();
      start_stage<T>(sums, stage + group * 64 * kRowBytes, stage + Tile::kRows * kRowBytes, i > 0);
      fill(i + 2);
      if (p.norm != Norm::none) stats.add(stage, int64_t{i} * kDepth<T>, p.width, p.norm == Norm::layer);
    }
    wgmma_wait<0>();
    wgmma_pin(sums);
    float* shared = reinterpret_cast<float*>(shared_memory() + Tile::kStages * Tile::kStage);
    float* of_columns = shared + 2 * Tile::kRows;
    const bool there = column0 + thread_index() < p.columns;
    store_shared(of_columns + thread_index(), there ? load(p.sums + column0 + thread_index()) : 0.0f);
    store_shared(of_columns + Tile::kColumns + thread_index(), there ? load(p.bias + column0 + thread_index()) : 0.0f);
    share_stats<T, Tile::kRows>(p, stats, row0, shared);
    PYEFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = warp() * 16 + i * 8 + lane() / 4;
      const RowScale scale{load_shared(shared + row), load_shared(shared + Tile::kRows + row)};
      PYEFF_UNROLL
      for (int j = 0; j < 32; ++j) {
        const int column = j * 8 + 2 * (lane() % 4);
        float pair[2];
        PYEFF_UNROLL
        for (int e = 0; e < 2; ++e) {
          pair[e] = scale(sums[j * 4 + i * 2 + e], load_shared(of_columns + column + e),
                          load_shared(of_columns + Tile::kColumns + column + e));
        }
        store_shared(reinterpret_cast<uint32_t*>(StagedRows::at(row, column)), pack2<T>(pair[0], pair[1]));
      }
    }
    barrier();
    StagedRows::store<T>(p, row0, column0);
  } else {
    trap();
  }
}

}  // namespace pyeff::gpu
