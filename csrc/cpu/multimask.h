// Many masks of one sample on the CPU: what the kernels are given, free of torch.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"
#include "parallel.h"

namespace pyeff {

// An output of so many bytes is in no cache any more when it is read.
constexpr int64_t kMultimaskStreamed = int64_t(4) << 20;

// [outer, inner, width] with contiguous rows; the distances between them are in elements.
struct StridedRows {
  const void* data;
  int64_t outer, inner;
};

// Rows are students, as many to each sample: row r is of sample r / (rows / batch). A plan says which of a sample's
// tokens are in the slots of each row; the parts that a kernel does not need may be null. All outputs are contiguous.
struct MultimaskProblem {
  Number number;
  int64_t batch, rows, tokens, slots, width;
  const int32_t* ids_keep;  // [rows, slots]
  const int32_t* keep_len;  // [rows]
  const int32_t* inverse;   // [rows, tokens], negative where not kept
  const int32_t* lengths;   // [batch]
  int64_t streamed = kMultimaskStreamed;
};

// Words are Philox4x32-7 of (position, mask and purpose, sample) by the seed.
struct MultimaskNoise {
  uint64_t seed;
  const int64_t* sample_ids;  // [batch], or null for 0 to batch - 1
  double std;                 // 0: none
};

struct BlockMasks {
  int64_t grid_width;  // 0: a sequence
  double keep, share;  // of the tokens: what is kept, centres of blocks
  int64_t length;
  bool of_kept;  // blocks are of what is kept
  int32_t *ids_keep, *keep_len, *inverse;
};

// One parameter; all pointers are to `count` contiguous numbers, and the parameters before it have `first`.
struct EmaTensor {
  Number number, param_number, copy_number;
  int64_t count, first;
  void* ema;
  const void* param;
  void* copy;  // or null
};

// The parts of a plan that are given must be in range: multimask_index_ok looks at ids_keep up to keep_len, and at
// inverse; keep_len and lengths are few. Those that say bool return false when there is not enough memory.
// clang-format off
PYEFF_FOR_EACH_ISA(
    bool multimask_index_ok(const MultimaskProblem&);
    // x [batch, tokens, width] to out [rows, slots, width], and back to dx.
    void multimask_gather(const MultimaskProblem&, const StridedRows& x, void* out, const Parallel&);
    void multimask_gather_backward(const MultimaskProblem&, const StridedRows& grad, void* dx, const Parallel&);
    // x [rows, slots, width] to out [rows, tokens, width]; fill [batch, tokens, width], or null data.
    void multimask_scatter(const MultimaskProblem&, const StridedRows& x, const StridedRows& fill,
                           const MultimaskNoise&, void* out, const Parallel&);
    // dfill [fills, tokens, width] for 1 fill or one of each sample; either output may be null.
    void multimask_scatter_backward(const MultimaskProblem&, const StridedRows& grad, void* dx, void* dfill,
                                    int64_t fills, const Parallel&);
    // slopes [heads], f64 for f64 and f32 otherwise; out and grad [rows, heads, slots, slots].
    bool multimask_relative_bias(const MultimaskProblem&, const void* slopes, int64_t heads, int64_t prefix, void* out,
                                 const Parallel&);
    bool multimask_relative_bias_backward(const MultimaskProblem&, const void* grad, int64_t heads, int64_t prefix,
                                          void* dslopes, const Parallel&);
    bool multimask_block_mask(const MultimaskProblem&, const MultimaskNoise&, const BlockMasks&, const Parallel&);
    void multimask_ema_update(const EmaTensor* tensors, int64_t count, double decay, int64_t streamed,
                              const Parallel&);)
// clang-format on

}  // namespace pyeff
