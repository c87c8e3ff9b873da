// y = x W^T + b on the shared product: what the benchmarks measure it by, and the dense case that other families
// compare to.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"
#include "parallel.h"

namespace pyeff {

struct LinearProblem {
  Number number;
  int64_t rows, in, out;
  const void* x;  // rows of `in`, x_stride apart
  int64_t x_stride;
  const void* packed;  // by linear_pack
  const void* bias;    // [out], or null
  void* y;             // [rows, out]
};

// linear_packed_bytes: the size of a packed weight. linear: false when there is not enough memory.
PYEFF_FOR_EACH_ISA(int64_t linear_packed_bytes(Number number, int64_t out, int64_t in);
                   void linear_pack(Number number, int64_t out, int64_t in, const void* weight, void* packed,
                                    const Parallel& parallel);
                   bool linear(const LinearProblem& problem, const Parallel& parallel);)

}  // namespace pyeff
