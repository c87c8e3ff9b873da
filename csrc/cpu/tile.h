// The register tile: MR rows by NV vectors of accumulators, the innermost piece of every product on the CPU.
//
// The left operand is broadcast, element by element, from MR row pointers or from a packed panel; the right operand is
// read as whole vectors from a packed panel [K][NV vectors]. An operand type says what one step of K is: one number, or
// a pair of bf16 numbers where the processor has a bf16 dot product.
#pragma once

#include "simd.h"

namespace pyeff {
namespace PYEFF_ISA {

template <class T>
struct PlainOperand {
  using Element = T;
  using Acc = T;
  static constexpr int kPack = 1;
  static PYEFF_INLINE Vec<T> load_vector(const Element* p) { return load(p); }
  static PYEFF_INLINE Vec<T> broadcast(const Element* p) { return splat<Vec<T>>(*p); }
  static PYEFF_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> acc) { return acc + a * b; }
};

#if defined(__AVX512BF16__)
struct PairOperand {
  using Element = uint32_t;  // two bf16, neighbours in K
  using Acc = float;
  static constexpr int kPack = 2;
  static PYEFF_INLINE __m512i load_vector(const Element* p) { return _mm512_loadu_si512(p); }
  static PYEFF_INLINE __m512i broadcast(const Element* p) {
    Element pair;  // a row of bf16 need not be aligned to pairs
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(int(pair));
  }
  static PYEFF_INLINE FloatV fma(__m512i a, __m512i b, FloatV acc) {
    return FloatV(_mm512_dpbf16_ps(__m512(acc), __m512bh(a), __m512bh(b)));
  }
};
#endif

template <class T>
struct OperandOf {
  using type = PlainOperand<Compute<T>>;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<bf16> {
  using type = PairOperand;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;

// Rows that fill the registers beside NV vectors: three quarters hold accumulators.
template <int NV>
constexpr int kTileRows = kVectorRegisters * 3 / 4 / NV;

// acc += A B over k steps, with A[i][p] = left(i, p) and B[p] = b + p * ldb. A function of its own, never inlined:
// inside a larger one the compiler would not keep the accumulators in registers.
template <class Op, int MR, int NV, class Left>
__attribute__((noinline)) void accumulate_tile(Vec<typename Op::Acc>* sums, Left left, const typename Op::Element* b,
                                               int64_t k, int64_t ldb) {
  constexpr int lanes = kLanes<typename Op::Acc>;
  Vec<typename Op::Acc> acc[MR][NV];
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = sums[i * NV + j];
#pragma GCC unroll 1
  for (int64_t p = 0; p < k; ++p, b += ldb) {
    decltype(Op::load_vector(b)) right[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) right[j] = Op::load_vector(b + j * lanes);
    __builtin_prefetch(b + 8 * ldb);
#pragma GCC unroll 32
    for (int i = 0; i < MR; ++i) {
      auto one = Op::broadcast(left(i, p));
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = Op::fma(one, right[j], acc[i][j]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) sums[i * NV + j] = acc[i][j];
}

// A left operand by row pointers: A[i][p] = row[i][p].
template <class Element, int MR>
struct LeftRows {
  const Element* row[MR];
  PYEFF_INLINE const Element* operator()(int i, int64_t p) const { return row[i] + p; }
};

// A left operand packed as [k][MR].
template <class Element, int MR>
struct LeftPanel {
  const Element* panel;
  PYEFF_INLINE const Element* operator()(int i, int64_t p) const { return panel + p * MR + i; }
};

template <class Op, int MR, int NV>
struct Tile {
  using Element = typename Op::Element;
  using V = Vec<typename Op::Acc>;
  static constexpr int kWidth = NV * kLanes<typename Op::Acc>;

  V acc[MR][NV];

  PYEFF_INLINE void zero() {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) acc[i][j] = V{};
  }
  PYEFF_INLINE void multiply(const LeftRows<Element, MR>& rows, const Element* b, int64_t k, int64_t ldb = kWidth) {
    accumulate_tile<Op, MR, NV>(&acc[0][0], rows, b, k, ldb);
  }
  PYEFF_INLINE void multiply(const LeftPanel<Element, MR>& panel, const Element* b, int64_t k, int64_t ldb = kWidth) {
    accumulate_tile<Op, MR, NV>(&acc[0][0], panel, b, k, ldb);
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
