#include <cstring>

#include "check.h"
#include "cpu/isa.h"

// The sanitizers' allocators give up where others return null; one test asks for too much.
extern "C" const char* __asan_default_options();
extern "C" const char* __tsan_default_options();
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "allocator_may_return_null=1";
}
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "allocator_may_return_null=1";
}

// Runs the tests whose names contain the argument; all without one. `--child name` is how a test runs itself.
int main(int count, char** arguments) {
  if (count == 3 && std::strcmp(arguments[1], "--child") == 0) {
    for (const auto& child : check::children())
      if (std::strcmp(child.name, arguments[2]) == 0) return child.body(), 0;
    return 1;
  }
  const char* pattern = count > 1 ? arguments[1] : "";
  int run = 0;
  for (const auto& test : check::tests()) {
    if (std::strstr(test.name, pattern) == nullptr) continue;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    test.body();
    ++run;
  }
  std::printf("%d native tests passed; instruction sets:", run);
  for (int isa = 0; isa < pyeff::kIsaCount; ++isa) {
    if (pyeff::isa_built() & pyeff::isa_detected() & (1u << isa)) std::printf(" %s", pyeff::isa_name(isa));
  }
  std::printf("\n");
  return run > 0 ? 0 : 1;
}
