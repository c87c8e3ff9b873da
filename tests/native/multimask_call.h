// Plans, inputs and definitions for the tests of the multimask family's CPU kernels.
#pragma once

#include "cpu/multimask.h"
#include "dev/threads.h"
#include "support.h"

namespace check {

using pyeff::MultimaskNoise;
using pyeff::MultimaskProblem;
using pyeff::StridedRows;

// 1, 2 and 5 of them.
inline const pyeff::Parallel& threads(int i) {
  static pyeff::dev::Threads one(1), two(2), five(5);
  static const pyeff::Parallel all[] = {one.parallel(), two.parallel(), five.parallel()};
  return all[i];
}

constexpr int64_t kNever = INT64_MAX;  // is an output so large that it passes the caches by

inline bool near(double found, double truth, double bound) {
  if (std::fabs(found - truth) <= bound) return true;
  std::fprintf(stderr, "found %.9g, expected %.9g (+- %g)\n", found, truth, bound);
  return false;
}

// Memory for results: NaN before, guards on both sides, at the alignment of a line or past it by a number.
class Place {
 public:
  Place(Number number, int64_t count, bool aligned)
      : number_(number), count_(count), memory_(static_cast<size_t>(count * size_of(number) + 256), 0x5a) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory_.data()) + 64;
    lead_ = 64 + static_cast<int64_t>((64 - begin % 64) % 64) + (aligned ? 0 : size_of(number));
    std::memset(data(), 0xff, static_cast<size_t>(bytes()));
  }
  Place(Number number, const std::vector<double>& values, bool aligned)
      : Place(number, static_cast<int64_t>(values.size()), aligned) {
    for (size_t i = 0; i < values.size(); ++i) put(number_, data(), static_cast<int64_t>(i), values[i]);
  }
  void* data() { return memory_.data() + lead_; }
  const void* data() const { return memory_.data() + lead_; }
  int64_t bytes() const { return count_ * size_of(number_); }
  int64_t count() const { return count_; }
  double operator[](int64_t i) const { return get(number_, data(), i); }
  bool same(const Place& other) const {
    return count_ == other.count_ && std::memcmp(data(), other.data(), static_cast<size_t>(bytes())) == 0;
  }
  bool guarded() const {
    for (int64_t i = 0; i < static_cast<int64_t>(memory_.size()); ++i)
      if ((i < lead_ || i >= lead_ + bytes()) && memory_[static_cast<size_t>(i)] != 0x5a) return false;
    return true;
  }

 private:
  Number number_;
  int64_t count_, lead_;
  std::vector<char> memory_;
};

// [outer, inner, width] of random numbers, in wider rows or not; NaN between them.
struct Rows {
  StridedRows at{};
  Input memory;
  int64_t width = 0;

  Rows() = default;
  Rows(Number number, int64_t outer, int64_t inner, int64_t width, bool strided, Random* random) : width(width) {
    at.inner = width + (strided ? 3 : 0), at.outer = inner * at.inner + (strided ? 7 : 0);
    memory = Input(number, (outer - 1) * at.outer + (inner - 1) * at.inner + width);
    const int64_t count = memory.bytes() / size_of(number);
    for (int64_t i = 0; i < count; ++i) memory.set(i, std::nan(""));
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; ++i)
        for (int64_t d = 0; d < width; ++d) memory.set(o * at.outer + i * at.inner + d, random->uniform());
    at.data = memory.data();
  }
  double operator()(int64_t o, int64_t i, int64_t d) const { return memory[o * at.outer + i * at.inner + d]; }
  void forget(int64_t o, int64_t i) {
    for (int64_t d = 0; d < width; ++d) memory.set(o * at.outer + i * at.inner + d, std::nan(""));
  }
};

struct Sizes {
  int64_t batch, masks, tokens, width;
};

// Random masks of ragged samples; what is past keep_len is no token.
struct Plan {
  Sizes sizes;
  int64_t rows, slots;
  std::vector<int32_t> ids_keep, keep_len, inverse, lengths;

  Plan(const Sizes& s, double share, Random* random) : sizes(s), rows(s.batch * s.masks) {
    for (int64_t b = 0; b < s.batch; ++b)
      lengths.push_back(static_cast<int32_t>(b == 0 ? s.tokens : random->below(s.tokens + 1)));
    slots = 1;
    std::vector<std::vector<int32_t>> kept(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) {
      auto& here = kept[static_cast<size_t>(r)];
      for (int32_t t = 0; t < lengths[static_cast<size_t>(r / s.masks)]; ++t)
        if (std::fabs(random->uniform()) < share) here.push_back(t);
      slots = std::max(slots, static_cast<int64_t>(here.size()));
    }
    inverse.assign(static_cast<size_t>(rows * s.tokens), -1);
    ids_keep.assign(static_cast<size_t>(rows * slots), INT32_MAX);
    for (int64_t r = 0; r < rows; ++r) {
      const auto& here = kept[static_cast<size_t>(r)];
      keep_len.push_back(static_cast<int32_t>(here.size()));
      for (size_t k = 0; k < here.size(); ++k) {
        ids_keep[static_cast<size_t>(r * slots) + k] = here[k];
        inverse[static_cast<size_t>(r * s.tokens + here[k])] = static_cast<int32_t>(k);
      }
    }
  }
  MultimaskProblem problem(Number number, int64_t streamed) const {
    MultimaskProblem p{};
    p.number = number, p.batch = sizes.batch, p.rows = rows, p.tokens = sizes.tokens, p.slots = slots;
    p.width = sizes.width, p.ids_keep = ids_keep.data(), p.keep_len = keep_len.data();
    p.inverse = inverse.data(), p.lengths = lengths.data(), p.streamed = streamed;
    return p;
  }
  int32_t slot(int64_t r, int64_t t) const { return inverse[static_cast<size_t>(r * sizes.tokens + t)]; }
  int32_t id(int64_t r, int64_t k) const { return ids_keep[static_cast<size_t>(r * slots + k)]; }
  int64_t kept(int64_t r) const { return keep_len[static_cast<size_t>(r)]; }
  int64_t length(int64_t b) const { return lengths[static_cast<size_t>(b)]; }
  bool hidden(int64_t r, int64_t t) const { return slot(r, t) < 0 && t < length(r / sizes.masks); }
};

// Philox4x32 by its definition.
struct Words {
  uint32_t of[4];
};
inline Words philox(int rounds, uint64_t key, Words c) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int i = 0; i < rounds; ++i, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const uint64_t a = uint64_t{0xd2511f53} * c.of[0], b = uint64_t{0xcd9e8d57} * c.of[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.of[1] ^ k0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.of[3] ^ k1, static_cast<uint32_t>(a)}};
  }
  return c;
}
// Word i of what a row of a sample has for a purpose.
inline uint32_t word(uint64_t seed, int64_t i, uint32_t purpose, uint64_t sample) {
  const Words c = {
      {static_cast<uint32_t>(i / 4), purpose, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32)}};
  return philox(7, seed, c).of[i % 4];
}
// A normal number out of two words. The angle is rounded to float32 by definition.
inline double box_muller(uint32_t a, uint32_t b, bool sine) {
  const double radius = std::sqrt(-2 * std::log((a >> 9) * 0x1p-23 + 0x1p-24));
  const double angle = static_cast<float>(b >> 8) * static_cast<float>(0x1p-24 * 2.0 * 3.14159265358979323846);
  return radius * (sine ? std::sin(angle) : std::cos(angle));
}

}  // namespace check
