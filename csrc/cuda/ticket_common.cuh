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

// A chunk of numbers, each from its own address; null stands for 0.
template <class T, class Address>
PYEFF_DEVICE void gather_chunk(char* shared, const Address& address) {
  float x[kChunk<T>];
  PYEFF_UNROLL
  for (int i = 0; i < kChunk<T>; ++i) {
    const T* from = address(i);
    x[i] = from ? to_float(load(from)) : 0.0f;
  }
  store_shared16(shared, detail::pack_chunk(x, T{}));
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
  return grad * (share + saved * 0.39894228040143268f * expf(-0.5f * saved * saved));
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
  bool rows_aligned, values_aligned;  // chunks lie within a block's line, at multiples of 16 bytes
  bool whole;                         // the depth of a block is a multiple of a chunk
  bool pairs;                         // neighbours of an output lie in one aligned word
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

// Two neighbouring outputs of a token, the first of them `column` of the line; or the first alone, where `most` is 1.
template <class T>
PYEFF_DEVICE void store_product(const TicketProductParams& p, int64_t token, int line, int column, float low,
                                float high, int most = 2) {
  const int at = line * p.columns + column;
  int count = p.columns - column < p.across - at ? p.columns - column : p.across - at;
  if (token >= p.tokens || count <= 0) return;
  if (count > most) count = most;
  const int64_t to = token * p.across + at;
  if (p.bias) {
    float bias[2];
    load_two(bias, static_cast<const T*>(p.bias) + at, count, p.pairs);
    low += bias[0], high += bias[1];
  }
  if (p.kept) store_two(static_cast<T*>(p.kept) + to, low, high, count, p.pairs);
  store_two(static_cast<T*>(p.to) + to, activated(low, p.activation), activated(high, p.activation), count, p.pairs);
}

// The same for a tile of 16-bit numbers, through shared memory that nobody uses any more: each thread has pairs, and
// the memory wants whole rows. `each` calls its argument with the row, the column and the two sums of every pair.
template <class T, int Rows, int N, int Threads, class Each>
PYEFF_DEVICE void store_staged(const TicketProductParams& p, int64_t token0, int line, int column0, char* staged,
                               int thread, int barrier_id, const Each& each) {
  // 16 bytes more than a row: eight rows of a column of pairs lie in different banks.
  constexpr int kPitch = N * 2 + 16, kChunks = N / 8;
  const int at0 = line * p.columns + column0;
  const int most = p.columns - column0 < p.across - at0 ? p.columns - column0 : p.across - at0;
  const auto meet = [&] {
    if (barrier_id < 0)
      barrier();
    else
      named_barrier(barrier_id, Threads);
  };
  PYEFF_NO_UNROLL
  for (int pass = p.kept ? 0 : 1; pass < 2; ++pass) {
    meet();
    each([&](int row, int column, float low, float high) {
      if (p.bias) {
        float bias[2];
        load_two(bias, static_cast<const T*>(p.bias) + at0 + column, most - column, p.pairs);
        low += bias[0], high += bias[1];
      }
      if (pass == 1) low = activated(low, p.activation), high = activated(high, p.activation);
      store_shared(reinterpret_cast<uint32_t*>(staged + row * kPitch + column * 2), pack2<T>(low, high));
    });
    meet();
    T* to = static_cast<T*>(pass == 0 ? p.kept : p.to) + at0;
    for (int i = thread; i < Rows * kChunks; i += Threads) {
      const int row = i / kChunks, column = i % kChunks * 8;
      if (token0 + row >= p.tokens || column >= most) continue;
      const char* from = staged + row * kPitch + column * 2;
      T* at = to + (token0 + row) * p.across + column;
      if (p.to_aligned && column + 8 <= most) {
        store16(at, load_shared16(from));
      } else {
        for (int j = 0; j < 8 && column + j < most; ++j)
          store(at + j, load_shared(reinterpret_cast<const T*>(from) + j));
      }
    }
  }
}

}  // namespace pyeff::gpu
