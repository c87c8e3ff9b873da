// READ's recurrence on the GPU: what the kernels are given, free of torch and of CUDA's own headers.
#pragma once

#include <cstdint>

#include "cuda/machine.h"
#include "cuda/number.h"
#include "read_options.h"

namespace pyeff::gpu {

// One layer output [*, d]: row n starts (n / columns) * outer + (n % columns) * inner numbers after `data`, and its
// numbers are contiguous. `aligned`: every row starts at a multiple of 16 bytes.
struct ReadLayer {
  const void* data;
  int64_t outer, inner, columns;
  bool aligned;
};

// Weights and states are contiguous and of one number type; a null pointer stands for "not given". What is given may
// lie at any address of its type; outputs, and what a forward saved, begin at multiples of 16 bytes.
struct ReadProblem {
  Number number;
  Number phi_number;  // the same, or f32 beside a 16-bit number: phi is then rounded as it is read
  Cell cell;
  Norm norm;
  Reduce reduce;
  float eps;
  int64_t layers, tokens, width, rank;
  const ReadLayer* phi;  // [layers]
  const void *w_ih, *w_hh, *b_ih, *b_hh, *norm_weight, *norm_bias, *h0, *c0;
};

struct ReadForward {
  void *out, *c_last;   // [tokens, rank]; c_last for the LSTM
  void *h, *c, *gates;  // [layers, tokens, rank], the same, [layers, tokens, 4 rank]; null: not kept
  float* stats;         // [1 or 2][layers, tokens]: rstd, then the mean (layer norm)
};

struct ReadBackward {
  const void *grad_out, *grad_c;  // [tokens, rank]; either may be null
  const void *h, *c, *gates;      // as saved; null gates are computed again
  const float* stats;
  void* const* dphi;  // [layers] of [tokens, width], null where not wanted
  void *dw_ih, *dw_hh, *db_ih, *db_hh, *dnorm_weight, *dnorm_bias, *dh0, *dc0;
};

// Bytes of scratch that a call needs, from a base aligned to 256 bytes.
int64_t read_forward_scratch(const ReadProblem&, const ReadForward&, const Machine&);
int64_t read_backward_scratch(const ReadProblem&, const ReadBackward&, const Machine&);

// Null, or why a launch failed. Nothing waits for the GPU, and nothing is copied from the host.
const char* read_forward(const ReadProblem&, const ReadForward&, void* scratch, const Machine&, void* stream);
const char* read_backward(const ReadProblem&, const ReadBackward&, void* scratch, const Machine&, void* stream);

}  // namespace pyeff::gpu
