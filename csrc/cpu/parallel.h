// Threads, seen from a kernel: a function that runs a body over a range. Who owns the threads is the caller's business.
#pragma once

#include <cstdint>

namespace pyeff {

struct Parallel {
  using Body = void (*)(void* argument, int64_t begin, int64_t end);
  // Splits [0, count) into at most `threads` pieces and returns when all have run.
  void (*run)(void* context, int64_t count, Body body, void* argument);
  void* context;
  int threads;
};

// One call of body(index) for every index below count, each on whichever thread comes to it.
template <class F>
void for_each_task(const Parallel& parallel, int64_t count, const F& body) {
  if (count <= 1 || parallel.threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  parallel.run(
      parallel.context, count,
      [](void* argument, int64_t begin, int64_t end) {
        const F& f = *static_cast<const F*>(argument);
        for (int64_t i = begin; i < end; ++i) f(i);
      },
      const_cast<F*>(&body));
}

}  // namespace pyeff
