// From READ's run-time options to the kernels' template arguments.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/read_common.cuh"
#include "cuda/read_plan.h"

namespace pyeff::gpu {

// The number types of the product and of phi.
template <class Call>
void with_numbers(const ReadProblem& p, const Call& call) {
  with_number(p.number, [&](auto number) {
    using T = decltype(number);
    if constexpr (!std::is_same<T, float>::value) {
      if (p.phi_number == Number::f32) return call(T{}, float{});
    }
    call(T{}, T{});
  });
}

template <class Call>
void with_cell(Cell cell, const Call& call) {
  if (cell == Cell::rnn) call(std::integral_constant<Cell, Cell::rnn>());
  if (cell == Cell::gru) call(std::integral_constant<Cell, Cell::gru>());
  if (cell == Cell::lstm) call(std::integral_constant<Cell, Cell::lstm>());
}

// Layers [first, first + kMaxLayers) of a problem, as kernel parameters; returns how many there are.
inline int64_t take_layers(Layers& to, const ReadProblem& p, int64_t first) {
  const int64_t count = p.layers - first < kMaxLayers ? p.layers - first : kMaxLayers;
  for (int64_t i = 0; i < count; ++i) to.layer[i] = p.phi[first + i];
  return count;
}

// `base` shifted by numbers of the problem's type; null stays null.
inline void* shifted(void* base, int64_t numbers, const ReadSizes& s) {
  return base ? static_cast<char*>(base) + numbers * s.bytes : nullptr;
}
inline const void* shifted(const void* base, int64_t numbers, const ReadSizes& s) {
  return base ? static_cast<const char*>(base) + numbers * s.bytes : nullptr;
}

}  // namespace pyeff::gpu
