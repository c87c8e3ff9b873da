// Plans of masks on the GPU, and what goes with them: what the kernels are given. As for multimask.h, nobody has looked
// into indices that lie on the device.
#pragma once

#include <cstdint>

#include "cuda/machine.h"
#include "cuda/number.h"

namespace pyeff::gpu {

// R rows of K slots, H heads.
struct MultimaskBias {
  Number number;  // of the bias, or of its gradient
  int64_t rows, slots, heads, prefix;
  const int32_t *ids_keep, *keep_len;  // [R, K], [R]
};

// out[r, h, i, j] = -slopes[h] |id_i - id_j|; 0 for what has no place, -inf for keys past what the row keeps.
const char* multimask_relative_bias(const MultimaskBias&, const float* slopes, void* out, const Machine&, void* stream);

// dslopes[h] = -sum grad[r, h, i, j] |id_i - id_j|.
int64_t multimask_relative_bias_scratch(const MultimaskBias&);
const char* multimask_relative_bias_backward(const MultimaskBias&, const void* grad, float* dslopes, void* scratch,
                                             const Machine&, void* stream);

// Masks of blocks; see pyeff/reference/block_mask.py, whose masks these are bit for bit.
struct MultimaskBlocks {
  int64_t rows, masks, tokens, slots;
  int64_t grid_width;                        // of a grid; 0 for a sequence
  int64_t length;                            // of a block in each dimension
  double keep, share;                        // of the tokens: those that are kept, and centres of blocks
  bool inverse;                              // blocks are of what is kept
  const int64_t *seed, *sample_ids;          // [1], [B] or null
  const int32_t* lengths;                    // [B]
  int32_t *ids_keep, *keep_len, *kept_slot;  // [R, K], [R], [R, T]
};
int64_t multimask_block_mask_scratch(const MultimaskBlocks&);
const char* multimask_block_mask(const MultimaskBlocks&, void* scratch, const Machine&, void* stream);

// One tensor of a moving average: ema = decay ema + (1 - decay) param, and a copy of it, or null.
struct MultimaskAverage {
  void* ema;
  const void* param;
  void* copy;
  int64_t count;
  Number ema_number, param_number, copy_number;
};
const char* multimask_ema_update(const MultimaskAverage* tensors, int64_t count, const double* decay, const Machine&,
                                 void* stream);

}  // namespace pyeff::gpu
