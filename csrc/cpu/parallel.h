// The kernels' view of threads: whoever calls a kernel says how to run a loop in parallel. The kernels so depend on no
// thread library, and a driver under ThreadSanitizer can hand them plain threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pyeff::cpu {

struct Parallel {
  // Calls body(argument, begin, end) on disjoint ranges that cover [0, count), on up to `threads` threads, and returns
  // when all are done.
  void (*run)(void* context, int64_t count, void (*body)(void* argument, int64_t begin, int64_t end), void* argument);
  void* context;
  int threads;
};

// Runs body(begin, end) over [0, count). `Body` must be a type of the calling instruction set's namespace, as a lambda
// written there is: it keeps this instantiation apart from those of the other sets.
template <class Body>
inline void parallel_for(const Parallel& parallel, int64_t count, Body&& body) {
  using Function = std::remove_reference_t<Body>;
  struct Call {
    static void range(void* argument, int64_t begin, int64_t end) { (*static_cast<Function*>(argument))(begin, end); }
  };
  if (count <= 0) return;
  if (count == 1 || parallel.threads <= 1) return body(static_cast<int64_t>(0), count);
  parallel.run(parallel.context, count, &Call::range, &body);
}

}  // namespace pyeff::cpu
