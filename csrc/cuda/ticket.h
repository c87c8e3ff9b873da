// The ticket's linear layer on the GPU: what the kernels are given, free of torch and of CUDA's own headers.
#pragma once

#include <cstdint>

#include "cuda/machine.h"
#include "cuda/number.h"

namespace pyeff::gpu {

enum class TicketActivation : int { none, relu, gelu };

// y = act(x W^T + b) for a weight [out, width] of which `blocks` blocks [block_out, block_in] are there. The index lies
// on the device, in the layout of pyeff.Ticket, so nobody has looked into it: entries that are out of range are left
// out by the kernels. Rows of x and of the gradient are contiguous, `stride` numbers apart; all else is contiguous.
struct TicketProblem {
  Number number;
  int64_t tokens, width, out;
  int64_t block_out, block_in, blocks;
  const void* values;
  const int32_t* index;
  const void* x;
  int64_t x_stride;
  TicketActivation activation;

  int64_t rows() const { return (out + block_out - 1) / block_out; }
  int64_t columns() const { return (width + block_in - 1) / block_in; }
};

struct TicketForward {
  const void* bias;  // [out] or null
  void *y, *z;       // [tokens, out]; z, what the activation is taken of: null where not kept
};

struct TicketBackward {
  const void* grad;  // [tokens, out]
  int64_t grad_stride;
  const void* saved;           // y for relu, z for gelu
  void *dx, *dvalues, *dbias;  // [tokens, width], [blocks, block_out, block_in], [out]; null where not wanted
};

// Bytes of scratch that a call needs, from a base aligned to 256 bytes.
int64_t ticket_backward_scratch(const TicketProblem&, const TicketBackward&, const Machine&);

// Null, or why a launch failed. Nothing waits for the GPU, and nothing is copied from the host.
const char* ticket_forward(const TicketProblem&, const TicketForward&, const Machine&, void* stream);
const char* ticket_backward(const TicketProblem&, const TicketBackward&, void* scratch, const Machine&, void* stream);

}  // namespace pyeff::gpu
