// What the ticket's kernels share: the index seen from one side, the depth of a line of blocks, activations.
#pragma once

#include <cmath>

#include "cuda/common.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/ticket.h"

namespace pyeff::gpu {

// The blocks line by line: the rows of blocks for the forward, the columns for the gradient of x.
struct TicketSide {
  const int32_t *start, *other, *slot, *order;  // slot null: blocks are stored in this very order
  int64_t blocks;
  int lines, others;
};

// The blocks of one line: entries [first, first + count) of `other` and `slot`.
struct TicketLine {
  int64_t first = 0;
  int count = 0;

  TicketLine() = default;

  // Whatever the index holds, the entries are there, and no more than a line can have.
  PYEFF_DEVICE TicketLine(const TicketSide& side, int line) {
    int64_t begin = load(side.start + line), end = load(side.start + line + 1);
    if (begin < 0) begin = 0;
    if (end > side.blocks) end = side.blocks;
    if (end - begin > side.others) end = begin + side.others;
    if (end > begin) first = begin, count = static_cast<int>(end - begin);
  }
};

// The line that is `rank`-th in the order of work, or -1.
PYEFF_DEVICE int line_at(const TicketSide& side, int rank) {
  const int line = load(side.order + rank);
  return line >= 0 && line < side.lines ? line : -1;
}

// A step of a line's depth, which runs over its blocks one behind the other.
struct TicketStep {
  int64_t slot = 0;  // where the block is stored
  int inner = 0;     // the step in it
  int at = 0;        // the same in the matrix that the line is multiplied with
  int left = 0;      // steps from here to that matrix's end; not positive where there is nothing

  // `depth`: of a block; `width`: of that matrix.
  PYEFF_DEVICE TicketStep(const TicketSide& side, const TicketLine& line, int step, int depth, int width) {
    const int entry = step / depth;
    if (entry >= line.count) return;
    const int other = load(side.other + line.first + entry);
    slot = side.slot ? load(side.slot + line.first + entry) : line.first + entry;
    inner = step - entry * depth;
    if (other < 0 || other >= side.others || slot < 0 || slot >= side.blocks) return;
    at = other * depth + inner;
    left = width - at;
  }
};

// A chunk of numbers, each from its own address; null stands for 0. For what is odd: slow, but small.
template <class T, class Address>
PYEFF_DEVICE void gather_chunk(char* shared, const Address& address) {
  PYEFF_NO_UNROLL
  for (int i = 0; i < kChunk<T>; ++i) {
    const T* from = address(i);
    store_shared(reinterpret_cast<T*>(shared) + i, from ? load(from) : T{});
  }
}

// The numbers of a chunk.
template <class T>
PYEFF_DEVICE void unpack_chunk(float (&x)[kChunk<T>], const Vec16& v) {
  PYEFF_UNROLL
  for (int i = 0; i < kChunk<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = float_of(v.x[i]);
    } else {
      x[i] = i % 2 ? high_of<T>(v.x[i / 2]) : low_of<T>(v.x[i / 2]);
    }
  }
}

PYEFF_DEVICE float activated(float z, TicketActivation activation) {
  // Written so that NaN stays NaN.
  if (activation == TicketActivation::relu) return z <= 0.0f ? 0.0f : z;
  if (activation == TicketActivation::gelu) return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
  return z;
}

// grad times the activation's derivative; `saved` is the output for relu, and for gelu what it was taken of.
PYEFF_DEVICE float activation_gradient(float grad, float saved, TicketActivation activation) {
  if (activation == TicketActivation::relu) return saved <= 0.0f ? 0.0f : grad;
  const float share = 0.5f * (1.0f + erff(saved * 0.70710678118654752f));
  const float density = 0.39894228040143268f * expf(-0.5f * saved * saved);
  // Infinity, which float16 makes of large numbers, times a density of zero would be NaN.
  return grad * (density == 0.0f ? share : share + saved * density);
}

// A tile of the product: what every kernel of it is given.
struct TicketProductParams {
  const void* rows;  // [tokens, width], `stride` apart: x, or the gradient
  const void *values, *bias;
  void *to, *kept;  // [tokens, across]; kept: before the activation, or null
  TicketSide side;
  int64_t stride, tokens;
  int width, across;
  int depth, columns;  // of a block: along the sum, and across
  int parts;           // tiles, or warps' shares, of a line
  int group;           // token tiles that are handed out together
  TicketActivation activation;
  bool rows_aligned, values_aligned;  // chunks lie within a block, at multiples of 16 bytes
  bool to_aligned;                    // chunks of the outputs that begin with a line lie at multiples of 16 bytes
};

// Which tile a block computes. The tokens of a group stay in the cache while all lines pass, the fullest first.
struct TicketPlace {
  int64_t tile;
  int line, part;

  PYEFF_DEVICE TicketPlace(const TicketProductParams& p, int rows) {
    const int64_t tiles = div_up(p.tokens, int64_t{rows}), units = int64_t{p.side.lines} * p.parts;
    const int64_t first = block_index_x() / (p.group * units) * p.group, rest = block_index_x() - first * units;
    const int64_t of_group = tiles - first < p.group ? tiles - first : p.group;
    const int unit = static_cast<int>(rest / of_group);
    tile = first + rest % of_group;
    line = line_at(p.side, unit / p.parts);
    part = unit % p.parts;
  }
};

// One output of a token, in `column` of the line.
template <class T>
PYEFF_DEVICE void store_product(const TicketProductParams& p, int64_t token, int line, int column, float sum) {
  const int at = line * p.columns + column;
  if (column >= p.columns || at >= p.across) return;
  if (p.bias) sum += to_float(load(static_cast<const T*>(p.bias) + at));
  if (p.kept) store(static_cast<T*>(p.kept) + token * p.across + at, from_float<T>(sum));
  store(static_cast<T*>(p.to) + token * p.across + at, from_float<T>(activated(sum, p.activation)));
}

// The sums of a tile in shared memory that nobody uses any more: each thread has pairs of them, and the memory wants
// whole rows.
template <int N>
struct TicketStaged {
  // Eight rows of a column of pairs lie in different banks, four at a time.
  static constexpr int kPitch = N + 8;
  static constexpr int bytes(int rows) { return rows * kPitch * static_cast<int>(sizeof(float)); }
  float* data;

  PYEFF_DEVICE void put(int row, int column, float low, float high) const {
    store_shared(data + row * kPitch + column, low);
    store_shared(data + row * kPitch + column + 1, high);
  }

  // By `threads` threads, after a barrier: bias and activation, a chunk of outputs at a time.
  template <class T>
  PYEFF_DEVICE void store(const TicketProductParams& p, int rows, int64_t token0, int line, int column0, int thread,
                          int threads) const {
    constexpr int kChunks = N / kChunk<T>;
    const int at0 = line * p.columns + column0;
    const int most = p.columns - column0 < p.across - at0 ? p.columns - column0 : p.across - at0;
    PYEFF_NO_UNROLL
    for (int i = thread; i < rows * kChunks; i += threads) {
      const int row = i / kChunks, column = i % kChunks * kChunk<T>, left = most - column;
      if (token0 + row >= p.tokens || left <= 0) continue;
      float z[kChunk<T>], y[kChunk<T>];
      const T* bias = static_cast<const T*>(p.bias) + at0 + column;
      PYEFF_UNROLL
      for (int j = 0; j < kChunk<T>; j += 4) {
        const Vec16 four = load_shared16(data + row * kPitch + column + j);
        PYEFF_UNROLL
        for (int e = 0; e < 4; ++e) {
          z[j + e] = float_of(four.x[e]);
          if (p.bias && j + e < left) z[j + e] += to_float(load(bias + j + e));
          y[j + e] = activated(z[j + e], p.activation);
        }
      }
      const int64_t to = (token0 + row) * p.across + at0 + column;
      if (p.kept) store_chunk(static_cast<T*>(p.kept) + to, z, left, p.to_aligned);
      store_chunk(static_cast<T*>(p.to) + to, y, left, p.to_aligned);
    }
  }

 private:
  template <class T>
  PYEFF_DEVICE static void store_chunk(T* to, const float (&x)[kChunk<T>], int count, bool aligned) {
    if (aligned && count >= kChunk<T>) {
      store16(to, detail::pack_chunk(x, T{}));
    } else {
      PYEFF_UNROLL
      for (int j = 0; j < kChunk<T>; ++j)
        if (j < count) gpu::store(to + j, from_float<T>(x[j]));
    }
  }
};

}  // namespace pyeff::gpu
