// Prologues: operands rearranged into the order in which the register tile reads them, converted and scaled on the way.
//
// A right panel is [K / pack][width] and a left panel [K / pack][rows], where pack is 2 for pairs of bf16 and 1
// otherwise. What an odd K lacks is zero. Lanes past the last column hold anything: their products are never stored.
#pragma once

#include <type_traits>

#include "tile.h"

namespace pyeff {
namespace PYEFF_ISA {

template <class Op>
constexpr int64_t steps(int64_t k) {
  return (k + Op::kPack - 1) / Op::kPack;
}

PYEFF_INLINE uint32_t pair_bits(bf16 low, bf16 high) { return uint32_t(low.bits) | uint32_t(high.bits) << 16; }

// One vector's worth of operand elements of a row, from element `p` of K on, times scale; zero past the end.
template <class T>
PYEFF_INLINE Vec<typename Operand<T>::Acc> load_elements(const T* row, int64_t p, int64_t k, const T* scale) {
  using C = Compute<T>;
  constexpr int lanes = kLanes<C>;
  if constexpr (Operand<T>::kPack == 1) {
    const Vec<C> v = load_first(row + p, k - p);
    return scale ? v * load_first(scale + p, k - p) : v;
  } else {
    T pairs[2 * lanes];
    const int64_t at = 2 * p, left = k - at;
    for (int half = 0; half < 2 * lanes; half += lanes) {
      Vec<C> v = left > half ? load_first(row + at + half, left - half) : Vec<C>{};
      if (scale && left > half) v *= load_first(scale + at + half, left - half);
      store(pairs + half, v);
    }
    Vec<C> bits;
    __builtin_memcpy(&bits, pairs, sizeof bits);
    return bits;
  }
}

// Lane l of the result is lane from[l] of the two vectors behind each other.
template <class T>
PYEFF_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, typename VectorOf<T>::Int from) {
#if defined(__clang__)
  Vec<T> to;
  for (int l = 0; l < kLanes<T>; ++l) to[l] = from[l] < kLanes<T> ? a[from[l]] : b[from[l] - kLanes<T>];
  return to;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Transposes a square of vectors: each stage interleaves the first half of the rows with the second.
template <class T>
PYEFF_INLINE void transpose(Vec<T>* rows) {
  using V = Vec<T>;
  using Int = typename VectorOf<T>::Int;
  constexpr int lanes = kLanes<T>;
  Int low, high;
  for (int l = 0; l < lanes; ++l) {
    low[l] = l / 2 + (l % 2) * lanes;
    high[l] = low[l] + lanes / 2;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < lanes; stage *= 2) {
    V next[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = shuffle<T>(rows[i], rows[i + lanes / 2], low);
      next[2 * i + 1] = shuffle<T>(rows[i], rows[i + lanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

// One vector of columns from `count` rows of a row-major [n, k] matrix: panel[p][lane] = source[lane][p] * scale[p].
template <class T>
void pack_columns_nk(typename Operand<T>::Element* panel, int64_t width, const T* source, int64_t row_stride,
                     int64_t count, int64_t k, const T* scale) {
  using C = typename Operand<T>::Acc;
  constexpr int lanes = kLanes<C>;
  const int64_t total = steps<Operand<T>>(k);
  for (int64_t p = 0; p < total; p += lanes) {
    Vec<C> square[lanes];
#pragma GCC unroll 16
    for (int lane = 0; lane < lanes; ++lane)
      square[lane] = lane < count ? load_elements(source + lane * row_stride, p, k, scale) : Vec<C>{};
    transpose<C>(square);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (p + i < total) __builtin_memcpy(panel + (p + i) * width, &square[i], sizeof square[i]);
  }
}

// Up to `lanes` neighbours of one row as a vector of the compute type C; zero past `count`. The stride is in elements.
template <class P, class C = Compute<P>>
PYEFF_INLINE Vec<C> load_strided(const P* p, int64_t stride, int64_t count) {
  constexpr int lanes = kLanes<C>;
  if constexpr (std::is_same_v<C, Compute<P>>) {
    if (stride == 1) return load_first(p, count);
  }
  C lane[lanes];
  for (int l = 0; l < lanes; ++l) lane[l] = l < count ? C(widen(p[l * stride])) : C(0);
  return load(lane);
}

// One row of a left operand: (row[i] - shift) * scale for the k numbers of a stored row, in the operand's type.
template <class T, class P>
PYEFF_INLINE void pack_row(typename Operand<T>::Element* out, const P* row, int64_t stride, int64_t k, Compute<T> shift,
                           Compute<T> scale) {
  using C = Compute<T>;
  using D = std::conditional_t<Operand<T>::kPack == 2, T, C>;  // pairs of neighbours are neighbours in memory
  constexpr int lanes = kLanes<C>;
  D* to = reinterpret_cast<D*>(out);
  for (int64_t i = 0; i < k; i += lanes)
    store_first(to + i, (load_strided<P, C>(row + i * stride, stride, k - i) - shift) * scale, k - i);
  if (k % Operand<T>::kPack) to[k] = D{};
}

// One vector of columns of a matrix given by its rows, k of them: panel[p][lane] = (row(p)[lane] - shift[p]) *
// scale[p]. `row(p)` returns a pointer to the first of `count` elements; shift and scale may be null.
template <class T, class P, class Row>
PYEFF_INLINE void pack_columns_kn(typename Operand<T>::Element* panel, int64_t width, const Row& row, int64_t stride,
                                  int64_t count, int64_t k, const Compute<T>* shift, const Compute<T>* scale) {
  using Op = Operand<T>;
  using V = Vec<Compute<T>>;
  auto value = [&](int64_t p) -> V {
    V v = load_strided<P>(row(p), stride, count);
    if (shift) v -= shift[p];
    return scale ? v * scale[p] : v;
  };
  if constexpr (Op::kPack == 1) {
    for (int64_t p = 0; p < k; ++p) store(panel + p * width, value(p));
  } else {
    for (int64_t p = 0; p < k; p += 2) {
      UInt32V low = rounded_bits(value(p));
      UInt32V high = p + 1 < k ? rounded_bits(value(p + 1)) : UInt32V{};
      UInt32V pair = low | high << 16;
      __builtin_memcpy(panel + p / 2 * width, &pair, sizeof pair);
    }
  }
}

// A left panel of `count` <= MR columns of a matrix given by its rows, k of them: panel[p][i] = row(p)[i]; zero past
// count.
template <class T, int MR, class Row>
PYEFF_INLINE void pack_left_kn(typename Operand<T>::Element* panel, const Row& row, int64_t count, int64_t k) {
  using Op = Operand<T>;
  using Element = typename Op::Element;
  const int64_t total = steps<Op>(k);
  for (int64_t p = 0; p < total; ++p, panel += MR) {
    const auto* first = row(Op::kPack * p);
    if constexpr (Op::kPack == 1) {
      if (count == MR) {
        for (int i = 0; i < MR; ++i) panel[i] = Element(widen(first[i]));
      } else {
        for (int i = 0; i < MR; ++i) panel[i] = i < count ? Element(widen(first[i])) : Element(0);
      }
    } else {
      const T* second = 2 * p + 1 < k ? row(2 * p + 1) : nullptr;
      for (int i = 0; i < MR; ++i) panel[i] = i < count ? pair_bits(first[i], second ? second[i] : T{}) : Element(0);
    }
  }
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
