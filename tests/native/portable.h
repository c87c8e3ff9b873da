// What the tests of the portable layer share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/portable.cuh"
#include "support.h"

namespace check {

// Runs it, and expects it to run.
template <class P>
void run(void (*kernel)(P), const pyeff::gpu::Launch& how, const P& params) {
  const char* error = pyeff::gpu::launch(kernel, how, params);
  if (error != nullptr) {
    std::fprintf(stderr, "%s\n", error);
    std::exit(1);
  }
}

// Runs it, and expects a complaint with each of these in it.
template <class P>
void refused(void (*kernel)(P), const pyeff::gpu::Launch& how, const P& params,
             std::initializer_list<const char*> words) {
  const char* error = pyeff::gpu::launch(kernel, how, params);
  for (const char* word : words) {
    if (error == nullptr || std::string(error).find(word) == std::string::npos) {
      std::fprintf(stderr, "expected '%s', got: %s\n", word, error != nullptr ? error : "no complaint");
      std::exit(1);
    }
  }
}

inline pyeff::gpu::Launch blocks(int grid, int threads, int shared_bytes = 0, int cluster = 1) {
  pyeff::gpu::Launch how;
  how.grid_x = grid;
  how.threads = threads;
  how.shared_bytes = shared_bytes;
  how.cluster = cluster;
  return how;
}

}  // namespace check
