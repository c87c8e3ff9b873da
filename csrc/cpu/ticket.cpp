#include "ticket.h"

#include "stream.h"
#include "ticket_outer.h"
#include "ticket_small.h"
#include "ticket_sweep.h"

namespace pyeff {
namespace PYEFF_ISA {
namespace {

// Up to here the values are read in place, row by row.
constexpr int64_t kSmallTokens = 7;

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
    streamed =
        tokens > kSmallTokens && bytes >= most && can_stream(this->y, stride) && (!z || can_stream(this->z, stride));
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

template <class T, Activation A>
struct With {
  using Number = T;
  static constexpr Activation kActivation = A;
};

template <class T, class Function>
bool with_activation(Activation activation, const Function& run) {
  switch (activation) {
    case Activation::relu:
      return run(With<T, Activation::relu>{});
    case Activation::gelu:
      return run(With<T, Activation::gelu>{});
    default:
      return run(With<T, Activation::none>{});
  }
}

template <class Function>
bool with_types(const TicketProblem& p, const Function& run) {
  switch (p.number) {
    case Number::f64:
      return with_activation<double>(p.activation, run);
    case Number::f32:
      return with_activation<float>(p.activation, run);
    default:
      return with_activation<bf16>(p.activation, run);
  }
}

}  // namespace

const char* ticket_index_error(const TicketProblem& p) { return ticket_index_problem(TicketParts(p)); }

bool ticket_forward(const TicketProblem& p, const TicketForward& out, const Parallel& parallel) {
  const TicketParts index(p);
  return with_types(p, [&](auto with) {
    using T = typename decltype(with)::Number;
    using Store = StoreOutput<T, decltype(with)::kActivation>;
    const Store store(out.y, out.z, out.bias, p.out, p.tokens, out.streamed);
    if (p.tokens <= kSmallTokens) return run_small_forward<T>(p, index, store, parallel);
    const PlainSource<T> x{static_cast<const T*>(p.x), p.x_stride};
    return Sweep<T, false, PlainSource<T>, Store>(p.tokens, {p.out, p.bo}, {p.in, p.bi}, index.row_start, index.column,
                                                  nullptr, static_cast<const T*>(p.values), x, store)(parallel);
  });
}

bool ticket_backward(const TicketProblem& p, const TicketBackward& out, const Parallel& parallel) {
  const TicketParts index(p);
  return with_types(p, [&](auto with) {
    using T = typename decltype(with)::Number;
    using Gradient = GradientSource<T, decltype(with)::kActivation>;
    using Store = StoreOutput<T, Activation::none>;
    const Gradient gradient{static_cast<const T*>(out.grad), out.grad_stride, static_cast<const T*>(out.saved), p.out};
    if (out.dx) {
      const Store store(out.dx, nullptr, nullptr, p.in, p.tokens, out.streamed);
      const bool done =
          p.tokens <= kSmallTokens
              ? run_small_backward<T>(p, index, gradient, store, parallel)
              : Sweep<T, true, Gradient, Store>(p.tokens, {p.in, p.bi}, {p.out, p.bo}, index.column_start, index.row,
                                                index.slot, static_cast<const T*>(p.values), gradient, store)(parallel);
      if (!done) return false;
    }
    if (!out.dvalues && !out.dbias) return true;
    const PlainSource<T> x{static_cast<const T*>(p.x), p.x_stride};
    return Outer<T, Gradient>(p, index, gradient, x, static_cast<T*>(out.dvalues),
                              static_cast<T*>(out.dbias))(parallel);
  });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
