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
  static_assert(N % kDepth<T> == 0, "");
};

// Fills stages: the rows' numbers under the line's blocks, and the blocks.
template <class T, bool Transposed, int N>
struct TicketCopy {
  static constexpr int kRows = TicketTile<T, N>::kRows;
  const TicketProductParams& p;
  const TicketLine& line;
  int64_t token0;
  int column0;

  PYEFF_DEVICE TicketStep step(int k) const { return TicketStep(p.side, line, k, p.depth, p.width); }

  PYEFF_DEVICE void operator()(char* stage, int i) const {
    const int k = i * kDepth<T>;
    char* values = stage + kRows * kRowBytes;
    if (p.whole) {
      by_chunks(stage, values, k + thread_index() % 8 * kChunk<T>);
    } else {
      by_numbers(stage, values, k + thread_index() % 8 * kChunk<T>);
    }
    if constexpr (Transposed) across(values, k);
  }

 private:
  // Chunk thread % 8 of every 32nd row.
  PYEFF_DEVICE void by_chunks(char* stage, char* values, int k) const {
    const TicketStep at = step(k);
    const int chunk = thread_index() % 8, left = at.left < kChunk<T> ? at.left : kChunk<T>;
    const T* from = static_cast<const T*>(p.rows) + at.at;
    PYEFF_UNROLL
    for (int i = 0; i < kRows / 32; ++i) {
      const int row = thread_index() / 8 + 32 * i;
      const bool there = token0 + row < p.tokens;
      copy_chunk<T>(stage + chunk_at(row, chunk), from + (there ? (token0 + row) * p.stride : 0), there ? left : 0,
                    p.rows_aligned);
    }
    if constexpr (!Transposed) {
      const T* block = static_cast<const T*>(p.values) + (at.slot * p.columns + column0) * p.depth + at.inner;
      PYEFF_UNROLL
      for (int i = 0; i < N / 32; ++i) {
        const int row = thread_index() / 8 + 32 * i;
        const bool there = column0 + row < p.columns && left > 0;
        copy_chunk<T>(values + chunk_at(row, chunk),
                      there ? block + int64_t{row} * p.depth : static_cast<const T*>(p.values), there ? left : 0,
                      p.values_aligned);
      }
    }
  }

  PYEFF_DEVICE void by_numbers(char* stage, char* values, int k) const {
    const int chunk = thread_index() % 8;
    PYEFF_NO_UNROLL
    for (int row = thread_index() / 8; row < kRows; row += 32) {
      gather_chunk<T>(stage + chunk_at(row, chunk), [&](int i) -> const T* {
        const TicketStep at = step(k + i);
        if (at.left <= 0 || token0 + row >= p.tokens) return nullptr;
        return static_cast<const T*>(p.rows) + (token0 + row) * p.stride + at.at;
      });
    }
    if constexpr (!Transposed) {
      PYEFF_NO_UNROLL
      for (int row = thread_index() / 8; row < N; row += 32) {
        gather_chunk<T>(values + chunk_at(row, chunk), [&](int i) -> const T* {
          const TicketStep at = step(k + i);
          if (at.left <= 0 || column0 + row >= p.columns) return nullptr;
          return static_cast<const T*>(p.values) + (at.slot * p.columns + column0 + row) * p.depth + at.inner;
        });
      }
    }
  }

  // Rows of the panels are along the depth.
  PYEFF_DEVICE void across(char* values, int k) const {
    constexpr int kAcross = N / kChunk<T>;
    PYEFF_UNROLL
    for (int i = 0; i < kDepth<T> * kAcross / kThreads; ++i) {
      const int item = thread_index() + i * kThreads, row = item / kAcross, chunk = item % kAcross;
      const TicketStep at = step(k + row);
      const int column = column0 + chunk * kChunk<T>, most = p.columns - column;
      const bool there = at.left > 0 && most > 0;
      copy_chunk<T>(values + chunk / 8 * (kDepth<T> * kRowBytes) + chunk_at(row, chunk % 8),
                    static_cast<const T*>(p.values) + (there ? (at.slot * p.depth + at.inner) * p.columns + column : 0),
                    there ? (most < kChunk<T> ? most : kChunk<T>) : 0, p.values_aligned);
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
  const auto each = [&](const auto& put) {
    PYEFF_UNROLL
    for (int i = 0; i < 2 * Tile::kMT; ++i) {
      PYEFF_UNROLL
      for (int j = 0; j < Tile::kNT; ++j) {
        const float* pair = sums[i / 2][j] + i % 2 * 2;
        put(m + i * 8 + lane() / 4, n + j * 8 + 2 * (lane() % 4), pair[0], pair[1]);
      }
    }
  };
  if constexpr (sizeof(T) == 2) {
    store_staged<T, Tile::kRows, N, kThreads>(p, token0, place.line, column0, shared_memory(), thread_index(), -1,
                                              each);
  } else {
    each([&](int row, int column, float low, float high) {
      store_product<T>(p, token0 + row, place.line, column0 + column, low, high);
    });
  }
}

}  // namespace pyeff::gpu
