// What the kernels' tests share: every usable instruction set, memory whose ends are watched, and numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/number.h"

namespace check {

using pyeff::Number;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;  // then everything takes ten times as long
#else
constexpr bool kSanitized = false;
#endif
#if defined(__SANITIZE_THREAD__)
constexpr bool kRaces = true;  // and this sanitizer takes ten times as long again where threads are fibers
#else
constexpr bool kRaces = false;
#endif

template <class F>
void for_each_usable_isa(F&& body) {
  for (int isa = 0; isa < pyeff::kIsaCount; ++isa) {
    if (pyeff::isa_built() & pyeff::isa_detected() & (1u << isa)) body(isa);
  }
}

constexpr Number kNumbers[] = {Number::f64, Number::f32, Number::bf16};
// Half precision, which only the GPU's kernels have.
constexpr Number kHalf = static_cast<Number>(static_cast<int>(Number::bf16) + 1);

inline const char* name_of(Number number) {
  return number == Number::f64 ? "f64" : number == Number::f32 ? "f32" : number == kHalf ? "f16" : "bf16";
}
inline int64_t size_of(Number number) { return number == Number::f64 ? 8 : number == Number::f32 ? 4 : 2; }
// What sums of this type are held in, and the distances from 1 to the next number.
inline Number compute_of(Number number) { return number == Number::f64 ? Number::f64 : Number::f32; }
inline double epsilon(Number number) {
  return number == Number::f64 ? 0x1p-52 : number == Number::f32 ? 0x1p-23 : number == kHalf ? 0x1p-10 : 0x1p-7;
}

inline uint16_t bf16_of(double x) {
  const float single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  // To nearest, ties to even: what is cut off decides, or the last bit kept.
  const uint32_t cut = bits & 0xffff, kept = bits >> 16;
  return static_cast<uint16_t>(kept + (cut > 0x8000 || (cut == 0x8000 && (kept & 1))));
}
inline double of_bf16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float single;
  std::memcpy(&single, &bits, sizeof single);
  return single;
}

inline uint16_t f16_of(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return static_cast<uint16_t>(sign | 0x7e00);
  const double size = std::fabs(x);
  if (size >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
  // In units of the last place, to nearest, ties to even; subnormal numbers have those of 2^-14.
  const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
  const double units = std::nearbyint(std::ldexp(size, 10 - exponent));
  return static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + static_cast<int>(units)));
}
inline double of_f16(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(1024 + fraction, exponent - 25);
  return half & 0x8000 ? -size : size;
}

inline double get(Number number, const void* data, int64_t i) {
  if (number == Number::f64) return static_cast<const double*>(data)[i];
  if (number == Number::f32) return static_cast<const float*>(data)[i];
  if (number == kHalf) return of_f16(static_cast<const uint16_t*>(data)[i]);
  return of_bf16(static_cast<const uint16_t*>(data)[i]);
}
inline void put(Number number, void* data, int64_t i, double x) {
  if (number == Number::f64)
    static_cast<double*>(data)[i] = x;
  else if (number == Number::f32)
    static_cast<float*>(data)[i] = static_cast<float>(x);
  else if (number == kHalf)
    static_cast<uint16_t*>(data)[i] = f16_of(x);
  else
    static_cast<uint16_t*>(data)[i] = bf16_of(x);
}
// The nearest number of a type.
inline double rounded(Number number, double x) {
  if (number == Number::f64) return x;
  if (number == Number::f32) return static_cast<float>(x);
  return number == kHalf ? of_f16(f16_of(x)) : of_bf16(bf16_of(x));
}

// Uniform in (-1, 1), the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
  uint64_t bits() {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t count) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(count)); }
  bool coin() { return bits() >> 63; }
  double uniform() { return static_cast<double>(static_cast<int64_t>(bits()) >> 11) * 0x1p-52; }
  template <class T, size_t N>
  T pick(const T (&from)[N]) {
    return from[below(N)];
  }

 private:
  uint64_t state_;
};

// Where memory begins: one number, or two 16-bit numbers, past a multiple of 16 bytes, or there.
enum class Begin { number, pair, vector };

// A heap block that ends where its numbers end, so that AddressSanitizer sees the first byte read past them; and that
// begins at no vector's alignment, unless told to.
class Input {
 public:
  Input() = default;
  Input(Number number, int64_t count, Begin begin = Begin::number)
      : number_(number),
        count_(count),
        lead_(begin == Begin::vector                         ? 16
              : begin == Begin::pair && size_of(number) == 2 ? 4
                                                             : size_of(number)),
        block_(new char[static_cast<size_t>(count * size_of(number) + lead_)]) {}
  Input(Number number, const std::vector<double>& values) : Input(number, static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < count_; ++i) set(i, values[static_cast<size_t>(i)]);
  }
  void* data() const { return block_ ? block_.get() + lead_ : nullptr; }
  // Null for an absent argument.
  const void* maybe() const { return count_ ? data() : nullptr; }
  int64_t bytes() const { return count_ * size_of(number_); }
  void set(int64_t i, double x) { put(number_, data(), i, x); }
  double operator[](int64_t i) const { return get(number_, data(), i); }

 private:
  Number number_ = Number::f64;
  int64_t count_ = 0, lead_ = 0;
  std::unique_ptr<char[]> block_;
};

// Memory for results: NaN before, and guards on both sides.
class Output {
 public:
  Output() = default;
  // By default the numbers begin at no vector's alignment.
  Output(Number number, int64_t count) : Output(number, count, kLine + size_of(number)) {}
  Output(Number number, int64_t count, int64_t guard)
      : number_(number), count_(count), guard_(guard), block_(new char[static_cast<size_t>(2 * guard + bytes())]) {
    std::memset(block_.get(), kGuard, static_cast<size_t>(2 * guard_ + bytes()));
    std::memset(data(), 0xff, static_cast<size_t>(bytes()));
  }
  // For packed operands of any type, which are aligned to their elements.
  static Output packed(int64_t bytes) { return {Number::bf16, bytes / 2, kLine}; }
  void* data() const { return block_ ? block_.get() + guard_ : nullptr; }
  void* maybe() const { return count_ ? data() : nullptr; }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * size_of(number_); }
  double operator[](int64_t i) const { return get(number_, data(), i); }
  bool guarded() const {
    for (int64_t i = 0; i < guard_; ++i)
      if (block_ && (block_[i] != kGuard || block_[guard_ + bytes() + i] != kGuard)) return false;
    return true;
  }
  bool same(const Output& other) const {
    return count_ == other.count_ &&
           (count_ == 0 || std::memcmp(data(), other.data(), static_cast<size_t>(bytes())) == 0);
  }

 private:
  static constexpr char kGuard = 0x5a;
  static constexpr int64_t kLine = 64;
  Number number_ = Number::f64;
  int64_t count_ = 0, guard_ = 0;
  std::unique_ptr<char[]> block_;
};

}  // namespace check
