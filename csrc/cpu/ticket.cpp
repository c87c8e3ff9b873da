#include "ticket.h"

#include "ticket_outer.h"
#include "ticket_sweep.h"

namespace pyeff {
namespace PYEFF_ISA {
namespace {

template <class T, Activation A>
struct StoreForward {
  T *y, *z;
  const T* bias;
  int64_t stride;

  PYEFF_INLINE void operator()(int64_t token, int64_t column, Vec<Compute<T>> sum, int64_t left) const {
    if (bias) sum += load_first(bias + column, left);
    const int64_t at = token * stride + column;
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
    constexpr Activation A = decltype(with)::kActivation;
    expect_writes(out.y, p.tokens * p.out * int64_t(sizeof(T)));
    if (out.z) expect_writes(out.z, p.tokens * p.out * int64_t(sizeof(T)));
    Sweep<T, false, PlainSource<T>, StoreForward<T, A>> sweep{
        p.tokens,
        p.out,
        p.bo,
        p.in,
        p.bi,
        index.row_start,
        index.column,
        nullptr,
        static_cast<const T*>(p.values),
        {static_cast<const T*>(p.x), p.x_stride},
        {static_cast<T*>(out.y), static_cast<T*>(out.z), static_cast<const T*>(out.bias), p.out},
        {},
        0,
        0,
        0};
    sweep.prepare();
    return sweep(parallel);
  });
}

bool ticket_backward(const TicketProblem& p, const TicketBackward& out, const Parallel& parallel) {
  const TicketParts index(p);
  return with_types(p, [&](auto with) {
    using T = typename decltype(with)::Number;
    constexpr Activation A = decltype(with)::kActivation;
    using Gradient = GradientSource<T, A>;
    const Gradient gradient{static_cast<const T*>(out.grad), out.grad_stride, static_cast<const T*>(out.saved), p.out};
    if (out.dx) {
      expect_writes(out.dx, p.tokens * p.in * int64_t(sizeof(T)));
      Sweep<T, true, Gradient, StoreForward<T, Activation::none>> sweep{
          p.tokens,
          p.in,
          p.bi,
          p.out,
          p.bo,
          index.column_start,
          index.row,
          index.slot,
          static_cast<const T*>(p.values),
          gradient,
          {static_cast<T*>(out.dx), nullptr, nullptr, p.in},
          {},
          0,
          0,
          0};
      sweep.prepare();
      if (!sweep(parallel)) return false;
    }
    if (!out.dvalues && !out.dbias) return true;
    Outer<T, Gradient> outer{p,
                             index,
                             gradient,
                             {static_cast<const T*>(p.x), p.x_stride},
                             static_cast<T*>(out.dvalues),
                             static_cast<T*>(out.dbias),
                             0,
                             0,
                             0,
                             {},
                             {}};
    return outer(parallel);
  });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
