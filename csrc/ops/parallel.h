// Torch's own threads, in the form that the kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace pyeff {

inline Parallel torch_parallel() {
  auto run = [](void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* argument) {
    torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { body(argument, begin, end); });
  };
  return {run, nullptr, static_cast<int>(torch::stable::get_num_threads())};
}

}  // namespace pyeff
