#include "read_backward.h"
#include "read_small.h"

namespace pyeff {
namespace PYEFF_ISA {
namespace {

template <class T, class Out, class Function>
bool with_cell(const ReadProblem& p, const Out& out, const Parallel& parallel, const Function& run) {
  switch (p.cell) {
    case Cell::rnn:
      return run(T{}, Rnn{}, p, out, parallel);
    case Cell::gru:
      return run(T{}, Gru{}, p, out, parallel);
    default:
      return run(T{}, Lstm{}, p, out, parallel);
  }
}

template <class Out, class Function>
bool with_types(const ReadProblem& p, const Out& out, const Parallel& parallel, const Function& run) {
  switch (p.number) {
    case Number::f64:
      return with_cell<double>(p, out, parallel, run);
    case Number::f32:
      return with_cell<float>(p, out, parallel, run);
    default:
      return with_cell<bf16>(p, out, parallel, run);
  }
}

// Up to here the weights are read in place (measured: the paths cross between 16 and 32 tokens on two cores).
constexpr int64_t kSmallTokens = 16;

}  // namespace

bool read_forward(const ReadProblem& p, const ReadForward& out, const Parallel& parallel) {
  const bool few = p.tokens <= kSmallTokens;
  return with_types(p, out, parallel, [few](auto number, auto cell, const auto&... rest) {
    using T = decltype(number);
    using CellT = decltype(cell);
    return few ? run_read_small<T, CellT>(rest...) : run_read_forward<T, CellT>(rest...);
  });
}

bool read_backward(const ReadProblem& p, const ReadBackward& out, const Parallel& parallel) {
  return with_types(p, out, parallel, [](auto number, auto cell, const auto&... rest) {
    return run_read_backward<decltype(number), decltype(cell)>(rest...);
  });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
