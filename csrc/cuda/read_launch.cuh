// From run-time options to the kernels' template arguments, and their launches.
#pragma once

#include <type_traits>

#include "cuda/read_common.cuh"
#include "cuda/read_plan.h"

namespace pyeff::gpu {

template <class Call>
void with_number(Number number, const Call& call) {
  if (number == Number::f32) call(float{});
  if (number == Number::bf16) call(bf16{});
  if (number == Number::f16) call(f16{});
}

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

struct Grid {
  int64_t x, y = 1, z = 1;
};

// Shared memory that a block may have on every architecture that the kernels are built for (12.0 has the least), and on
// the one that has warpgroups' matrix tiles.
constexpr int kSharedAnywhere = 99 << 10, kSharedHopper = 227 << 10;

class Launches {
 public:
  explicit Launches(void* stream) : stream_(stream) {}

  template <class P>
  void run(const char* name, void (*kernel)(P), const Grid& grid, int threads, int shared_bytes, const P& params,
           int cluster = 1) {
    if (error || grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
    Launch how;
    how.grid_x = static_cast<int>(grid.x), how.grid_y = static_cast<int>(grid.y), how.grid_z = static_cast<int>(grid.z);
    how.threads = threads, how.cluster = cluster, how.shared_bytes = shared_bytes;
    how.stream = stream_, how.name = name;
    error = launch(kernel, how, params);
  }

  const char* error = nullptr;

 private:
  void* stream_;
};

// Layers [first, first + kMaxLayers) of a problem, as kernel parameters; returns how many there are.
inline int64_t take_layers(Layers& to, const ReadProblem& p, int64_t first) {
  const int64_t count = p.layers - first < kMaxLayers ? p.layers - first : kMaxLayers;
  for (int64_t i = 0; i < count; ++i) to.layer[i] = p.phi[first + i];
  return count;
}

inline bool aligned_to(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// `base` shifted by numbers of the problem's type; null stays null.
inline void* shifted(void* base, int64_t numbers, const ReadSizes& s) {
  return base ? static_cast<char*>(base) + numbers * s.bytes : nullptr;
}
inline const void* shifted(const void* base, int64_t numbers, const ReadSizes& s) {
  return base ? static_cast<const char*>(base) + numbers * s.bytes : nullptr;
}

}  // namespace pyeff::gpu
