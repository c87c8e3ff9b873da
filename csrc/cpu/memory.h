// Scratch memory of the kernels: one block a call, cut into aligned pieces.
#pragma once

#include <cstdint>

namespace pyeff {

// Returns nullptr when there is not enough memory. Large blocks ask for huge pages. With PYEFF_POISON_SCRATCH=1 in the
// environment the block is filled with NaN, so that what a kernel reads before it writes shows.
void* scratch_allocate(int64_t bytes);
void scratch_free(void* block);

// Asks for huge pages under memory that is about to be written for the first time: it saves most of the page faults.
void expect_writes(void* data, int64_t bytes);

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
  template <class T>
  T* take(int64_t count) {
    used = (used + 63) / 64 * 64;
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += count * int64_t(sizeof(T));
    return piece;
  }
};

}  // namespace pyeff
