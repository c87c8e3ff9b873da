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

// Whole lines past the caches; what is before the first and behind the last of them as usual.
PYEFF_INLINE void copy_streamed(char* to, const char* from, int64_t bytes) {
  const int64_t head = at_most(bytes, int64_t(-reinterpret_cast<uintptr_t>(to) % uintptr_t(kLine)));
  if (head) __builtin_memcpy(to, from, size_t(head));
  const int64_t end = head + (bytes - head) / kLine * kLine;
#pragma GCC unroll 4
  for (int64_t at = head; at < end; at += kVectorBytes)
    stream(reinterpret_cast<float*>(to + at), load(reinterpret_cast<const float*>(from + at)));
  if (end < bytes) __builtin_memcpy(to + end, from + end, size_t(bytes - end));
}

PYEFF_INLINE void zero_streamed(char* to, int64_t bytes) {
  const int64_t head = at_most(bytes, int64_t(-reinterpret_cast<uintptr_t>(to) % uintptr_t(kLine)));
  if (head) __builtin_memset(to, 0, size_t(head));
  const int64_t end = head + (bytes - head) / kLine * kLine;
  for (int64_t at = head; at < end; at += kVectorBytes) stream(reinterpret_cast<float*>(to + at), FloatV{});
  if (end < bytes) __builtin_memset(to + end, 0, size_t(bytes - end));
}

// Where an output goes: how it is written, and what is said about its memory before.
struct Target {
  char* data;
  bool streamed;

  Target(void* data, int64_t bytes, int64_t least) : data(static_cast<char*>(data)), streamed(bytes >= least) {
    if (bytes >= least) expect_writes(data, bytes);
  }
  PYEFF_INLINE void copy(int64_t at, const void* from, int64_t bytes) const {
    if (streamed) return copy_streamed(data + at, static_cast<const char*>(from), bytes);
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

// body(begin, end) over [0, count) in pieces that are worth a task; on one thread where waking the others would take
// longer. Nothing may depend on the pieces.
template <class F>
void for_each_piece(const Parallel& parallel, int64_t count, int64_t bytes_each, const F& body) {
  constexpr int64_t kTask = int64_t(64) << 10, kAlone = int64_t(48) << 10;
  const int64_t piece = at_least(1, kTask / at_least(1, bytes_each));
  if (count * bytes_each <= kAlone || parallel.threads <= 1) return body(int64_t(0), count);
  for_each_task(parallel, (count + piece - 1) / piece,
                [&](int64_t i) { body(i * piece, at_most(count, (i + 1) * piece)); });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
