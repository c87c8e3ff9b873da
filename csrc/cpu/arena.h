// One call's scratch memory, cut into aligned pieces.
#pragma once

#include "memory.h"
#include "simd.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace pyeff {
namespace PYEFF_ISA {

struct Scratch {
  explicit Scratch(int64_t bytes) : block(scratch_allocate(bytes)) {}
  ~Scratch() { scratch_free(block); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* block;
};

// Cuts a block into pieces. With no block it only counts, so one layout function both sizes and places.
struct Arena {
  char* base;
  int64_t used = 0;

  explicit Arena(void* block) : base(static_cast<char*>(block)) {}
  // A null pointer for nothing.
  template <class T>
  T* take(int64_t count) {
    if (count == 0) return nullptr;
    used = (used + 63) / 64 * 64;
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += count * int64_t(sizeof(T));
#if defined(__SANITIZE_ADDRESS__)
    // A gap, so that a step past the end of a piece is seen.
    if (base) __asan_poison_memory_region(base + used, 64);
    used += 64;
#endif
    return piece;
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
