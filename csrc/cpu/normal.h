// Normal random numbers in float32 out of random words, by Box and Muller: to a few units in the last place of what
// their definition, pyeff/reference/_philox.py, gives with exact functions.
#pragma once

#include "philox.h"

namespace pyeff {
namespace PYEFF_ISA {

PYEFF_INLINE FloatV square_root(FloatV x) {
#if defined(__AVX512F__)  // masked as in philox.h
  return bit_cast<FloatV>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast<FloatV>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#elif defined(__SSE2__)
  return bit_cast<FloatV>(_mm_sqrt_ps(bit_cast<__m128>(x)));
#else
  FloatV y{};
  for (int l = 0; l < kLanes<float>; ++l) y[l] = __builtin_sqrtf(x[l]);
  return y;
#endif
}

// In what follows every step is taken for N vectors before the next: alone, each would wait for the one before.

// -2 log(u) for 0 < u < 1. With u = 2^e (1 + f), f from sqrt(1/2) - 1 to sqrt(2) - 1:
// log(1 + f) = f - f^2 / 2 + f^3 P(f), P the minimax polynomial; its error is a quarter of a unit in the last place.
template <int N>
PYEFF_INLINE void minus_two_log(FloatV* u) {
  constexpr float terms[] = {-0x1.5556d8p-1f, 0x1.000382p-1f, -0x1.98d7f2p-2f, 0x1.538248p-2f,
                             -0x1.317458p-2f, 0x1.2432bep-2f, -0x1.645eb8p-3f};
  FloatV f[N], exponent[N], p[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const Int32V bits = bit_cast<Int32V>(u[n]), e = (bits - 0x3f3504f3) >> 23;
    exponent[n] = __builtin_convertvector(e, FloatV);
    f[n] = bit_cast<FloatV>(Int32V(bits - (e << 23))) - 1.0f;
    p[n] = f[n] * terms[6] + terms[5];
  }
#pragma GCC unroll 8
  for (int k = 4; k >= 0; --k)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) p[n] = p[n] * f[n] + terms[k];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const FloatV square = f[n] * f[n];
    u[n] = exponent[n] * -0x1.62e430p+0f + ((square * f[n]) * p[n] + (square - (f[n] + f[n])));
  }
}

// The sine and the cosine of an angle of 0 to less than a turn, which become those of what is left of it without
// quarters. The first part of a quarter is short, so that what is taken away is exact.
template <int N>
PYEFF_INLINE void sine_cosine(const FloatV* angle, FloatV* sine, FloatV* cosine) {
  constexpr float round = 0x1.8p+23f;  // adding it leaves the nearest integer in the low bits
  FloatV r[N], s[N];
  Int32V quarter[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const FloatV shifted = angle[n] * 0x1.45f306p-1f + round, quarters = shifted - round;
    quarter[n] = bit_cast<Int32V>(shifted);
    r[n] = (angle[n] - quarters * 0x1.921cp+0f) - quarters * 0x1.daa222p-15f;
    s[n] = r[n] * r[n];
  }
  FloatV p[N], q[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
    p[n] = s[n] * -0x1.994386p-13f + 0x1.11073ap-7f, q[n] = s[n] * 0x1.99eb4ap-16f - 0x1.6c0c32p-10f;
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) p[n] = p[n] * s[n] - 0x1.555546p-3f, q[n] = q[n] * s[n] + 0x1.55554ap-5f;
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) p[n] = p[n] * (s[n] * r[n]) + r[n], q[n] = q[n] * s[n] - 0.5f;
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) q[n] = q[n] * s[n] + 1.0f;
  const Int32V sign = splat<Int32V>(int32_t(0x80000000u));
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const Int32V swap = (quarter[n] & 1) != 0;
    const FloatV c = swap ? p[n] : q[n], t = swap ? q[n] : p[n];
    cosine[n] = bit_cast<FloatV>(Int32V(bit_cast<Int32V>(c) ^ (((quarter[n] + 1) << 30) & sign)));
    sine[n] = bit_cast<FloatV>(Int32V(bit_cast<Int32V>(t) ^ ((quarter[n] << 30) & sign)));
  }
}

// The numbers of the counters from `first` on, as many as 4 N vectors hold, in order.
template <int N, int kRounds>
PYEFF_INLINE void normals(const Philox<kRounds>& philox, uint32_t first, const PhiloxRow& row, FloatV* out) {
  UInt32V words[4 * N];
  philox.template words<N>(first, row, words);
  // A radius and an angle out of each pair of words. The angle is part of the definition as it is rounded here.
  FloatV radius[2 * N], angle[2 * N], sine[2 * N], cosine[2 * N];
#pragma GCC unroll 8
  for (int n = 0; n < 2 * N; ++n) {
    // 23 bits and a half of the last: never 0, never 1.
    radius[n] = __builtin_convertvector(bit_cast<Int32V>(words[2 * n] >> 9), FloatV) * 0x1p-23f + 0x1p-24f;
    angle[n] = __builtin_convertvector(bit_cast<Int32V>(words[2 * n + 1] >> 8), FloatV) * 0x1.921fb6p-22f;
  }
  minus_two_log<2 * N>(radius);
#pragma GCC unroll 8
  for (int n = 0; n < 2 * N; ++n) radius[n] = square_root(radius[n]);
  sine_cosine<2 * N>(angle, sine, cosine);
#pragma GCC unroll 8
  for (int n = 0; n < 2 * N; ++n) out[2 * n] = radius[n] * cosine[n], out[2 * n + 1] = radius[n] * sine[n];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) in_order(out + 4 * n);
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
