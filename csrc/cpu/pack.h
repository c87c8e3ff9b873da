// Prologues: operands rearranged into the order in which the register tile reads them, converted and scaled on the way.
//
// A right panel is [K / pack][width] and a left panel [K / pack][rows], where pack is 2 for pairs of bf16 and 1 otherwise.
// What an odd K lacks is zero. Lanes past the last column hold anything: their products are never stored.
#pragma once

#include "tile.h"

namespace pyeff {
namespace PYEFF_ISA {

template <class Op>
constexpr int64_t steps(int64_t k) {
  return (k + Op::kPack - 1) / Op::kPack;
}

PYEFF_INLINE uint32_t pair_bits(bf16 low, bf16 high) { return uint32_t(low.bits) | uint32_t(high.bits) << 16; }

// One number as an operand element holds it.
template <class T>
PYEFF_INLINE T scaled(T x, const T* scale, int64_t i) {
  return scale ? narrow<T>(widen(x) * widen(scale[i])) : x;
}

// One vector of columns from `count` rows of a row-major [n, k] matrix: panel[p][lane] = source[lane][p] * scale[p].
template <class T>
void pack_columns_nk(typename Operand<T>::Element* panel, int64_t width, const T* source, int64_t row_stride,
                     int64_t count, int64_t k, const T* scale) {
  using Op = Operand<T>;
  using Element = typename Op::Element;
  constexpr int lanes = kLanes<typename Op::Acc>;
  constexpr int64_t block = 16;  // lines of the panel that stay in the first cache while its lanes are filled
  const int64_t total = steps<Op>(k);
  for (int64_t p0 = 0; p0 < total; p0 += block) {
    const int64_t p1 = p0 + block < total ? p0 + block : total;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      Element* out = panel + lane;
      if (lane >= count) {
        for (int64_t p = p0; p < p1; ++p) out[p * width] = Element{};
        continue;
      }
      const T* row = source + lane * row_stride;
      for (int64_t p = p0; p < p1; ++p) {
        if constexpr (Op::kPack == 1) {
          out[p * width] = Element(widen(scaled(row[p], scale, p)));
        } else {
          const int64_t i = 2 * p;
          out[p * width] = pair_bits(scaled(row[i], scale, i), i + 1 < k ? scaled(row[i + 1], scale, i + 1) : T{});
        }
      }
    }
  }
}

// Up to `lanes` neighbours of one row as a vector of the compute type; zero past `count`. The stride is in elements.
template <class P>
PYEFF_INLINE Vec<Compute<P>> load_strided(const P* p, int64_t stride, int64_t count) {
  constexpr int lanes = kLanes<Compute<P>>;
  if (stride == 1) return load_first(p, count);
  Compute<P> lane[lanes];
  for (int l = 0; l < lanes; ++l) lane[l] = l < count ? widen(p[l * stride]) : Compute<P>(0);
  return load(lane);
}

// bf16 bits of a float vector, one in each 32-bit lane.
PYEFF_INLINE UInt32V rounded_bits(FloatV v) {
  UInt32V u = bit_cast<UInt32V>(v);
  UInt32V rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return v != v ? (u >> 16) | 0x40 : rounded;
}

// One vector of columns of a matrix given by its rows, k of them: panel[p][lane] = (row(p)[lane] - shift[p]) * scale[p].
// `row(p)` returns a pointer to the first of `count` elements; shift and scale may be null.
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

// A left panel of `count` <= MR columns of a matrix given by its rows, k of them: panel[p][i] = row(p)[i]; zero past count.
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
      for (int i = 0; i < MR; ++i)
        panel[i] = i < count ? pair_bits(first[i], second ? second[i] : T{}) : Element(0);
    }
  }
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
