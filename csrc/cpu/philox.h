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

  PYEFF_INLINE void words(UInt64V first, const PhiloxRow& row, UInt64V* out) const {
    const UInt64V factor0 = splat<UInt64V>(uint64_t(0xd2511f53)), factor1 = splat<UInt64V>(uint64_t(0xcd9e8d57));
    UInt64V c0 = first, c1 = splat<UInt64V>(uint64_t(row.purpose)), c2 = splat<UInt64V>(row.sample & 0xffffffff),
            c3 = splat<UInt64V>(row.sample >> 32);
#pragma GCC unroll 16
    for (int i = 0; i < kRounds; ++i) {
      const UInt64V p0 = product_of_words(c0, factor0), p1 = product_of_words(c2, factor1);
      c0 = (p1 >> 32) ^ c1 ^ k0_[i];
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ k1_[i];
      c3 = p0;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }

  // Words of the counters from `first` on, as many as a vector has 32-bit lanes; vector i holds word i of each, and
  // lane l that of the counter first + group(l).
  PYEFF_INLINE void words(uint32_t first, const PhiloxRow& row, UInt32V* out) const {
    UInt64V even{}, odd{};
    for (int l = 0; l < kLanes<double>; ++l) even[l] = group(2 * l), odd[l] = group(2 * l + 1);
    UInt64V e[4], o[4];
    words(even + first, row, e);
    words(odd + first, row, o);
    for (int i = 0; i < 4; ++i) out[i] = bit_cast<UInt32V>((e[i] & 0xffffffff) | (o[i] << 32));
  }

  // Such that a transposition of squares of four lanes puts the counters in order: see in_order.
  static constexpr int group(int lane) { return lane / 4 + lane % 4 * (kLanes<float> / 4); }

 private:
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

// The counters of how many words one step makes.
constexpr int64_t kPhiloxStep = 4 * kLanes<float>;

// `count` words in the order of the counters from 0 on; a whole number of steps is written.
template <int kRounds>
void philox_words(const Philox<kRounds>& philox, const PhiloxRow& row, int64_t count, uint32_t* out) {
  for (int64_t at = 0; at < count; at += kPhiloxStep) {
    UInt32V words[4];
    philox.words(uint32_t(at / 4), row, words);
    FloatV moved[4];
    for (int i = 0; i < 4; ++i) moved[i] = bit_cast<FloatV>(words[i]);
    in_order(moved);
    __builtin_memcpy(out + at, moved, sizeof moved);
  }
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
