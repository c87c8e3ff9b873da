// One teacher for many masked students on the GPU: what the kernels are given, free of torch and of CUDA's own headers.
// Indices lie on the device, so nobody has looked into them: what is out of range counts as not kept, or is brought
// into it. Outputs are contiguous, and null where not wanted.
#pragma once

#include <cstdint>

#include "cuda/machine.h"
#include "cuda/number.h"

namespace pyeff::gpu {

// A tensor [outer, inner, width] whose rows of `width` numbers are contiguous; distances in numbers.
struct MultimaskRows {
  const void* data;
  int64_t outer, inner;
};

// B samples of T tokens, M masks of each, K slots of a row r = b * M + m, D numbers of a token.
struct MultimaskSizes {
  Number number;
  int64_t batch, masks, tokens, slots, width;

  int64_t rows() const { return batch * masks; }
};

// out[r, k] = x[r / masks, ids_keep[r, k]], zero from keep_len[r] on, where x is not read. With `of_rows`, x[r, ...].
struct MultimaskGather {
  MultimaskSizes sizes;
  MultimaskRows x;
  bool of_rows;
  const int32_t *ids_keep, *keep_len;
  void* out;  // [R, K, D]
};
const char* multimask_gather(const MultimaskGather&, const Machine&, void* stream);

// Sums over rows, in their order, in float: of what they kept (to[b, t] = sum_m from[r, inverse[r, t]]), or, with
// `hidden`, of what was hidden from them (to[f, t] = sum from[r, t]), for each sample or (`all`) for all of them.
struct MultimaskSums {
  MultimaskSizes sizes;
  MultimaskRows from;
  bool hidden, all;
  const int32_t *inverse, *lengths;  // lengths: of hidden
  void* to;                          // [B or 1, T, D]
};
int64_t multimask_sums_scratch(const MultimaskSums&, const Machine&);
const char* multimask_sums(const MultimaskSums&, void* scratch, const Machine&, void* stream);

struct MultimaskScatter {
  MultimaskSizes sizes;
  MultimaskRows x, fill;             // [R, K, D]; [B, T, D] or null, with a distance of 0 where all samples share it
  const int32_t *inverse, *lengths;  // [R, T], [B]
  const int64_t *seed, *sample_ids;  // [1], [B] or null
  float noise_std;
  void* out;  // [R, T, D]
};
const char* multimask_scatter(const MultimaskScatter&, const Machine&, void* stream);

// t *= factor; nothing is written where that is 1.
struct MultimaskRescale {
  Number number;
  int64_t count;
  void* t;
  const float* factor;
};
const char* multimask_rescale(const MultimaskRescale&, const Machine&, void* stream);

enum class MultimaskNorm : int { none, instance, layer, batch };

// out = weight * sum_k norm(layers[k]), then post_norm; or, to accumulate, added to what is there, padding untouched.
struct MultimaskTargets {
  MultimaskSizes sizes;  // masks and slots do not matter
  const MultimaskRows* layers;
  int64_t count;
  const int32_t* lengths;
  MultimaskNorm norm, post_norm;
  float eps, weight;
  bool accumulate;
  float* out;  // [B, T, D]
};
int64_t multimask_targets_scratch(const MultimaskTargets&, const Machine&);
const char* multimask_targets(const MultimaskTargets&, void* scratch, const Machine&, void* stream);

// Of the mean of the layers: `forward.out` is not looked at.
struct MultimaskTargetsBackward {
  MultimaskTargets forward;
  MultimaskRows grad;    // float
  void* const* dlayers;  // [B, T, D] each
};
int64_t multimask_targets_backward_scratch(const MultimaskTargetsBackward&, const Machine&);
const char* multimask_targets_backward(const MultimaskTargetsBackward&, void* scratch, const Machine&, void* stream);

enum class MultimaskKind : int { l2, smooth_l1, l1, cosine };

// Both directions of the loss: what is null is not wanted. Everything is times `scale` (over `count`, if there is one).
struct MultimaskLoss {
  MultimaskSizes sizes;  // slots do not matter
  MultimaskRows pred, target;
  const int32_t *inverse, *lengths;
  const int64_t* count;
  MultimaskKind kind;
  float beta;
  double scale;
  const float* grad;  // from above, a number or [R, T]; null: 1
  bool by_token;      // the loss, or grad, is [R, T]
  float* loss;        // a number or [R, T]
  void* dpred;        // [R, T, D]
  float* dtarget;     // [B, T, D]
  double* moments;    // [1 + 4 D]
};
int64_t multimask_loss_scratch(const MultimaskLoss&, const Machine&);
const char* multimask_loss(const MultimaskLoss&, void* scratch, const Machine&, void* stream);

}  // namespace pyeff::gpu
