// Philox4x32, a random function of a counter of four words and a key of two: Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011. For a vector of counters that differ in their first word.
#pragma once

#include "pack.h"

namespace pyeff {
namespace PYEFF_ISA {

typedef uint64_t UInt64V __attribute__((vector_size(kVectorBytes)));

// Words live in the low halves of 64-bit lanes, since that is where products of 64 bits come from; what is in the high
// halves does not matter.
PYEFF_INLINE UInt64V product_of_words(UInt64V a, UInt64V b) {
#if defined(__AVX512F__)
  // The plain form makes some compilers warn of an operand that they leave out.
  return bit_cast<UInt64V>(_mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<UInt64V>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<UInt64V>(_mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// What all the counters of a row have in common.
struct PhiloxRow {
  uint32_t purpose;  // the second word: the number of a mask, and what the words are for
  uint64_t sample;   // the last two
};

template <int kRounds>
class Philox {
 public:
  explicit Philox(uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int i = 0; i < kRounds; ++i, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) k0_[i] = k0, k1_[i] = k1;
  }

  // Four words of each of the counters from `first` on, as many as N vectors have 32-bit lanes: out[4 n + i] holds word
  // i, and lane l that of the counter first + n lanes + group(l). N are interleaved, since one round waits for the
  // other.
  template <int N>
  PYEFF_INLINE void words(uint32_t first, const PhiloxRow& row, UInt32V* out) const {
    const UInt64V factor0 = splat<UInt64V>(uint64_t(0xd2511f53)), factor1 = splat<UInt64V>(uint64_t(0xcd9e8d57));
    UInt64V even{}, odd{};
    for (int l = 0; l < kLanes<double>; ++l) even[l] = group(2 * l), odd[l] = group(2 * l + 1);
    UInt64V c0[2 * N], c1[2 * N], c2[2 * N], c3[2 * N];
#pragma GCC unroll 8
    for (int n = 0; n < 2 * N; ++n) {
      c0[n] = (n % 2 ? odd : even) + uint64_t(first + uint32_t(n / 2 * kLanes<float>));
      c1[n] = splat<UInt64V>(uint64_t(row.purpose));
      c2[n] = splat<UInt64V>(row.sample & 0xffffffff), c3[n] = splat<UInt64V>(row.sample >> 32);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 8
      for (int n = 0; n < 2 * N; ++n) {
        const UInt64V p0 = product_of_words(c0[n], factor0), p1 = product_of_words(c2[n], factor1);
        c0[n] = (p1 >> 32) ^ c1[n] ^ k0_[i];
        c1[n] = p1;
        c2[n] = (p0 >> 32) ^ c3[n] ^ k1_[i];
        c3[n] = p0;
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      out[4 * n + 0] = joined(c0[2 * n], c0[2 * n + 1]), out[4 * n + 1] = joined(c1[2 * n], c1[2 * n + 1]);
      out[4 * n + 2] = joined(c2[2 * n], c2[2 * n + 1]), out[4 * n + 3] = joined(c3[2 * n], c3[2 * n + 1]);
    }
  }

  // Such that a transposition of squares of four lanes puts the counters in order: see in_order.
  static constexpr int group(int lane) { return lane / 4 + lane % 4 * (kLanes<float> / 4); }

 private:
  static PYEFF_INLINE UInt32V joined(UInt64V even, UInt64V odd) {
    return bit_cast<UInt32V>((even & 0xffffffff) | (odd << 32));
  }

  uint64_t k0_[kRounds], k1_[kRounds];
};

// Four vectors, of the four numbers of each of the counters above: as they follow each other.
PYEFF_INLINE void in_order(FloatV* of_words) {
  Int32V low{}, high{}, pairs_low{}, pairs_high{};
  constexpr int lanes = kLanes<float>;
  for (int l = 0; l < lanes; ++l) {
    const int square = l / 4 * 4, at = l % 4;
    low[l] = square + at / 2 + at % 2 * lanes;
    high[l] = low[l] + 2;
    pairs_low[l] = square + at % 2 + at / 2 * lanes;
    pairs_high[l] = pairs_low[l] + 2;
  }
  const FloatV a = shuffle<float>(of_words[0], of_words[1], low), b = shuffle<float>(of_words[0], of_words[1], high);
  const FloatV c = shuffle<float>(of_words[2], of_words[3], low), d = shuffle<float>(of_words[2], of_words[3], high);
  of_words[0] = shuffle<float>(a, c, pairs_low);
  of_words[1] = shuffle<float>(a, c, pairs_high);
  of_words[2] = shuffle<float>(b, d, pairs_low);
  of_words[3] = shuffle<float>(b, d, pairs_high);
}

// How many words one step makes.
constexpr int64_t kPhiloxStep = 4 * kLanes<float>;

// One step from the counter `first` on, in order.
template <int kRounds>
PYEFF_INLINE void philox_step(const Philox<kRounds>& philox, uint32_t first, const PhiloxRow& row, uint32_t* out) {
  UInt32V words[4];
  philox.template words<1>(first, row, words);
  FloatV moved[4];
  for (int i = 0; i < 4; ++i) moved[i] = bit_cast<FloatV>(words[i]);
  in_order(moved);
  __builtin_memcpy(out, moved, sizeof moved);
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
