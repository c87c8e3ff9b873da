// What every operation launches its kernels with: number types as template arguments, grids, and how often to split.
#pragma once

#include "cuda/common.cuh"
#include "cuda/number.h"

namespace pyeff::gpu {

template <class Call>
void with_number(Number number, const Call& call) {
  if (number == Number::f32) call(float{});
  if (number == Number::bf16) call(bf16{});
  if (number == Number::f16) call(f16{});
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
    if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
      error = "more blocks are needed than a grid has";
      return;
    }
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

inline bool aligned_to(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Splits of `tiles` products that keep the processors busiest: what a split takes, times the rounds of blocks, is
// least. More splits are only taken where they gain a tenth: each has partial sums to write and to add.
inline int64_t best_splits(int64_t tiles, int64_t processors) {
  int64_t best = 1;
  double least = static_cast<double>(div_up(tiles, processors));
  for (int64_t splits = 2; splits <= 64 && tiles * splits <= 4 * processors; ++splits) {
    const double time = static_cast<double>(div_up(tiles * splits, processors)) / static_cast<double>(splits);
    if (time < 0.9 * least) best = splits, least = time;
  }
  return best;
}

}  // namespace pyeff::gpu
