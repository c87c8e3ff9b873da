// Teacher targets and the loss of masked students on the CPU: what the kernels are given, free of torch.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"
#include "parallel.h"

namespace pyeff {

enum class MaskNorm : int { none, instance, layer, batch };
enum class MaskLossKind : int { l2, smooth_l1, l1, cosine };

// A tensor [samples, tokens, width] whose rows are contiguous; strides in elements.
struct MaskRows {
  const void* data;
  int64_t sample, token;
};

// An output of so many bytes is in no cache any more when it is read.
constexpr int64_t kMaskStreamed = int64_t(8) << 20;

// Means, variances and sums are of the number's wide type: double for double, else float. All tensors that are given
// without strides are contiguous.
struct TargetsProblem {
  Number number;
  MaskNorm norm, post_norm;
  double eps;
  int64_t batch, tokens, width, count;
  const MaskRows* layers;  // `count` of them
  const int32_t* lengths;  // [batch], in [0, tokens]
};

struct TargetsForward {
  double weight;
  bool accumulate;  // adds to out, and leaves its padding alone; without a post norm
  void* out;        // wide [batch, tokens, width]
  int64_t streamed = kMaskStreamed;
};

struct TargetsBackward {
  MaskRows grad;         // wide
  void* const* dlayers;  // each [batch, tokens, width]
  int64_t streamed = kMaskStreamed;
};

// Row r = b * masks + m is sample b under its mask m.
struct MaskLossProblem {
  Number number;
  MaskLossKind kind;
  double beta, scale;
  int64_t batch, masks, tokens, width;
  MaskRows pred, target;   // of all rows; of all samples, wide
  const int32_t* inverse;  // [rows, tokens]: negative where a token is hidden
  const int32_t* lengths;  // [batch]
  const int64_t* count;    // what the loss is divided by, or null
};

struct MaskLossForward {
  void* loss;       // wide: a number, or [rows, tokens]
  bool each;        // the latter
  void* dpred;      // [rows, tokens, width], or null
  double* moments;  // [1 + 4 width], or null
  int64_t streamed = kMaskStreamed;
};

struct MaskLossBackward {
  const void* grad;  // wide, as the loss
  bool each;
  void* dpred;    // [rows, tokens, width], or null
  void* dtarget;  // wide [batch, tokens, width], or null
  int64_t streamed = kMaskStreamed;
};

// False when there is not enough memory for the scratch.
PYEFF_FOR_EACH_ISA(bool multimask_targets(const TargetsProblem&, const TargetsForward&, const Parallel&);
                   bool multimask_targets_backward(const TargetsProblem&, const TargetsBackward&, const Parallel&);
                   bool multimask_loss(const MaskLossProblem&, const MaskLossForward&, const Parallel&);
                   bool multimask_loss_backward(const MaskLossProblem&, const MaskLossBackward&, const Parallel&);)

}  // namespace pyeff
