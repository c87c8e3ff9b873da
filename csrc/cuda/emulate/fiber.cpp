#include "cuda/emulate/fiber.h"

#include <sys/mman.h>

#include <cstdint>

#include "cuda/emulate/sanitize.h"

namespace pyeff::gpu::emulate {
namespace {

constexpr size_t kGuard = 4096;
constexpr size_t kStack = 256 * 1024;  // untouched pages cost nothing

// The fiber that a change is from, and that it is to.
thread_local Fiber* left = nullptr;
thread_local Fiber* entered = nullptr;

}  // namespace

#if defined(__x86_64__) && defined(__ELF__)
// The registers that a call leaves alone go on the stack of the fiber that is left, whose place goes to *from.
extern "C" void pyeff_fiber_change(void** from, void* to);
asm(R"(
.pushsection .text
.hidden pyeff_fiber_change
.globl pyeff_fiber_change
.type pyeff_fiber_change, @function
pyeff_fiber_change:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyeff_fiber_change, .-pyeff_fiber_change
.popsection
)");
#endif

bool Fiber::prepare(void (*body)(void*), void* argument) {
  if (stack_ == nullptr) {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return false;
    mprotect(memory, kGuard, PROT_NONE);
    stack_ = static_cast<char*>(memory) + kGuard;
  }
  // A fiber that was left in the midst of a kernel has marks there.
  unpoison(stack_, kStack);
  body_ = body;
  argument_ = argument;
  bottom_ = stack_;
  size_ = kStack;
  fake_stack_ = nullptr;
#if defined(__x86_64__) && defined(__ELF__)
  // As pyeff_fiber_change leaves it: six registers, then where to return to. enter() finds the stack as after a call.
  void** top = reinterpret_cast<void**>(stack_ + kStack) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  at_ = top;
#else
  getcontext(&at_);
  at_.uc_stack.ss_sp = stack_;
  at_.uc_stack.ss_size = kStack;
  at_.uc_link = nullptr;
  makecontext(&at_, &Fiber::enter, 0);
#endif
#ifdef PYEFF_TSAN
  if (tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
  tsan_ = __tsan_create_fiber(0);
#endif
  return true;
}

void Fiber::order([[maybe_unused]] Fiber& here, [[maybe_unused]] void* sync) {
#ifdef PYEFF_TSAN
  __tsan_switch_to_fiber(tsan_, 1);
  release(sync);
  __tsan_switch_to_fiber(here.tsan_, 1);
#endif
}

void Fiber::adopt() {
#ifdef PYEFF_TSAN
  tsan_ = __tsan_get_current_fiber();
#endif
}

void Fiber::enter() {
  Fiber* self = entered;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &left->bottom_, &left->size_);
#endif
  self->body_(self->argument_);
  __builtin_trap();
}

void Fiber::change_to(Fiber& other) {
  left = this;
  entered = &other;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fake_stack_, other.bottom_, other.size_);
#endif
#ifdef PYEFF_TSAN
  __tsan_switch_to_fiber(other.tsan_, 1);  // 1: the change itself orders nothing
#endif
#if defined(__x86_64__) && defined(__ELF__)
  pyeff_fiber_change(&at_, other.at_);
#else
  swapcontext(&at_, &other.at_);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, &left->bottom_, &left->size_);
#endif
}

void Fiber::drop() {
  if (stack_ == nullptr) return;
#ifdef PYEFF_TSAN
  __tsan_destroy_fiber(tsan_);
#endif
  unpoison(stack_, kStack);
  munmap(stack_ - kGuard, kGuard + kStack);
}

}  // namespace pyeff::gpu::emulate
