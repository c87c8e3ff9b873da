// The projection of read_project.cuh by the matrix instructions of a warpgroup (sm_90a): tiles of 128 by 256, each of
// two warpgroups half of the rows.
#pragma once

#include "cuda/read_project.cuh"

namespace pyeff::gpu {

struct ProjectWgmmaTile {
  static constexpr int kRows = 128, kColumns = 256, kStages = 4;
  static constexpr int kStage = (kRows + kColumns) * kRowBytes;
  static constexpr int kShared = kStages * kStage + 2 * kRows * static_cast<int>(sizeof(float));
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
    share_stats<T, Tile::kRows>(p, stats, row0, shared);
    PYEFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = warp() * 16 + i * 8 + lane() / 4;
      const RowScale scale{load_shared(shared + row), load_shared(shared + Tile::kRows + row)};
      PYEFF_UNROLL
      for (int j = 0; j < 32; ++j) {
        store_projected<T>(p, row0 + row, column0 + j * 8 + 2 * (lane() % 4), scale, sums[j * 4 + i * 2],
                           sums[j * 4 + i * 2 + 1]);
      }
    }
  }
}

}  // namespace pyeff::gpu
