// Random numbers that are a function of what they are for: Philox4x32 with 7 rounds, as pyeff.reference._philox has it.
#pragma once

#include <cmath>

#include "cuda/portable.cuh"

namespace pyeff::gpu {

// What the second word of the counter says beside the number of a mask: what the words are for.
constexpr uint32_t kPhiloxNoise = 0, kPhiloxCentres = 1u << 30, kPhiloxScores = 2u << 30;

struct PhiloxWords {
  uint32_t x[4];
};

// The words of the counter (c0, c1, c2, c3) under the 64 bits of a seed.
PYEFF_BOTH PhiloxWords philox(int64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  PYEFF_UNROLL
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1), c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Those of position `c0` of a purpose, for one mask of one sample.
PYEFF_BOTH PhiloxWords philox_of_sample(int64_t seed, int64_t sample, uint32_t mask, uint32_t purpose, uint32_t c0) {
  return philox(seed, c0, mask + purpose, static_cast<uint32_t>(sample),
                static_cast<uint32_t>(static_cast<uint64_t>(sample) >> 32));
}

namespace detail {

// sqrt(-2 log u) for 23 bits of a word and a half of the last: u is never 0 and never 1.
template <class T>
PYEFF_DEVICE float philox_radius(uint32_t word) {
  // In [1, 2) the bits are the number; what is subtracted leaves (2 k + 1) / 2^24, exactly.
  const float u = float_of((word >> 9) | 0x3f800000u) - (1.0f - 0x1p-24f);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(-1.3862943611198906f * __log2f(u)));
    return root;
  }
#endif
  return sqrtf(-2.0f * logf(u));
}

// The sine and the cosine of an angle of [0, 2 pi). The C library's have a branch for huge angles, with a stack frame.
template <class T>
PYEFF_DEVICE void philox_turn(float angle, float* sine, float* cosine) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
    // About pi, where the fast ones are at their best.
    const float about = angle - 3.14159265358979324f;
    *sine = -__sinf(about), *cosine = -__cosf(about);
    return;
  }
#endif
  // Quarters of a turn, and what is left: by pi / 2 in two parts, and two polynomials on (-pi / 4, pi / 4).
  const float quarters = floorf(fmaf(angle, 0.636619772367581343f, 0.5f));
  float x = fmaf(quarters, -1.57079637050628662f, angle);
  x = fmaf(quarters, 4.37113900018624283e-8f, x);
  const float z = x * x;
  const float odd = fmaf(x * z, fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f), x);
  const float even = fmaf(z * z, fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f),
                          fmaf(-0.5f, z, 1.0f));
  const int quarter = static_cast<int>(quarters);
  const float s = quarter & 1 ? even : odd, c = quarter & 1 ? odd : even;
  *sine = quarter & 2 ? -s : s;
  *cosine = (quarter + 1) & 2 ? -c : c;
}

}  // namespace detail

// Four standard normal numbers, by Box and Muller, accurate to what T can hold.
template <class T>
PYEFF_DEVICE void philox_normals(const PhiloxWords& words, float (&z)[4]) {
  PYEFF_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const float radius = detail::philox_radius<T>(words.x[i]);
    float sine, cosine;
    detail::philox_turn<T>(static_cast<float>(words.x[i + 1] >> 8) * (0x1p-24f * 6.28318530717958648f), &sine, &cosine);
    z[i] = radius * cosine, z[i + 1] = radius * sine;
  }
}

}  // namespace pyeff::gpu
