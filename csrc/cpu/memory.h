// Scratch memory of the kernels: one block a call. arena.h cuts it into pieces.
#pragma once

#include <cstdint>

namespace pyeff {

// Returns nullptr when there is not enough memory. Large blocks ask for huge pages. With PYEFF_POISON_SCRATCH=1 in the
// environment the block is filled with NaN, so that what a kernel reads before it writes shows.
void* scratch_allocate(int64_t bytes);
void scratch_free(void* block);
// The same by a call, for tests that compare both in one process.
void poison_scratch(bool on);

// Asks for huge pages under memory that is about to be written for the first time: it saves most of the page faults.
void expect_writes(void* data, int64_t bytes);

}  // namespace pyeff
