// What the ticket's products are taken of, token by token: x as it lies, or the output's gradient times the
// activation's derivative, which is formed whenever it is packed and never stored.
#pragma once

#include "gemm.h"
#include "math.h"
#include "ticket.h"

namespace pyeff {
namespace PYEFF_ISA {

template <Activation A, class C>
PYEFF_INLINE Vec<C> activate(Vec<C> z) {
  if constexpr (A == Activation::relu) return z < 0 ? Vec<C>{} : z;  // a NaN stays one
  if constexpr (A == Activation::gelu) return gelu<C>(z);
  return z;
}

// load_first and store_first, without a branch for each number where the instruction set has masks.
template <class T>
PYEFF_INLINE Vec<Compute<T>> load_some(const T* p, int64_t count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if (count >= kLanes<Compute<T>>) return load(p);
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) return DoubleV(_mm512_maskz_loadu_pd(__mmask8(mask), p));
  if constexpr (sizeof(T) == 4) return FloatV(_mm512_maskz_loadu_ps(__mmask16(mask), p));
  if constexpr (sizeof(T) == 2) {
    const HalfBitsV bits = bit_cast<HalfBitsV>(_mm256_maskz_loadu_epi16(__mmask16(mask), p));
    return bit_cast<FloatV>(widen_bits(bits) << 16);
  }
#else
  return load_first(p, count);
#endif
}
template <class T>
PYEFF_INLINE void store_some(T* p, Vec<Compute<T>> v, int64_t count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if (count >= kLanes<Compute<T>>) return store(p, v);
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, __mmask8(mask), __m512d(v));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16(mask), __m512(v));
  if constexpr (sizeof(T) == 2) {
    T numbers[kLanes<Compute<T>>];
    store(numbers, v);
    _mm256_mask_storeu_epi16(p, __mmask16(mask), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
  }
#else
  store_first(p, v, count);
#endif
}

// Rows of [tokens, width].
template <class T>
struct PlainSource {
  using C = Compute<T>;
  using Op = Operand<T>;
  static constexpr bool kSimple = true;
  const T* base;
  int64_t stride;

  // The numbers from `at` on, up to a vector; zero past `left`.
  PYEFF_INLINE Vec<C> value(int64_t token, int64_t at, int64_t left) const {
    return load_first(base + token * stride + at, left);
  }
  PYEFF_INLINE void prefetch(int64_t token, int64_t at, int64_t count) const {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(base + token * stride + at + i);
  }
  // The same as a vector of operand elements.
  PYEFF_INLINE Vec<C> elements(int64_t token, int64_t at, int64_t left) const {
    if constexpr (Op::kPack == 1) {
      return value(token, at, left);
    } else {
      constexpr int64_t count = 2 * kLanes<C>;
      const T* from = base + token * stride + at;
      Vec<C> bits{};
      if (left >= count)
        __builtin_memcpy(&bits, from, sizeof bits);
      else if (left > 0)
        __builtin_memcpy(&bits, from, size_t(left) * sizeof(T));
      return bits;
    }
  }
};

// grad * act'(z), of y for relu and of z for gelu.
template <class T, Activation A>
struct GradientSource {
  using C = Compute<T>;
  using Op = Operand<T>;
  static constexpr bool kSimple = A != Activation::gelu;
  const T* grad;
  int64_t stride;
  const T* saved;
  int64_t width;

  PYEFF_INLINE Vec<C> value(int64_t token, int64_t at, int64_t left) const {
    const Vec<C> g = load_first(grad + token * stride + at, left);
    if constexpr (A == Activation::none) return g;
    const Vec<C> s = load_first(saved + token * width + at, left);
    if constexpr (A == Activation::relu) return s <= 0 ? Vec<C>{} : g;  // as torch has it: a NaN lets the gradient pass
    return g * gelu_derivative<C>(s);
  }
  PYEFF_INLINE void prefetch(int64_t token, int64_t at, int64_t count) const {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) {
      __builtin_prefetch(grad + token * stride + at + i);
      if constexpr (A != Activation::none) __builtin_prefetch(saved + token * width + at + i);
    }
  }
  PYEFF_INLINE Vec<C> elements(int64_t token, int64_t at, int64_t left) const {
    if constexpr (Op::kPack == 1) {
      return value(token, at, left);
    } else if constexpr (A == Activation::none) {
      return PlainSource<T>{grad, stride}.elements(token, at, left);
    } else {
      constexpr int64_t lanes = kLanes<C>;
      T pairs[2 * lanes];
      store(pairs, value(token, at, left));
      store(pairs + lanes, left > lanes ? value(token, at + lanes, left - lanes) : Vec<C>{});
      Vec<C> bits;
      __builtin_memcpy(&bits, pairs, sizeof bits);
      return bits;
    }
  }
};

// One vector of tokens, `count` of which are there, as the right operand: panel[p][lane] for the `k` numbers of a row
// from `first` on. What an odd k lacks is zero, and so are the tokens that are not there.
template <class T, class Source>
PYEFF_INLINE void pack_tokens(typename Operand<T>::Element* panel, int64_t width, const Source& source, int64_t token,
                              int64_t count, int64_t first, int64_t k) {
  using Op = Operand<T>;
  using C = Compute<T>;
  constexpr int lanes = kLanes<C>;
  constexpr int64_t kAhead = 4;  // vectors
  const int64_t total = steps<Op>(k);
  for (int64_t p = 0; p < total; p += lanes) {
    const int64_t at = p * Op::kPack;
    Vec<C> square[lanes];
    // The rows lie far apart, each a stream of its own: more of them than the processor follows by itself.
    if (at + kAhead * lanes * Op::kPack < k)
      for (int lane = 0; lane < smaller(lanes, count); ++lane)
        source.prefetch(token + lane, first + at + kAhead * lanes * Op::kPack, lanes * Op::kPack);
    if constexpr (Source::kSimple) {
#pragma GCC unroll 16
      for (int lane = 0; lane < lanes; ++lane)
        square[lane] = lane < count ? source.elements(token + lane, first + at, k - at) : Vec<C>{};
    } else {  // one copy of the code, which is long
#pragma GCC unroll 1
      for (int lane = 0; lane < lanes; ++lane)
        square[lane] = lane < count ? source.elements(token + lane, first + at, k - at) : Vec<C>{};
    }
    transpose<C>(square);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (p + i < total) __builtin_memcpy(panel + (p + i) * width, &square[i], sizeof square[i]);
  }
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
