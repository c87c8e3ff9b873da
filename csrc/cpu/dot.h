// Products of few rows with a matrix that is read in place: both operands lie along K, so nothing is packed, and each
// sum is a whole vector until the end. It is what a matrix deserves that is used once.
#pragma once

#include "simd.h"

namespace pyeff {
namespace PYEFF_ISA {

// One vector of K: its length, and the multiply-add into sums of the compute type.
template <class T>
struct DotStep {
  static constexpr int kLength = kLanes<Compute<T>>;
  static PYEFF_INLINE Vec<Compute<T>> load_vector(const T* p) { return load(p); }
  static PYEFF_INLINE Vec<Compute<T>> fma(Vec<Compute<T>> a, Vec<Compute<T>> b, Vec<Compute<T>> acc) {
    return acc + a * b;
  }
};
#if defined(__AVX512BF16__)
template <>
struct DotStep<bf16> {
  static constexpr int kLength = 32;
  static PYEFF_INLINE __m512i load_vector(const bf16* p) { return _mm512_loadu_si512(p); }
  static PYEFF_INLINE FloatV fma(__m512i a, __m512i b, FloatV acc) {
    return FloatV(_mm512_dpbf16_ps(__m512(acc), __m512bh(a), __m512bh(b)));
  }
};
#endif

// out[j] = left[i] . right[j] for MR rows on the left, whose padding up to a multiple of the step is zero, and NR rows
// on the right, `stride` apart, which end at k. The results of row i start at out[i].
template <class T, int MR, int NR>
__attribute__((noinline)) void dot_tile(const T* const* left, const T* right, int64_t stride, int64_t k,
                                        Compute<T>* const* out) {
  using Step = DotStep<T>;
  Vec<Compute<T>> acc[MR][NR] = {};
  const int64_t whole = k / Step::kLength * Step::kLength;
  for (int64_t p = 0; p < whole; p += Step::kLength) {
    decltype(Step::load_vector(right)) row[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) row[j] = Step::load_vector(right + j * stride + p);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      auto one = Step::load_vector(left[i] + p);
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) acc[i][j] = Step::fma(one, row[j], acc[i][j]);
    }
  }
  if (whole < k) {
    T tail[NR][Step::kLength] = {};
    for (int j = 0; j < NR; ++j) __builtin_memcpy(tail[j], right + j * stride + whole, size_t(k - whole) * sizeof(T));
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j)
        acc[i][j] = Step::fma(Step::load_vector(left[i] + whole), Step::load_vector(tail[j]), acc[i][j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) out[i][j] = sum_lanes<Compute<T>>(acc[i][j]);
}

// out[i][j] = left[i] . (right + j * stride) for m rows on the left and n on the right. `pointers` has room for m.
template <class T>
void dot_rows(const T* const* left, int64_t m, const T* right, int64_t stride, int64_t n, int64_t k,
              Compute<T>* const* out, Compute<T>** pointers) {
  constexpr int NR = kVectorRegisters >= 32 ? 6 : 4, MR = kVectorRegisters * 3 / 4 / NR;
  int64_t j = 0;
  for (int64_t i = 0; i < m; ++i) pointers[i] = out[i];
  for (; j + NR <= n; j += NR) {
    int64_t i = 0;
    for (; i + MR <= m; i += MR) dot_tile<T, MR, NR>(left + i, right + j * stride, stride, k, pointers + i);
    for (; i < m; ++i) dot_tile<T, 1, NR>(left + i, right + j * stride, stride, k, pointers + i);
    for (i = 0; i < m; ++i) pointers[i] += NR;
  }
  for (; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) dot_tile<T, 1, 1>(left + i, right + j * stride, stride, k, pointers + i);
    for (int64_t i = 0; i < m; ++i) ++pointers[i];
  }
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
