#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pyeff {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512", "avx512bf16"};

Isa largest(unsigned sets) {
  int isa = kPortable;
  for (int i = kPortable; i < kIsaCount; ++i) {
    if (sets >> i & 1u) isa = i;
  }
  return static_cast<Isa>(isa);
}

// A cap, not a demand: a set that is missing here stands for the next smaller one, so that one test run can name it on
// any machine.
Isa choose() {
  const char* cap = std::getenv("PYEFF_CPU_ISA");
  unsigned usable = isa_built() & isa_detected();
  if (cap == nullptr || *cap == '\0') return largest(usable);
  std::string known;
  for (int i = kPortable; i < kIsaCount; ++i) {
    if (std::strcmp(cap, kNames[i]) == 0) return largest(usable & ((2u << i) - 1));
    known += (i ? ", " : "") + std::string(kNames[i]);
  }
  throw std::runtime_error("PYEFF_CPU_ISA is '" + std::string(cap) + "', expected one of " + known);
}

}  // namespace

const char* isa_name(int isa) { return kNames[isa]; }

unsigned isa_built() {
  return 0u PYEFF_IF_PORTABLE(| 1u << kPortable) PYEFF_IF_AVX2(| 1u << kAvx2) PYEFF_IF_AVX512(| 1u << kAvx512)
      PYEFF_IF_AVX512BF16(| 1u << kAvx512Bf16);
}

// Each line asks for all that the flags of its set allow the compiler to use. The builtin also asks whether the
// operating system saves the wide registers. F16C came before AVX2 and is in every processor that has it.
unsigned isa_detected() {
  unsigned sets = 1u << kPortable;
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return sets;
  sets |= 1u << kAvx2;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return sets;
  }
  sets |= 1u << kAvx512;
  PYEFF_IF_AVX512BF16(if (__builtin_cpu_supports("avx512bf16")) sets |= 1u << kAvx512Bf16;)
#endif
  return sets;
}

Isa isa_chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace pyeff
