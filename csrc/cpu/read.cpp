#include "read_backward.h"

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

}  // namespace

bool read_forward(const ReadProblem& p, const ReadForward& out, const Parallel& parallel) {
  return with_types(p, out, parallel, [](auto number, auto cell, const auto&... rest) {
    return run_read_forward<decltype(number), decltype(cell)>(rest...);
  });
}

bool read_backward(const ReadProblem& p, const ReadBackward& out, const Parallel& parallel) {
  return with_types(p, out, parallel, [](auto number, auto cell, const auto&... rest) {
    return run_read_backward<decltype(number), decltype(cell)>(rest...);
  });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
