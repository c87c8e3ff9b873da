// exp, sigmoid, tanh and gelu on whole vectors, to a few units in the last place.
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

// The tail of the normal distribution: the probability of less than -a is exp(-a^2 / 2) t P(u), where t = 1 / (1 + c a)
// and u is t moved to [-1, 1]. P is the Chebyshev interpolant in powers of u, accurate to half a unit in the last place
// from a = 0 up to where the tail is no number any more.
template <class T>
struct TailTraits;
template <>
struct TailTraits<float> {
  static constexpr float slope = 0.3f, scale = 2.4694836f, shift = -1.4694836f, last = 13.25f;
  static constexpr float terms[] = {0x1.06bcf4p-2f,   0x1.4c9c62p-3f,   0x1.13a61cp-4f,   0x1.eae41ap-7f,
                                    -0x1.4640acp-12f, -0x1.03368ap-10f, -0x1.5075a8p-15f, 0x1.4b6212p-14f,
                                    0x1.8a3774p-20f,  -0x1.9b4abep-18f};
};
template <>
struct TailTraits<double> {
  // Near zero t forgets the last bits of a. There the probability is 1/2 + x Q(x^2), and this Q.
  static constexpr double middle_end = 1.3;
  static constexpr double middle[] = {0x1.9884533d43651p-2,   -0x1.1058377e2cedcp-4,  0x1.46d0429768dddp-7,
                                      -0x1.37403f6b8afe9p-10, 0x1.e42b0d4a32149p-14,  -0x1.3ce8f9ebd5396p-17,
                                      0x1.658a04cfa7eaep-21,  -0x1.621fe08c019cfp-25, 0x1.38522c487842cp-29,
                                      -0x1.edfd06e6fd2e3p-34, 0x1.53fc874e9173ep-38,  -0x1.45022dde72d9ap-43};
  static constexpr double slope = 0.2, scale = 2.2583979328165374487, shift = -1.2583979328165374487, last = 37.6;
  static constexpr double terms[] = {
      0x1.5d1ae2d9c40bcp-3,   0x1.1f517bbff1abbp-3,   0x1.8c62cf339ba6ap-4,   0x1.c5bcc2b6bd3b7p-5,
      0x1.a4ce016961a10p-6,   0x1.2c589677f3523p-7,   0x1.20ae9f1f989eap-9,   0x1.661925547c751p-13,
      -0x1.b60b908da25ecp-14, -0x1.418e72125dde9p-15, 0x1.ee3c3983f3ffbp-21,  0x1.d9fd785fd1973p-19,
      0x1.86a106c0cbdf5p-22,  -0x1.511d677dd7ff2p-22, -0x1.f133bf2b7106bp-25, 0x1.10a18327224d5p-25,
      0x1.d40055518d71cp-28,  -0x1.fcca08b4a3150p-29, -0x1.759ef9131082fp-31, 0x1.d9c11a88c2274p-32,
      0x1.c7ab53717363ap-35,  -0x1.279c1107b9f71p-35, -0x1.2746fda5dfdf9p-39};
};

// What gelu and its derivative are made of: exp(-x^2 / 2), and the probability of less than x.
template <class T>
struct Normal {
  Vec<T> bell, below;

  PYEFF_INLINE explicit Normal(Vec<T> x) {
    using Tail = TailTraits<T>;
    constexpr int count = int(sizeof(Tail::terms) / sizeof(T));
    const Vec<T> a = x < 0 ? -x : x;
    SplitExp<T> e(clamp<T>(x * x * T(-0.5), -ExpTraits<T>::largest, T(0)));
    bell = a > Tail::last ? Vec<T>{} : e.scale + e.scale * e.tail;
    const Vec<T> t = T(1) / (T(1) + a * Tail::slope), u = t * Tail::scale + Tail::shift;
    Vec<T> p = splat<Vec<T>>(Tail::terms[count - 1]);
#pragma GCC unroll 32
    for (int k = count - 2; k >= 0; --k) p = p * u + Tail::terms[k];
    const Vec<T> tail = bell * (t * p);
    below = x < 0 ? tail : T(1) - tail;
    if constexpr (sizeof(T) == 8) {
      constexpr int middle_count = int(sizeof(Tail::middle) / sizeof(T));
      const Vec<T> s = x * x;
      Vec<T> q = splat<Vec<T>>(Tail::middle[middle_count - 1]);
#pragma GCC unroll 32
      for (int k = middle_count - 2; k >= 0; --k) q = q * s + Tail::middle[k];
      below = a < Tail::middle_end ? T(0.5) + x * q : below;
    }
  }
};

template <class T>
PYEFF_INLINE Vec<T> gelu(Vec<T> x) {
  return x * Normal<T>(x).below;
}

template <class T>
PYEFF_INLINE Vec<T> gelu_derivative(Vec<T> x) {
  const Normal<T> n(x);
  return n.below + x * (n.bell * T(0.3989422804014326779));
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
