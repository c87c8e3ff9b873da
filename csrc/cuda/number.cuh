// The 16-bit numbers of the kernels and their conversions: to nearest, ties to even, NaN to the one NaN that PTX's cvt
// gives (0x7fff), on the GPU and in the emulation alike.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/qualifiers.cuh"

namespace pyeff::gpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

PYEFF_BOTH uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

PYEFF_BOTH float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

PYEFF_BOTH float to_float(float x) { return x; }

PYEFF_BOTH float to_float(bf16 x) { return float_of(uint32_t{x.bits} << 16); }

PYEFF_BOTH float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, fraction = x.bits & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
  // Subnormal: a multiple of 2^-24.
  return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));
#endif
}

namespace detail {

template <class T>
struct From;

template <>
struct From<float> {
  PYEFF_BOTH static float of(float x) { return x; }
};

template <>
struct From<bf16> {
  PYEFF_BOTH static bf16 of(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return {y};
#else
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
  }
};

template <>
struct From<f16> {
  PYEFF_BOTH static f16 of(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return {y};
#else
    const uint32_t all = bits_of(x), sign = (all >> 16) & 0x8000u, bits = all & 0x7fffffffu;
    uint32_t half;
    if (bits > 0x7f800000u) return {0x7fff};
    if (bits >= 0x477ff000u) {
      half = 0x7c00u;  // 65520 and above are nearer to 2^16 than to 65504
    } else if (bits < 0x38800000u) {
      // Subnormal: 0.5 has the spacing of the result, 2^-24, so the float sum rounds as it should.
      half = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
    } else {
      half = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
#endif
  }
};

}  // namespace detail

// The nearest T.
template <class T>
PYEFF_BOTH T from_float(float x) {
  return detail::From<T>::of(x);
}

// Two numbers in one register, `low` in the lower half, which is the first in memory.
template <class T>
PYEFF_BOTH uint32_t pack2(float low, float high) {
  static_assert(sizeof(T) == 2, "pack2 makes two 16-bit numbers");
  return uint32_t{from_float<T>(low).bits} | (uint32_t{from_float<T>(high).bits} << 16);
}
#ifdef __CUDA_ARCH__
template <>
PYEFF_BOTH uint32_t pack2<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
PYEFF_BOTH uint32_t pack2<f16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
#endif

// The two numbers of a register that pack2 filled.
template <class T>
PYEFF_BOTH float low_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair & 0xffffu)});
}
template <class T>
PYEFF_BOTH float high_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace pyeff::gpu
