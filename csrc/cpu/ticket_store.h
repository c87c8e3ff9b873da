// What becomes of a ticket's sums: the epilogue of all its products.
#pragma once

#include "stream.h"
#include "ticket_source.h"

namespace pyeff {
namespace PYEFF_ISA {

// Whether the values are read in place, row by row (measured: where the paths cross, by a block's rows that fill a
// vector or do not).
template <class T>
bool few_tokens(int64_t tokens, int64_t bi) {
  return tokens <= (bi >= kLanes<Compute<T>> ? 6 : 2);
}

// act(sum + bias), and what the activation is taken of.
template <class T, Activation A>
struct StoreOutput {
  T *y, *z;
  const T* bias;
  int64_t stride;
  bool streamed;  // past the caches

  StoreOutput(void* y, void* z, const void* bias, int64_t stride, int64_t tokens, int64_t most)
      : y(static_cast<T*>(y)), z(static_cast<T*>(z)), bias(static_cast<const T*>(bias)), stride(stride) {
    const int64_t bytes = tokens * stride * int64_t(sizeof(T));
    streamed = bytes >= most && can_stream(this->y, stride) && (!z || can_stream(this->z, stride));
    expect_writes(y, bytes);
    if (z) expect_writes(z, bytes);
  }
  // The end of a thread's part.
  void end() const {
    if (streamed) end_of_stream();
  }
  PYEFF_INLINE void operator()(int64_t token, int64_t column, Vec<Compute<T>> sum, int64_t left) const {
    if (bias) sum += load_first(bias + column, left);
    const int64_t at = token * stride + column;
    if (streamed && left >= kLanes<Compute<T>>) {
      if (z) stream(z + at, sum);
      stream(y + at, activate<A, Compute<T>>(sum));
      return;
    }
    if (z) store_first(z + at, sum, left);
    store_first(y + at, activate<A, Compute<T>>(sum), left);
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
