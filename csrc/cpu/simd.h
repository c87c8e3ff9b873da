// Vectors of the instruction set that this translation unit is compiled for.
//
// Every kernel source is compiled once for each instruction set, inside the namespace PYEFF_ISA, from the same text:
// the compiler's generic vectors carry the arithmetic, and only what they cannot say (the bf16 dot product, rounding to
// bf16) or say slowly is an intrinsic.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef PYEFF_ISA
#error "compile with -DPYEFF_ISA=<name of the instruction set>"
#endif
#define PYEFF_INLINE inline __attribute__((always_inline))

namespace pyeff {

// Storage only: arithmetic on bf16 happens in float.
struct bf16 {
  uint16_t bits;
};

namespace PYEFF_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

typedef float FloatV __attribute__((vector_size(kVectorBytes)));
typedef double DoubleV __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32V __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64V __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32V __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBitsV __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatV;
  using Int = Int32V;
};
template <>
struct VectorOf<double> {
  using type = DoubleV;
  using Int = Int64V;
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// What a stored type is computed in.
template <class T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<bf16> {
  using type = float;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class To, class From>
PYEFF_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

PYEFF_INLINE float widen(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
PYEFF_INLINE float widen(float x) { return x; }
PYEFF_INLINE double widen(double x) { return x; }

// Round to nearest even; a NaN stays one.
PYEFF_INLINE uint16_t bf16_bits(float x) {
  uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
template <class T, class C>
PYEFF_INLINE T narrow(C x) {
  return T(x);
}
template <>
PYEFF_INLINE bf16 narrow<bf16, float>(float x) {
  return bf16{bf16_bits(x)};
}

template <class V, class T>
PYEFF_INLINE V splat(T x) {
  return x - V{};  // not x + 0, which would turn -0 into 0 and so costs an addition
}

PYEFF_INLINE FloatV load(const float* p) {
  FloatV v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
PYEFF_INLINE DoubleV load(const double* p) {
  DoubleV v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// Each word with zeros above it, and each word's lower half: by intrinsics where GCC's conversions take several steps,
// and by masked ones, since it takes what the others leave open for a mistake.
#if defined(__AVX512F__)
constexpr __mmask16 kEveryLane = 0xffff;
#endif
PYEFF_INLINE UInt32V widen_bits(HalfBitsV h) {
#if defined(__AVX512F__)
  return bit_cast<UInt32V>(_mm512_maskz_cvtepu16_epi32(kEveryLane, bit_cast<__m256i>(h)));
#else
  return __builtin_convertvector(h, UInt32V);
#endif
}
PYEFF_INLINE HalfBitsV narrow_bits(UInt32V w) {
#if defined(__AVX512F__)
  return bit_cast<HalfBitsV>(_mm512_maskz_cvtepi32_epi16(kEveryLane, bit_cast<__m512i>(w)));
#else
  return __builtin_convertvector(w, HalfBitsV);
#endif
}

PYEFF_INLINE FloatV load(const bf16* p) {
  HalfBitsV h;
  __builtin_memcpy(&h, p, sizeof h);
  return bit_cast<FloatV>(widen_bits(h) << 16);
}

PYEFF_INLINE void store(float* p, FloatV v) { __builtin_memcpy(p, &v, sizeof v); }
PYEFF_INLINE void store(double* p, DoubleV v) { __builtin_memcpy(p, &v, sizeof v); }
// bf16 bits of a float vector, one in each 32-bit lane.
PYEFF_INLINE UInt32V rounded_bits(FloatV v) {
  UInt32V u = bit_cast<UInt32V>(v);
  UInt32V rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return v != v ? (u >> 16) | 0x40 : rounded;
}
PYEFF_INLINE HalfBitsV rounded(FloatV v) {
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
  // The instruction takes subnormal numbers for zero: a vector that has any is rounded as by other instruction sets.
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(!_mm512_fpclass_ps_mask(bit_cast<__m512>(v), kSubnormal), 1))
    return bit_cast<HalfBitsV>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#endif
  return narrow_bits(rounded_bits(v));
}
PYEFF_INLINE void store(bf16* p, FloatV v) {
  const HalfBitsV h = rounded(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first `count` lanes; the others read as zero and are not written.
template <class T>
PYEFF_INLINE Vec<Compute<T>> load_first(const T* p, int64_t count) {
  constexpr int lanes = kLanes<Compute<T>>;
  if (count >= lanes) return load(p);
  T padded[lanes];
  for (int l = 0; l < lanes; ++l) padded[l] = l < count ? p[l] : T{};
  return load(padded);
}
template <class T>
PYEFF_INLINE void store_first(T* p, Vec<Compute<T>> v, int64_t count) {
  constexpr int lanes = kLanes<Compute<T>>;
  if (count >= lanes) return store(p, v);
  T padded[lanes];
  store(padded, v);
  for (int l = 0; l < count; ++l) p[l] = padded[l];
}

// Halves added to halves: one order of rounding on every compiler.
template <class T, int kBytes>
struct LaneSum {
  typedef T Whole __attribute__((vector_size(kBytes)));
  typedef T Half __attribute__((vector_size(kBytes / 2)));
  static PYEFF_INLINE T of(Whole v) {
    struct Halves {
      Half low, high;
    } halves = bit_cast<Halves>(v);
    return LaneSum<T, kBytes / 2>::of(halves.low + halves.high);
  }
};
template <class T>
struct LaneSum<T, int(2 * sizeof(T))> {
  typedef T Whole __attribute__((vector_size(2 * sizeof(T))));
  static PYEFF_INLINE T of(Whole v) { return v[0] + v[1]; }
};
template <class T>
PYEFF_INLINE T sum_lanes(Vec<T> v) {
  return LaneSum<T, kVectorBytes>::of(v);
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
