// The tiles of ticket_product.cuh and ticket_outer.cuh by the matrix instructions of a warpgroup (sm_90a).
#pragma once

#include "cuda/ticket_outer.cuh"
#include "cuda/ticket_product.cuh"

namespace pyeff::gpu {

// Fills stages two ahead and multiplies one after another. With four stages the products of one go on while the next is
// waited for; with three, two blocks share a multiprocessor and fill each other's gaps.
template <int Stages, int StageBytes, class Load, class Use>
PYEFF_DEVICE void run_wgmma(int count, const Load& load, const Use& use) {
  static_assert(Stages == 3 || Stages == 4, "");
  const auto fill = [&](int i) {
    if (i < count) load(shared_memory() + i % Stages * StageBytes, i);
    copy_async_commit();
  };
  fill(0);
  fill(1);
  for (int i = 0; i < count; ++i) {
    // This stage has arrived, and the matrix units will see it. Products of the stage that is filled next are done.
    copy_async_wait<1>();
    async_proxy_fence();
    wgmma_wait<Stages - 3>();
    barrier();
    use(shared_memory() + i % Stages * StageBytes, i > 0);
    wgmma_commit();
    fill(i + 2);
  }
  wgmma_wait<0>();
}

// Tokens by N columns, a warpgroup for each half of the tokens. 256 tokens share the loads of the values, and take a
// multiprocessor alone.
template <int Rows, int N>
struct TicketWgmmaTile {
  static constexpr int kRows = Rows, kTiles = Rows / 128;
  static constexpr int kStages = Rows == 128 && N > 64 ? 3 : 4, kStage = (kRows + N) * kRowBytes;
  static constexpr int kShared = kStages * kStage;
  static_assert(TicketStaged<N>::bytes(kRows) <= kShared, "");
};

template <class T, bool Transposed, int Rows, int N>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, (Rows > 128 ? 1 : 2))
    ticket_product_wgmma(const PYEFF_GRID_CONSTANT TicketProductParams p) {
  if constexpr (kHasWgmma) {
    using Tile = TicketWgmmaTile<Rows, N>;
    const TicketPlace place(p, Rows);
    if (place.line < 0) return;
    const TicketLine line(p.side, place.line);
    const int64_t token0 = place.tile * Rows;
    const int column0 = place.part * N, row0 = warp() / 4 * (Rows / 2);
    float sums[Tile::kTiles][N / 2];
    const auto pin = [&] {
      PYEFF_UNROLL
      for (int m = 0; m < Tile::kTiles; ++m) wgmma_pin(sums[m]);
    };
    run_wgmma<Tile::kStages, Tile::kStage>(
        div_up(line.count * p.depth, kDepth<T>), TicketCopy<T, Transposed, N, Rows>{p, line, token0, column0},
        [&](const char* stage, bool more) {
          constexpr int kEightRows = 8 * kRowBytes, kPanel = kDepth<T> * kRowBytes;
          const char *rows = stage + row0 * kRowBytes, *values = stage + Rows * kRowBytes;
          pin();
          wgmma_fence();
          PYEFF_UNROLL
          for (int k = 0; k < kDepth<T>; k += 16) {
            const uint64_t b = Transposed ? wgmma_descriptor(values + k * kRowBytes, kPanel, kEightRows)
                                          : wgmma_descriptor(values + k * 2, 16, kEightRows);
            PYEFF_UNROLL
            for (int m = 0; m < Tile::kTiles; ++m) {
              const uint64_t a = wgmma_descriptor(rows + m * 64 * kRowBytes + k * 2, 16, kEightRows);
              wgmma<T, N, Transposed>(sums[m], a, b, more || k > 0);
            }
          }
        });
    pin();
    // Of a line without blocks there are no sums.
    const bool any = line.count > 0;
    const TicketStaged<N> staged{reinterpret_cast<float*>(shared_memory())};
    barrier();
    PYEFF_UNROLL
    for (int i = 0; i < 2 * Tile::kTiles; ++i) {
      const int row = row0 + i / 2 * 64 + warp() % 4 * 16 + i % 2 * 8 + lane() / 4;
      PYEFF_UNROLL
      for (int j = 0; j < N / 8; ++j) {
        const float* pair = sums[i / 2] + j * 4 + i % 2 * 2;
        staged.put(row, j * 8 + 2 * (lane() % 4), any ? pair[0] : 0.0f, any ? pair[1] : 0.0f);
      }
    }
    barrier();
    staged.template store<T>(p, Rows, token0, place.line, column0, thread_index(), kThreads);
  } else {
    trap();
  }
}

// Rows of a block by columns side by side: a warpgroup for each half of the longer side, 64 by 128.
template <int Rows>
struct TicketOuterWgmmaTile {
  static constexpr int kRows = Rows, kColumns = Rows > 64 ? 128 : 256, kStages = Rows > 64 ? 3 : 4;
  static constexpr int kStage = (kRows + kColumns) * kRowBytes, kShared = kStages * kStage;
  // Blocks on a multiprocessor.
  static constexpr int kBlocks = Rows > 64 ? 2 : 1;
};

template <class T, int Rows>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, TicketOuterWgmmaTile<Rows>::kBlocks)
    ticket_outer_wgmma(const PYEFF_GRID_CONSTANT TicketOuterParams p) {
  if constexpr (kHasWgmma) {
    using Tile = TicketOuterWgmmaTile<Rows>;
    constexpr int kN = 128, kPanel = kDepth<T> * kRowBytes;
    const TicketOuterPlace place(p, Tile::kRows, Tile::kColumns, kDepth<T>);
    if (place.line < 0) return;
    const TicketLine line(p.side, place.line);
    if (place.column0 >= line.count * p.block_in) return;
    const int group = warp() / 4, row0 = Rows > 64 ? group * 64 : 0, column0 = Rows > 64 ? 0 : group * kN;
    float sums[kN / 2];
    run_wgmma<Tile::kStages, Tile::kStage>(
        static_cast<int>(place.end - place.begin), TicketOuterCopy<T, Rows, Tile::kColumns>{p, line, place},
        [&](const char* stage, bool more) {
          // Tokens are along the rows of both operands' panels.
          constexpr int kEightTokens = 8 * kRowBytes;
          const char* rows = stage + row0 / 64 * kPanel;
          const char* columns = stage + Rows * kRowBytes + column0 / 64 * kPanel;
          wgmma_pin(sums);
          wgmma_fence();
          PYEFF_UNROLL
          for (int k = 0; k < kDepth<T>; k += 16) {
            wgmma<T, kN, true, true>(sums, wgmma_descriptor(rows + k * kRowBytes, kPanel, kEightTokens),
                                     wgmma_descriptor(columns + k * kRowBytes, kPanel, kEightTokens), more || k > 0);
          }
        });
    wgmma_pin(sums);
    PYEFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      PYEFF_UNROLL
      for (int j = 0; j < kN / 8; ++j) {
        // Of a part without tokens there are no sums.
        const bool any = place.end > place.begin;
        const float pair[2] = {any ? sums[j * 4 + i * 2] : 0.0f, any ? sums[j * 4 + i * 2 + 1] : 0.0f};
        store_outer<T>(p, line, place, place.row0 + row0 + warp() % 4 * 16 + i * 8 + lane() / 4,
                       place.column0 + column0 + j * 8 + 2 * (lane() % 4), pair);
      }
    }
  } else {
    trap();
  }
}

}  // namespace pyeff::gpu
