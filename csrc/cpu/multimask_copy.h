// Bytes to where they belong: rows copied or zeroed, past the caches where no cache would hold them.
#pragma once

#include "memory.h"
#include "parallel.h"
#include "stream.h"

namespace pyeff {
namespace PYEFF_ISA {

constexpr int64_t kLine = 64;

PYEFF_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
PYEFF_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

// Whole lines past the caches, while the lines of `next`, if any, are asked for; what is before the first and behind
// the last of them as usual.
PYEFF_INLINE void copy_streamed(char* to, const char* from, int64_t bytes, const char* next = nullptr) {
  const int64_t head = at_most(bytes, int64_t(-reinterpret_cast<uintptr_t>(to) % uintptr_t(kLine)));
  if (head) __builtin_memcpy(to, from, size_t(head));
  const int64_t end = head + (bytes - head) / kLine * kLine;
  next = next ? next : from;
  for (int64_t at = head; at < end; at += kLine) {
    __builtin_prefetch(next + at);
#pragma GCC unroll 4
    for (int64_t v = at; v < at + kLine; v += kVectorBytes)
      stream(reinterpret_cast<float*>(to + v), load(reinterpret_cast<const float*>(from + v)));
  }
  if (end < bytes) __builtin_memcpy(to + end, from + end, size_t(bytes - end));
}

PYEFF_INLINE void zero_streamed(char* to, int64_t bytes) {
  const int64_t head = at_most(bytes, int64_t(-reinterpret_cast<uintptr_t>(to) % uintptr_t(kLine)));
  if (head) __builtin_memset(to, 0, size_t(head));
  const int64_t end = head + (bytes - head) / kLine * kLine;
  for (int64_t at = head; at < end; at += kVectorBytes) stream(reinterpret_cast<float*>(to + at), FloatV{});
  if (end < bytes) __builtin_memset(to + end, 0, size_t(bytes - end));
}

template <class T>
PYEFF_INLINE void put(T* to, Vec<Compute<T>> v, bool streamed) {
  if (streamed)
    stream(to, v);
  else
    store(to, v);
}

// Two vectors as numbers of type T, at an address that is a multiple of a vector's size where they are streamed.
template <class T>
PYEFF_INLINE void put_two(T* to, Vec<Compute<T>> first, Vec<Compute<T>> second, bool streamed) {
  constexpr int64_t lanes = kLanes<Compute<T>>;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const __m256i low = bit_cast<__m256i>(rounded(first)), high = bit_cast<__m256i>(rounded(second));
    const __m512i both = _mm512_mask_broadcast_i64x4(_mm512_castsi256_si512(low), 0xf0, high);
    if (streamed)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
    else
      __builtin_memcpy(to, &both, sizeof both);
    return;
  }
#endif
  put(to, first, streamed);
  put(to + lanes, second, streamed);
}

// Where an output goes: how it is written, and what is said about its memory before.
struct Target {
  char* data;
  bool streamed;

  Target(void* data, int64_t bytes, int64_t least) : data(static_cast<char*>(data)), streamed(bytes >= least) {
    if (bytes >= least) expect_writes(data, bytes);
  }
  // `next` is what is copied after it, if that lies elsewhere.
  PYEFF_INLINE void copy(int64_t at, const void* from, int64_t bytes, const void* next = nullptr) const {
    if (streamed)
      return copy_streamed(data + at, static_cast<const char*>(from), bytes, static_cast<const char*>(next));
    __builtin_memcpy(data + at, from, size_t(bytes));
  }
  PYEFF_INLINE void zero(int64_t at, int64_t bytes) const {
    if (streamed) return zero_streamed(data + at, bytes);
    __builtin_memset(data + at, 0, size_t(bytes));
  }
  // The end of a thread's part.
  PYEFF_INLINE void end() const {
    if (streamed) end_of_stream();
  }
};

// Puts pieces together that follow each other in an output, of which few begin where a line of memory does: whole lines
// are written, past the caches if the output is. `room` is what a caller may write at `next` at a time, `scratch` has
// bytes(room) at the alignment of a line.
class Staged {
 public:
  Staged(const Target& target, int64_t at, char* scratch)
      : target_(target),
        to_(target.data + at),
        staged_(scratch),
        before_(int64_t(reinterpret_cast<uintptr_t>(to_) % uintptr_t(kLine))),
        filled_(before_) {
    to_ -= before_;
  }
  static int64_t bytes(int64_t room) { return kEnough + kLine + room; }
  PYEFF_INLINE char* next() const { return staged_ + filled_; }
  PYEFF_INLINE void wrote(int64_t bytes) {
    filled_ += bytes;
    if (filled_ >= kEnough) flush(filled_ / kLine * kLine);
  }
  void end() { flush(filled_); }

 private:
  static constexpr int64_t kEnough = 2048;

  PYEFF_INLINE void flush(int64_t bytes) {
    // The first line may have been begun by what is before it.
    const int64_t begin = at_most(before_, bytes);
    if (target_.streamed)
      copy_streamed(to_ + begin, staged_ + begin, bytes - begin);
    else
      __builtin_memcpy(to_ + begin, staged_ + begin, size_t(bytes - begin));
    __builtin_memmove(staged_, staged_ + bytes, size_t(filled_ - bytes));
    to_ += bytes, filled_ -= bytes, before_ = 0;
  }

  const Target& target_;
  char *to_, *staged_;
  int64_t before_, filled_;
};

// body(begin, end) over [0, count) in pieces that are worth a task; on one thread where waking the others would take
// longer. Nothing may depend on the pieces.
template <class F>
void for_each_piece(const Parallel& parallel, int64_t count, int64_t bytes_each, const F& body) {
  constexpr int64_t kTask = int64_t(64) << 10, kAlone = int64_t(48) << 10;
  const int64_t many = at_most(32, count / (4 * parallel.threads));  // what is next to each other shares something
  const int64_t piece = at_least(at_least(1, many), kTask / at_least(1, bytes_each));
  if (count * bytes_each <= kAlone || parallel.threads <= 1) return body(int64_t(0), count);
  for_each_task(parallel, (count + piece - 1) / piece,
                [&](int64_t i) { body(i * piece, at_most(count, (i + 1) * piece)); });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
