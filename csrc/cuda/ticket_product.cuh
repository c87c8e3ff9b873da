// The product of tokens with a line of blocks, as a tile out of shared memory: y = x W^T by rows of blocks, and, by
// columns of blocks from the same values, dx = g W. The depth of the product runs over the line's blocks one behind the
// other, so that small blocks fill a stage together.
#pragma once

#include "cuda/ticket_common.cuh"

namespace pyeff::gpu {

// The tile of a block: 128 tokens by N columns, 8 warps.
template <class T, int N>
struct TicketTile {
  static constexpr int kRows = 128, kWarpsM = N > 64 ? 2 : 4, kStages = 3;
  static constexpr int kMT = kRows / kWarpsM / 16, kNT = N / (8 / kWarpsM) / 8;
  static constexpr int kStage = (kRows + N) * kRowBytes;
  static constexpr int kShared = kStages * kStage;
  // Panels of values whose rows are along the depth are whole.
  static_assert(N % kDepth<T> == 0 && TicketStaged<N>::bytes(kRows) <= kShared, "");
};

// Fills stages: the rows' numbers under the line's blocks, and the blocks.
template <class T, bool Transposed, int N, int Rows = TicketTile<T, N>::kRows>
struct TicketCopy {
  static constexpr int kRows = Rows;
  const TicketProductParams& p;
  const TicketLine& line;
  int64_t token0;
  int column0;

  PYEFF_DEVICE TicketStep step(int k) const { return TicketStep(p.side, line, k, p.depth, p.width); }

  PYEFF_DEVICE void operator()(char* stage, int i) const {
    const int k = i * kDepth<T>, chunk = thread_index() % 8;
    char* values = stage + kRows * kRowBytes;
    const TicketStep at = step(k + chunk * kChunk<T>);
    const bool whole = at.left <= 0 || at.left >= kChunk<T>;
    copy_rows(stage, k + chunk * kChunk<T>, at, p.rows_aligned && whole);
    if constexpr (Transposed) {
      copy_across(values, k);
    } else {
      copy_values(values, k + chunk * kChunk<T>, at, p.values_aligned && whole);
    }
  }

 private:
  // Chunk thread % 8 of every 32nd row, which is step k of the depth.
  PYEFF_DEVICE void copy_rows(char* stage, int k, const TicketStep& at, bool whole) const {
    const int chunk = thread_index() % 8;
    const T* rows = static_cast<const T*>(p.rows);
    if (whole) {
      const T* from = rows + token0 * p.stride + at.at;
      PYEFF_UNROLL
      for (int i = 0; i < kRows / 32; ++i) {
        const int row = thread_index() / 8 + 32 * i;
        const bool there = token0 + row < p.tokens && at.left > 0;
        copy_async16(stage + chunk_at(row, chunk), there ? from + row * p.stride : rows, there);
      }
      return;
    }
    PYEFF_NO_UNROLL
    for (int row = thread_index() / 8; row < kRows; row += 32) {
      gather_chunk<T>(stage + chunk_at(row, chunk), [&](int i) -> const T* {
        const TicketStep one = step(k + i);
        return one.left > 0 && token0 + row < p.tokens ? rows + (token0 + row) * p.stride + one.at : nullptr;
      });
    }
  }

  PYEFF_DEVICE void copy_values(char* panel, int k, const TicketStep& at, bool whole) const {
    const int chunk = thread_index() % 8;
    const T* values = static_cast<const T*>(p.values);
    if (whole) {
      const T* from = values + (at.slot * p.columns + column0) * p.depth + at.inner;
      PYEFF_UNROLL
      for (int i = 0; i < N / 32; ++i) {
        const int row = thread_index() / 8 + 32 * i;
        const bool there = column0 + row < p.columns && at.left > 0;
        copy_async16(panel + chunk_at(row, chunk), there ? from + int64_t{row} * p.depth : values, there);
      }
      return;
    }
    PYEFF_NO_UNROLL
    for (int row = thread_index() / 8; row < N; row += 32) {
      gather_chunk<T>(panel + chunk_at(row, chunk), [&](int i) -> const T* {
        const TicketStep one = step(k + i);
        if (one.left <= 0 || column0 + row >= p.columns) return nullptr;
        return values + (one.slot * p.columns + column0 + row) * p.depth + one.inner;
      });
    }
  }

  // Rows of the panels are along the depth.
  PYEFF_DEVICE void copy_across(char* panels, int k) const {
    constexpr int kAcross = N / kChunk<T>;
    const T* values = static_cast<const T*>(p.values);
    PYEFF_UNROLL
    for (int i = 0; i < kDepth<T> * kAcross / kThreads; ++i) {
      const int item = thread_index() + i * kThreads, row = item / kAcross, chunk = item % kAcross;
      const TicketStep at = step(k + row);
      const int most = p.columns - column0 - chunk * kChunk<T>;
      const T* from = values + (at.slot * p.depth + at.inner) * p.columns + column0 + chunk * kChunk<T>;
      char* to = panels + chunk / 8 * (kDepth<T> * kRowBytes) + chunk_at(row, chunk % 8);
      if (p.values_aligned) {
        const bool there = at.left > 0 && most > 0;
        copy_async16(to, there ? from : values, there);
      } else {
        gather_chunk<T>(to, [&](int j) { return at.left > 0 && j < most ? from + j : nullptr; });
      }
    }
  }
};

template <class T, bool Transposed, int N>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) ticket_product(const PYEFF_GRID_CONSTANT TicketProductParams p) {
  using Tile = TicketTile<T, N>;
  const TicketPlace place(p, Tile::kRows);
  if (place.line < 0) return;
  const TicketLine line(p.side, place.line);
  const int64_t token0 = place.tile * Tile::kRows;
  const int column0 = place.part * N;
  const int m = warp() % Tile::kWarpsM * (Tile::kMT * 16), n = warp() / Tile::kWarpsM * (Tile::kNT * 8);
  float sums[Tile::kMT][Tile::kNT][4];
  clear(sums);
  run_pipeline<Tile::kStages>(div_up(line.count * p.depth, kDepth<T>), Tile::kStage,
                              TicketCopy<T, Transposed, N>{p, line, token0, column0}, [&](const char* stage, int) {
                                multiply<T, Tile::kMT, Tile::kNT, Major::k, Transposed ? Major::mn : Major::k>(
                                    sums, stage, m, stage + Tile::kRows * kRowBytes, Columns{n, Tile::kNT, 0});
                              });
  const TicketStaged<N> staged{reinterpret_cast<float*>(shared_memory())};
  barrier();
  PYEFF_UNROLL
  for (int i = 0; i < 2 * Tile::kMT; ++i) {
    PYEFF_UNROLL
    for (int j = 0; j < Tile::kNT; ++j) {
      const float* pair = sums[i / 2][j] + i % 2 * 2;
      staged.put(m + i * 8 + lane() / 4, n + j * 8 + 2 * (lane() % 4), pair[0], pair[1]);
    }
  }
  barrier();
  staged.template store<T>(p, Tile::kRows, token0, place.line, column0, thread_index(), kThreads);
}

}  // namespace pyeff::gpu
