// Loops that reach the machine's ceilings: multiply-adds on registers, and streaming through memory.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace pyeff {

enum class FmaType : int { kFloat64, kFloat32, kBFloat16 };

// Each function runs on all threads of `parallel` and counts what it did.
// fma_loop: the floating-point operations of `iterations` rounds on each thread, two for each multiply-add. bfloat16 is
// multiplied by the dot-product instruction where the set has one; elsewhere it is converted and costs what float32
// does.
PYEFF_FOR_EACH_ISA(double fma_loop(FmaType type, int64_t iterations, const Parallel& parallel);
                   // Copies `bytes` past the caches, as a kernel would write what it does not read again.
                   void stream_copy(void* to, const void* from, int64_t bytes, const Parallel& parallel);
                   // Reads `bytes` and returns a value that depends on all of them.
                   uint64_t stream_read(const void* from, int64_t bytes, const Parallel& parallel);)

}  // namespace pyeff
