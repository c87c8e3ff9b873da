// What the emulator tells the sanitizers. Its own sources are not instrumented for ThreadSanitizer (what fibers share
// there is the emulator's business), so that what a primitive does to a kernel's memory is reported by these.
#pragma once

#include <cstddef>

// PYEFF_TSAN is set by cmake where the kernels are instrumented; the compiler does not say so here.
#ifdef PYEFF_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pyeff::gpu::emulate {

// How many Unseen there are; a fiber that traps leaves them behind.
extern __thread int unseen_now;

// As long as it lives, this fiber's calls of the C library are not looked at either.
struct Unseen {
#ifdef PYEFF_TSAN
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    ++unseen_now;
  }
  ~Unseen() { end(); }
  static void end() {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    --unseen_now;
  }
  static void end_all() {
    while (unseen_now > 0) end();
  }
#else
  static void end_all() {}
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

inline void acquire([[maybe_unused]] void* sync) {
#ifdef PYEFF_TSAN
  __tsan_acquire(sync);
#endif
}
inline void release([[maybe_unused]] void* sync) {
#ifdef PYEFF_TSAN
  __tsan_release(sync);
#endif
}
inline void was_read([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef PYEFF_TSAN
  __tsan_read_range(const_cast<void*>(p), bytes);
#endif
}
inline void was_written([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#ifdef PYEFF_TSAN
  __tsan_write_range(p, bytes);
#endif
}
inline void poison([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(p, bytes);
#endif
}
inline void unpoison([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(p, bytes);
#endif
}

}  // namespace pyeff::gpu::emulate
