// The gradient of the values: for each living block the product over all tokens of the gradient's columns under its row
// with x's under its column. A tile takes the blocks of a row side by side, so that they share the gradient, and no
// work is done for what is not there. Split over the tokens at fixed bounds; the parts are added in order afterwards.
#pragma once

#include "cuda/ticket_common.cuh"

namespace pyeff::gpu {

struct TicketOuterParams {
  const void *grad, *x;  // [tokens, out] and [tokens, width]: the gradient before the activation, and x
  void* to;              // [blocks, block_out, block_in] of T where there is one part
  float* partial;        // [splits, blocks, block_out, block_in] where there are more
  TicketSide side;       // rows of blocks
  int64_t grad_stride, x_stride, tokens;
  int out, width, block_out, block_in;
  int parts, tiles;  // tiles down a block, and side by side in a row of blocks, as many as it might have
  int splits;
  bool grad_aligned, x_aligned;  // chunks lie within a block, at multiples of 16 bytes
  bool pairs;
};

template <class T, int Rows>
struct TicketOuterTile {
  static constexpr int kRows = Rows, kColumns = 128, kMT = Rows / 32, kNT = 4, kStages = 3;
  // Whole panels.
  static constexpr int kPanel = kDepth<T> * kRowBytes;
  static constexpr int kStage = (kRows + kColumns) * kRowBytes;
  static constexpr int kShared = kStages * kStage;
  static_assert(Rows % kDepth<T> == 0, "");
};

// Which part of which row of blocks a block computes.
struct TicketOuterPlace {
  int line, row0, column0;
  int64_t begin, end;  // stages of tokens

  PYEFF_DEVICE TicketOuterPlace(const TicketOuterParams& p, int rows, int columns, int depth) {
    const int unit = block_index_x() / p.tiles;
    column0 = block_index_x() % p.tiles * columns;
    line = line_at(p.side, unit / p.parts);
    row0 = unit % p.parts * rows;
    const int64_t steps = div_up(p.tokens, int64_t{depth});
    begin = steps * block_index_y() / p.splits, end = steps * (block_index_y() + 1) / p.splits;
  }
};

// One stage: Rows columns of the gradient, and Columns of x under the row's blocks, each for kDepth<T> tokens.
template <class T, int Rows, int Columns>
struct TicketOuterCopy {
  static constexpr int kPanel = kDepth<T> * kRowBytes;
  const TicketOuterParams& p;
  const TicketLine& line;
  const TicketOuterPlace& place;

  PYEFF_DEVICE void operator()(char* stage, int i) const {
    const int64_t token0 = (place.begin + i) * kDepth<T>;
    copy_grad(stage, token0);
    char* right = stage + Rows * kRowBytes;
    constexpr int kAcross = Columns / kChunk<T>, kStep = kThreads / kAcross;
    const int chunk = thread_index() % kAcross, k = place.column0 + chunk * kChunk<T>;
    char* panel = right + chunk / 8 * kPanel;
    const T* x = static_cast<const T*>(p.x);
    const TicketStep at(p.side, line, k, p.block_in, p.width);
    if (p.x_aligned && (at.left <= 0 || at.left >= kChunk<T>)) {
      PYEFF_UNROLL
      for (int j = 0; j < kDepth<T> / kStep; ++j) {
        const int row = thread_index() / kAcross + j * kStep;
        const bool there = token0 + row < p.tokens && at.left > 0;
        copy_async16(panel + chunk_at(row, chunk % 8), there ? x + (token0 + row) * p.x_stride + at.at : x, there);
      }
    } else {
      PYEFF_NO_UNROLL
      for (int row = thread_index() / kAcross; row < kDepth<T>; row += kStep) {
        gather_chunk<T>(panel + chunk_at(row, chunk % 8), [&](int j) -> const T* {
          const TicketStep one(p.side, line, k + j, p.block_in, p.width);
          return one.left > 0 && token0 + row < p.tokens ? x + (token0 + row) * p.x_stride + one.at : nullptr;
        });
      }
    }
  }

 private:
  PYEFF_DEVICE void copy_grad(char* stage, int64_t token0) const {
    constexpr int kAcross = Rows / kChunk<T>, kStep = kThreads / kAcross;
    const int chunk = thread_index() % kAcross, inner = place.row0 + chunk * kChunk<T>;
    const int at = place.line * p.block_out + inner;
    const int left = p.block_out - inner < p.out - at ? p.block_out - inner : p.out - at;
    char* panel = stage + chunk / 8 * kPanel;
    const T* grad = static_cast<const T*>(p.grad);
    if (p.grad_aligned && (left <= 0 || left >= kChunk<T>)) {
      PYEFF_UNROLL
      for (int j = 0; j < kDepth<T> / kStep; ++j) {
        const int row = thread_index() / kAcross + j * kStep;
        const bool there = token0 + row < p.tokens && left > 0;
        copy_async16(panel + chunk_at(row, chunk % 8), there ? grad + (token0 + row) * p.grad_stride + at : grad,
                     there);
      }
    } else {
      PYEFF_NO_UNROLL
      for (int row = thread_index() / kAcross; row < kDepth<T>; row += kStep) {
        gather_chunk<T>(panel + chunk_at(row, chunk % 8), [&](int j) {
          return j < left && token0 + row < p.tokens ? grad + (token0 + row) * p.grad_stride + at + j : nullptr;
        });
      }
    }
  }
};

// Two neighbouring sums, `row` of the block and the first of them `column` of those side by side.
template <class T>
PYEFF_DEVICE void store_outer(const TicketOuterParams& p, const TicketLine& line, const TicketOuterPlace& place,
                              int row, int column, const float* sums) {
  if (row >= p.block_out) return;
  PYEFF_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int entry = (column + e) / p.block_in, inner = (column + e) - entry * p.block_in;
    if (entry >= line.count) return;
    const int64_t at = ((line.first + entry) * p.block_out + row) * p.block_in + inner;
    // What lies past the end of the weight, and a block whose place is out of range, has no gradient.
    float pair[2];
    PYEFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const bool inside = TicketStep(p.side, line, column + e + i, p.block_in, p.width).left > 0 &&
                          place.line * p.block_out + row < p.out;
      pair[i] = inside && e + i < 2 ? sums[e + i] : 0.0f;
    }
    const bool both = p.pairs && e == 0;
    if (p.splits > 1) {
      float* to = p.partial + block_index_y() * (p.side.blocks * p.block_out * p.block_in) + at;
      store(to, pair[0]);
      if (both) store(to + 1, pair[1]);
    } else {
      store_two(static_cast<T*>(p.to) + at, pair[0], pair[1], both ? 2 : 1, both);
    }
    if (both) return;
  }
}

template <class T, int Rows>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) ticket_outer(const PYEFF_GRID_CONSTANT TicketOuterParams p) {
  using Tile = TicketOuterTile<T, Rows>;
  const TicketOuterPlace place(p, Tile::kRows, Tile::kColumns, kDepth<T>);
  if (place.line < 0) return;
  const TicketLine line(p.side, place.line);
  if (place.column0 >= line.count * p.block_in) return;
  const int m = warp() % 2 * (Tile::kMT * 16), n = warp() / 2 * (Tile::kNT * 8);
  float sums[Tile::kMT][Tile::kNT][4];
  clear(sums);
  run_pipeline<Tile::kStages>(static_cast<int>(place.end - place.begin), Tile::kStage,
                              TicketOuterCopy<T, Rows, Tile::kColumns>{p, line, place}, [&](const char* stage, int) {
                                multiply<T, Tile::kMT, Tile::kNT, Major::mn, Major::mn>(
                                    sums, stage, m, stage + Tile::kRows * kRowBytes, Columns{n, Tile::kNT, 0});
                              });
  PYEFF_UNROLL
  for (int i = 0; i < 2 * Tile::kMT; ++i) {
    PYEFF_UNROLL
    for (int j = 0; j < Tile::kNT; ++j) {
      store_outer<T>(p, line, place, place.row0 + m + i * 8 + lane() / 4, place.column0 + n + j * 8 + 2 * (lane() % 4),
                     sums[i / 2][j] + i % 2 * 2);
    }
  }
}

struct TicketSumParams {
  const float* partial;  // [splits, count]
  void* to;              // [count] of T
  int64_t count;
  int splits;
};

// The parts in order.
template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) ticket_sum(const PYEFF_GRID_CONSTANT TicketSumParams p) {
  for (int64_t i = int64_t{block_index_x()} * kThreads + thread_index(); i < p.count;
       i += int64_t{grid_size_x()} * kThreads) {
    float sum = 0.0f;
    for (int split = 0; split < p.splits; ++split) sum += load(p.partial + split * p.count + i);
    store(static_cast<T*>(p.to) + i, from_float<T>(sum));
  }
}

struct TicketGradientParams {
  const void *grad, *saved;  // [tokens, out]; grad's rows `stride` apart
  void* to;                  // [tokens, to_stride] of T: grad times the activation's derivative; or null
  float* partial;            // [splits, out]: its sums over tokens; or null
  int64_t stride, to_stride, tokens, out;
  int splits;
  TicketActivation activation;
  bool pairs;
};

// Columns that a block has, two a lane.
constexpr int kGradientColumns = 2 * kWarp;
constexpr int kGradientShared = kThreads / kWarp * kGradientColumns * static_cast<int>(sizeof(float));

// The gradient before the activation, and its sums over tokens: a warp for every eighth token of the part.
template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) ticket_gradient(const PYEFF_GRID_CONSTANT TicketGradientParams p) {
  constexpr int kWarps = kThreads / kWarp;
  const int64_t column = int64_t{block_index_x()} * kGradientColumns + 2 * lane();
  const int64_t begin = p.tokens * block_index_y() / p.splits, end = p.tokens * (block_index_y() + 1) / p.splits;
  const int count = column + 1 < p.out ? 2 : column < p.out ? 1 : 0;
  float sums[2] = {0.0f, 0.0f};
  // All loads of a step come before its stores: a lane alone waits for each of its few bytes as long as for many.
  constexpr int kAtOnce = 8;
  for (int64_t first = begin + warp(); first < end && count > 0; first += kAtOnce * kWarps) {
    float g[kAtOnce][2] = {}, saved[kAtOnce][2] = {};
    PYEFF_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t token = first + i * kWarps;
      if (token >= end) continue;
      load_two(g[i], static_cast<const T*>(p.grad) + token * p.stride + column, count, p.pairs);
      if (p.activation != TicketActivation::none)
        load_two(saved[i], static_cast<const T*>(p.saved) + token * p.out + column, count, p.pairs);
    }
    PYEFF_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t token = first + i * kWarps;
      if (token >= end) continue;
      if (p.activation != TicketActivation::none) {
        PYEFF_UNROLL
        for (int j = 0; j < 2; ++j) g[i][j] = activation_gradient(g[i][j], saved[i][j], p.activation);
      }
      if (p.to) store_two(static_cast<T*>(p.to) + token * p.to_stride + column, g[i][0], g[i][1], count, p.pairs);
      sums[0] += g[i][0], sums[1] += g[i][1];
    }
  }
  if (!p.partial) return;
  float* shared = reinterpret_cast<float*>(shared_memory());
  PYEFF_UNROLL
  for (int i = 0; i < 2; ++i) store_shared(shared + warp() * kGradientColumns + 2 * lane() + i, sums[i]);
  barrier();
  const int64_t mine = int64_t{block_index_x()} * kGradientColumns + thread_index();
  if (thread_index() >= kGradientColumns || mine >= p.out) return;
  float sum = 0.0f;
  for (int i = 0; i < kWarps; ++i) sum += load_shared(shared + i * kGradientColumns + thread_index());
  store(p.partial + block_index_y() * p.out + mine, sum);
}

}  // namespace pyeff::gpu
