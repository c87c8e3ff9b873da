// READ's recurrence on the CPU: what the kernels are given, free of torch.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"
#include "parallel.h"
#include "read_options.h"

namespace pyeff {

// The rows of one layer output [*, d]: row n starts where the mixed-radix digits of n over `size` point.
struct ReadRows {
  static constexpr int kMaxDims = 8;
  const void* data;
  int64_t inner;  // stride along d, in elements
  int dims;
  int64_t size[kMaxDims], stride[kMaxDims];
};

// Weights, states and what is saved are contiguous and of one number type; a null pointer stands for "not given".
struct ReadProblem {
  Number number;
  Number phi_number;  // the same, or f32 beside bf16 weights: phi is then rounded as it is packed
  Cell cell;
  Norm norm;
  Reduce reduce;
  double eps;
  int64_t layers, tokens, width, rank;
  const ReadRows* phi;  // [layers]
  const void *w_ih, *w_hh, *b_ih, *b_hh, *norm_weight, *norm_bias, *h0, *c0;
};

struct ReadForward {
  void *out, *c_last;   // [tokens, rank]; c_last for the LSTM
  void *h, *c, *gates;  // [layers, tokens, rank], the same, [layers, tokens, saved gates * rank]
  void* stats;          // [1 or 2][layers, tokens] of the compute type: rstd, then the mean (layer norm)
};

struct ReadBackward {
  const void *grad_out, *grad_c;      // [tokens, rank]; either may be null
  const void *h, *c, *gates, *stats;  // as saved; null gates are computed again
  void* const* dphi;                  // [layers] of [tokens, width], null where not wanted
  void *dw_ih, *dw_hh, *db_ih, *db_hh, *dnorm_weight, *dnorm_bias, *dh0, *dc0;
};

// False when there is not enough memory for the scratch.
PYEFF_FOR_EACH_ISA(bool read_forward(const ReadProblem&, const ReadForward&, const Parallel&);
                   bool read_backward(const ReadProblem&, const ReadBackward&, const Parallel&);)

}  // namespace pyeff
