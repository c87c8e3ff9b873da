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

// -2 log(u) for 0 < u < 1. With u = 2^e (1 + f), f from sqrt(1/2) - 1 to sqrt(2) - 1:
// log(1 + f) = f - f^2 / 2 + f^3 P(f), P the minimax polynomial; its error is a quarter of a unit in the last place.
PYEFF_INLINE FloatV minus_two_log(FloatV u) {
  constexpr float terms[] = {-0x1.5556d8p-1f, 0x1.000382p-1f, -0x1.98d7f2p-2f, 0x1.538248p-2f,
                             -0x1.317458p-2f, 0x1.2432bep-2f, -0x1.645eb8p-3f};
  const Int32V bits = bit_cast<Int32V>(u), exponent = (bits - 0x3f3504f3) >> 23;
  const FloatV f = bit_cast<FloatV>(Int32V(bits - (exponent << 23))) - 1.0f, square = f * f;
  FloatV p = splat<FloatV>(terms[6]);
#pragma GCC unroll 8
  for (int k = 5; k >= 0; --k) p = p * f + terms[k];
  return __builtin_convertvector(exponent, FloatV) * -0x1.62e430p+0f + ((square * f) * p + (square - (f + f)));
}

// The radius and the angle come from one word each; the pair replaces them.
PYEFF_INLINE void box_muller(UInt32V a, UInt32V b, FloatV* cosine, FloatV* sine) {
  // 23 bits and a half of the last: never 0, never 1.
  const FloatV u = __builtin_convertvector(bit_cast<Int32V>(a >> 9), FloatV) * 0x1p-23f + 0x1p-24f;
  const FloatV radius = square_root(minus_two_log(u));
  // The rounded angle is part of the definition. Less than a turn: the quarter of it that is taken away is exact.
  const FloatV angle = __builtin_convertvector(bit_cast<Int32V>(b >> 8), FloatV) * 0x1.921fb6p-22f;
  constexpr float round = 0x1.8p+23f;  // adding it leaves the nearest integer in the low bits
  const FloatV shifted = angle * 0x1.45f306p-1f + round, n = shifted - round;
  const FloatV r = (angle - n * 0x1.921cp+0f) - n * 0x1.daa222p-15f, s = r * r;
  const Int32V quarter = bit_cast<Int32V>(shifted);
  const FloatV sin_r = ((-0x1.994386p-13f * s + 0x1.11073ap-7f) * s - 0x1.555546p-3f) * (s * r) + r;
  const FloatV cos_r = (((0x1.99eb4ap-16f * s - 0x1.6c0c32p-10f) * s + 0x1.55554ap-5f) * s - 0.5f) * s + 1.0f;
  const Int32V swap = (quarter & 1) != 0, sign = splat<Int32V>(int32_t(0x80000000u));
  const FloatV c = swap ? sin_r : cos_r, t = swap ? cos_r : sin_r;
  *cosine = radius * bit_cast<FloatV>(Int32V(bit_cast<Int32V>(c) ^ (((quarter + 1) << 30) & sign)));
  *sine = radius * bit_cast<FloatV>(Int32V(bit_cast<Int32V>(t) ^ ((quarter << 30) & sign)));
}

// The numbers of the counters from `first` on, as many as four vectors hold, in order.
template <int kRounds>
PYEFF_INLINE void normals(const Philox<kRounds>& philox, uint32_t first, const PhiloxRow& row, FloatV* out) {
  UInt32V words[4];
  philox.words(first, row, words);
  box_muller(words[0], words[1], &out[0], &out[1]);
  box_muller(words[2], words[3], &out[2], &out[3]);
  in_order(out);
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
