// Fibers: stacks between which one OS thread changes by itself. On x86-64 a change is a dozen instructions; elsewhere
// it is ucontext's. Both sanitizers that follow stacks are told.
#pragma once

#include <cstddef>

#if !(defined(__x86_64__) && defined(__ELF__))
#include <ucontext.h>
#endif

namespace pyeff::gpu::emulate {

class Fiber {
 public:
  // The OS thread itself, which the others are entered from.
  Fiber() = default;
  ~Fiber() { drop(); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes it stand before body(argument), which never returns. May be called again, wherever the fiber is; its stack is
  // kept. False if there is no memory.
  bool prepare(void (*body)(void*), void* argument);
  // For ThreadSanitizer: what this fiber did comes before what is done after acquire(sync). Called from `here`.
  void order(Fiber& here, void* sync);
  // Makes this object the OS thread that calls.
  void adopt();
  // From this fiber, which must be the one that runs, to another one.
  void change_to(Fiber& other);

 private:
  void drop();
  static void enter();

  char* stack_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
#if defined(__x86_64__) && defined(__ELF__)
  void* at_ = nullptr;
#else
  ucontext_t at_;
#endif
  [[maybe_unused]] void* tsan_ = nullptr;
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace pyeff::gpu::emulate
