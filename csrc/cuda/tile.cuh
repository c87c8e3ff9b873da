// A block's matrix product out of shared memory: D = A B^T for a tile of rows of A and rows of B, by the warps' matrix
// instructions for 16-bit numbers and by fused multiply-adds for float.
//
// Shared memory holds operands in panels: rows of 128 bytes, whose 16-byte chunks are permuted by the row's number, so
// that eight rows of one chunk lie in eight different bank groups. It is the 128-byte swizzle that wgmma reads, too.
//   Major::k    a row of the operand a panel row, kDepth<T> numbers along the depth of the product in it: one panel
//   Major::mn   a step of the depth a panel row, kDepth<T> rows of the operand in it: a panel for each such group
#pragma once

#include <type_traits>

#include "cuda/portable.cuh"

namespace pyeff::gpu {

enum class Major { k, mn };

constexpr int kRowBytes = 128;
// Numbers in a panel row; also the depth of one stage.
template <class T>
constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
// Numbers in a chunk.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

PYEFF_BOTH int chunk_at(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

// Which rows of B a warp's column tiles are: tile i begins at start + (i / per) * stride + (i % per) * 8. A recurrent
// cell has the same units of every gate in one warp, the gates `stride` apart.
struct Columns {
  int start, per, stride;
  PYEFF_DEVICE int operator()(int tile) const { return start + (tile / per) * stride + (tile % per) * 8; }
};

// Leaves fragments of B as they are.
struct AsIs {
  PYEFF_DEVICE void operator()(uint32_t (&)[2], int) const {}
};

namespace detail {

template <class T, Major M>
PYEFF_DEVICE void load_a(uint32_t (&r)[4], const char* tile, int row, int k) {
  const int i = lane();
  if constexpr (M == Major::k) {
    ldmatrix_x4(r, tile + chunk_at(row + (i & 15), k / 8 + (i >> 4)));
  } else {
    const int step = k + (i & 7) + ((i >> 4) << 3), at = row + (i & 8);
    ldmatrix_x4_trans(r, tile + (at / 64) * (kDepth<T> * kRowBytes) + chunk_at(step, (at % 64) / 8));
  }
}

// Two column tiles, at `row` and 8 further.
template <class T, Major M>
PYEFF_DEVICE void load_b(uint32_t (&low)[2], uint32_t (&high)[2], const char* tile, int row, int k) {
  const int i = lane();
  uint32_t r[4];
  if constexpr (M == Major::k) {
    ldmatrix_x4(r, tile + chunk_at(row + (i & 7) + ((i >> 4) << 3), k / 8 + ((i >> 3) & 1)));
  } else {
    const int step = k + (i & 15), at = row + ((i >> 4) << 3);
    ldmatrix_x4_trans(r, tile + (at / 64) * (kDepth<T> * kRowBytes) + chunk_at(step, (at % 64) / 8));
  }
  low[0] = r[0], low[1] = r[1], high[0] = r[2], high[1] = r[3];
}

// Four steps of the depth for one row of an operand of floats.
template <Major M>
PYEFF_DEVICE void load_four(float (&x)[4], const char* tile, int row, int k) {
  if constexpr (M == Major::k) {
    const Vec16 v = load_shared16(tile + chunk_at(row, k / 4));
    PYEFF_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = float_of(v.x[i]);
  } else {
    const char* panel = tile + (row / 32) * (kDepth<float> * kRowBytes);
    PYEFF_UNROLL
    for (int i = 0; i < 4; ++i)
      x[i] = load_shared(reinterpret_cast<const float*>(panel + chunk_at(k + i, (row % 32) / 4)) + row % 4);
  }
}

}  // namespace detail

// Adds one stage (kDepth<T> steps) to a warp's tile: rows [row, row + 16 MT) of A, column tiles `columns(0..NT)` of B.
// d is laid out as by mma.sync: lane l has, of each 16 x 8, rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
// `change(fragment, k)` may change a fragment of B whose first step is k; for float, the values of four steps.
template <class T, int MT, int NT, Major A, Major B, class Change = AsIs>
PYEFF_DEVICE void multiply(float (&d)[MT][NT][4], const char* a, int row, const char* b, const Columns& columns,
                           const Change& change = Change()) {
  if constexpr (std::is_same<T, float>::value) {
    // Unrolled, its loads would be moved ahead of the products until the registers are out.
    PYEFF_NO_UNROLL
    for (int k = 0; k < kDepth<float>; k += 4) {
      float x[2 * MT][4];
      PYEFF_UNROLL
      for (int m = 0; m < 2 * MT; ++m) detail::load_four<A>(x[m], a, row + m * 8 + lane() / 4, k);
      PYEFF_UNROLL
      for (int n = 0; n < NT; ++n) {
        PYEFF_UNROLL
        for (int e = 0; e < 2; ++e) {
          float y[4];
          detail::load_four<B>(y, b, columns(n) + 2 * (lane() % 4) + e, k);
          if constexpr (!std::is_same<Change, AsIs>::value) change(y, k);
          PYEFF_UNROLL
          for (int m = 0; m < 2 * MT; ++m) {
            float& sum = d[m / 2][n][(m % 2) * 2 + e];
            PYEFF_UNROLL
            for (int i = 0; i < 4; ++i) sum = fmaf(x[m][i], y[i], sum);
          }
        }
      }
    }
  } else {
    static_assert(NT % 2 == 0, "column tiles are loaded in pairs");
    PYEFF_UNROLL
    for (int k = 0; k < kDepth<T>; k += 16) {
      uint32_t x[MT][4], y[NT][2];
      PYEFF_UNROLL
      for (int m = 0; m < MT; ++m) detail::load_a<T, A>(x[m], a, row + 16 * m, k);
      PYEFF_UNROLL
      for (int n = 0; n < NT; n += 2) {
        detail::load_b<T, B>(y[n], y[n + 1], b, columns(n), k);
        change(y[n], k);
        change(y[n + 1], k);
      }
      mma_tile<T, MT, NT>(d, x, y);
    }
  }
}

template <int MT, int NT>
PYEFF_DEVICE void clear(float (&d)[MT][NT][4]) {
  PYEFF_UNROLL
  for (int m = 0; m < MT; ++m) {
    PYEFF_UNROLL
    for (int n = 0; n < NT; ++n) {
      PYEFF_UNROLL
      for (int e = 0; e < 4; ++e) d[m][n][e] = 0.0f;
    }
  }
}

}  // namespace pyeff::gpu
