// The linear layer of a ticket on the CPU: what the kernels are given, free of torch.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"
#include "parallel.h"

namespace pyeff {

enum class Activation : int { none, relu, gelu };  // gelu by the error function

// The weight [out, in] is a grid of blocks [bo, bi] of which nnz are stored, row by row, in `values`. `index` is the
// ticket's: see TicketParts. All tensors have one number type and contiguous rows; those without a stride are
// contiguous.
struct TicketProblem {
  Number number;
  Activation activation;
  int64_t tokens, in, out, bo, bi, nnz;
  const int32_t* index;
  const void* values;
  const void* x;  // [tokens, in], rows x_stride apart
  int64_t x_stride;
};

// An output of so many bytes is in no cache any more when it is read.
constexpr int64_t kTicketStreamed = int64_t(8) << 20;

struct TicketForward {
  const void* bias;  // [out], or null
  void *y, *z;       // [tokens, out]; z, what the activation is taken of, may be null
  int64_t streamed = kTicketStreamed;
};

struct TicketBackward {
  const void* grad;  // [tokens, out], rows grad_stride apart
  int64_t grad_stride;
  const void* saved;           // [tokens, out]: y of relu, z of gelu, else null
  void *dx, *dvalues, *dbias;  // [tokens, in], [nnz, bo, bi], [out]; null where not wanted
  int64_t streamed = kTicketStreamed;
};

// ticket_index_error: null, or what is wrong with an index. The kernels may be led outside of their tensors by an index
// with which anything is wrong.
// The others: false when there is not enough memory for the scratch.
PYEFF_FOR_EACH_ISA(const char* ticket_index_error(const TicketProblem&);
                   bool ticket_forward(const TicketProblem&, const TicketForward&, const Parallel&);
                   bool ticket_backward(const TicketProblem&, const TicketBackward&, const Parallel&);)

}  // namespace pyeff
