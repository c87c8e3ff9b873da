// What a program of this folder prints: a line for each kernel of name pattern, threads of a block, bytes of dynamic
// shared memory, the one architecture (0: all) that launches it, and the matrix instruction that must be in it ("none":
// none may be). The compiler's reports know none of it.
#pragma once

#include <cstdio>

namespace pyeff::gpu {

constexpr int kWgmmaArch = 90;

inline void line(const char* name, int threads, int shared, int arch = 0, const char* matrix = "none") {
  std::printf("%s\t%d\t%d\t%d\t%s\n", name, threads, shared, arch, matrix);
}

template <class... Parts>
void line(int threads, int shared, int arch, const char* matrix, const char* form, Parts... parts) {
  char name[64];
  std::snprintf(name, sizeof name, form, parts...);
  line(name, threads, shared, arch, matrix);
}

}  // namespace pyeff::gpu
