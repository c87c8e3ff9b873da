#include "memory.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyeff {
namespace {

constexpr int64_t kHugePage = int64_t(2) << 20;

std::atomic<bool>& poison() {
  static std::atomic<bool> on = [] {
    const char* value = std::getenv("PYEFF_POISON_SCRATCH");
    return value && std::strcmp(value, "1") == 0;
  }();
  return on;
}

}  // namespace

void* scratch_allocate(int64_t bytes) {
  void* block = nullptr;
  const bool large = bytes >= 2 * kHugePage;
  if (posix_memalign(&block, large ? kHugePage : 64, size_t(bytes + 64))) return nullptr;
  if (large) expect_writes(block, bytes);
  if (poison().load(std::memory_order_relaxed)) std::memset(block, 0xff, size_t(bytes + 64));
  return block;
}

void scratch_free(void* block) { std::free(block); }

void poison_scratch(bool on) { poison().store(on, std::memory_order_relaxed); }

void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kHugePage * kHugePage;
  // A hint: where it is refused, the pages come one by one as usual.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace pyeff
