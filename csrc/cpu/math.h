// exp, sigmoid and tanh on whole vectors, to a few units in the last place.
#pragma once

#include "simd.h"

namespace pyeff {
namespace PYEFF_ISA {

template <class T>
constexpr T inverse_factorial(int k) {
  T product = 1;
  for (int i = 2; i <= k; ++i) product *= T(i);
  return T(1) / product;
}

template <class T>
struct ExpTraits;
template <>
struct ExpTraits<float> {
  // ln 2 in two parts: the first has trailing zero bits, so that n * ln2_high is exact.
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f, log2_e = 0x1.715476p+0f;
  static constexpr float round = 0x1.8p+23f;  // adding it leaves round(x) in the low bits
  static constexpr int mantissa = 23, bias = 127, terms = 7;
  static constexpr float largest = 88.0f, tanh_saturates = 20.0f;
};
template <>
struct ExpTraits<double> {
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33, log2_e = 0x1.71547652b82fep+0;
  static constexpr double round = 0x1.8p+52;
  static constexpr int mantissa = 52, bias = 1023, terms = 13;
  static constexpr double largest = 708.0, tanh_saturates = 44.0;
};

// exp(x) = scale * (1 + tail) with |log(1 + tail)| <= ln(2) / 2. A NaN comes out in the tail.
template <class T>
struct SplitExp {
  Vec<T> scale, tail;

  PYEFF_INLINE explicit SplitExp(Vec<T> x) {
    using E = ExpTraits<T>;
    using Int = typename VectorOf<T>::Int;
    Vec<T> shifted = x * E::log2_e + E::round;
    Vec<T> n = shifted - E::round;
    Vec<T> r = (x - n * E::ln2_high) - n * E::ln2_low;
    // Horner over r^k / k!: the truncation lies below half a unit in the last place.
    Vec<T> p = splat<Vec<T>>(inverse_factorial<T>(E::terms));
#pragma GCC unroll 16
    for (int k = E::terms - 1; k >= 1; --k) p = p * r + inverse_factorial<T>(k);
    tail = p * r;
    Int exponent = bit_cast<Int>(shifted) - bit_cast<Int>(splat<Vec<T>>(E::round)) + E::bias;
    scale = bit_cast<Vec<T>>(Int(exponent << E::mantissa));
  }
};

template <class T>
PYEFF_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
  // Comparisons with a NaN are false, so it passes through.
  x = x < low ? splat<Vec<T>>(low) : x;
  return x > high ? splat<Vec<T>>(high) : x;
}

template <class T>
PYEFF_INLINE Vec<T> sigmoid(Vec<T> x) {
  SplitExp<T> e(clamp<T>(-x, -ExpTraits<T>::largest, ExpTraits<T>::largest));
  return T(1) / (T(1) + (e.scale + e.scale * e.tail));
}

template <class T>
PYEFF_INLINE Vec<T> tanh(Vec<T> x) {
  using Int = typename VectorOf<T>::Int;
  // tanh|x| = m / (m + 2) with m = exp(2|x|) - 1, which keeps its relative precision near zero. The sign is moved bit
  // by bit, which keeps that of zero, too.
  const Int sign = bit_cast<Int>(x) & bit_cast<Int>(splat<Vec<T>>(T(-0.0)));
  Vec<T> magnitude = bit_cast<Vec<T>>(Int(bit_cast<Int>(x) ^ sign));
  SplitExp<T> e(clamp<T>(magnitude + magnitude, T(0), ExpTraits<T>::tanh_saturates));
  Vec<T> m = e.scale * e.tail + (e.scale - T(1));
  Vec<T> t = m / (m + T(2));
  return bit_cast<Vec<T>>(Int(bit_cast<Int>(t) | sign));
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
