// The instruction sets that the CPU kernels are built for, and the choice between them at run time.
//
// A kernel source is compiled once for each set, inside the namespace pyeff::cpu::<set> (the macro PYEFF_ISA).
// Everything outside these namespaces must be free of inline functions that such a source could emit: the linker keeps
// one copy of each, and it might keep the one that was compiled for a larger set than the processor has.
#pragma once

#include <cstdint>

#if defined(PYEFF_BUILT_AVX2)
#define PYEFF_IF_AVX2(...) __VA_ARGS__
#else
#define PYEFF_IF_AVX2(...)
#endif
#if defined(PYEFF_BUILT_AVX512)
#define PYEFF_IF_AVX512(...) __VA_ARGS__
#else
#define PYEFF_IF_AVX512(...)
#endif
#if defined(PYEFF_BUILT_AVX512BF16)
#define PYEFF_IF_AVX512BF16(...) __VA_ARGS__
#else
#define PYEFF_IF_AVX512BF16(...)
#endif

// Declares functions in the namespace of every set that was built. Use inside pyeff::cpu.
#define PYEFF_FOR_EACH_ISA(...)                      \
  namespace portable {                               \
  __VA_ARGS__                                        \
  }                                                  \
  PYEFF_IF_AVX2(namespace avx2{__VA_ARGS__})         \
  PYEFF_IF_AVX512(namespace avx512{__VA_ARGS__})     \
  PYEFF_IF_AVX512BF16(namespace avx512bf16{__VA_ARGS__})

// The chosen set's version of a function that PYEFF_FOR_EACH_ISA declared, named as within pyeff::cpu.
#define PYEFF_CHOSEN(...)                                           \
  ::pyeff::cpu::chosen_of(::pyeff::cpu::IsaTable<decltype(&::pyeff::cpu::portable::__VA_ARGS__)>{ \
      {&::pyeff::cpu::portable::__VA_ARGS__,                        \
       PYEFF_IF_AVX2(&::pyeff::cpu::avx2::__VA_ARGS__, )            \
       PYEFF_IF_AVX512(&::pyeff::cpu::avx512::__VA_ARGS__, )        \
       PYEFF_IF_AVX512BF16(&::pyeff::cpu::avx512bf16::__VA_ARGS__, )}})

namespace pyeff::cpu {

// Ordered: each set contains the ones before it, and a build that has one has those before it too.
enum Isa : int { kPortable, kAvx2, kAvx512, kAvx512Bf16, kIsaCount };

const char* isa_name(int isa);

// Bit i stands for set i.
unsigned isa_built();
unsigned isa_detected();

// The largest set that was built, that the processor has and that the environment variable PYEFF_CPU_ISA, if set, does
// not exclude. Throws std::runtime_error if that variable names no set.
Isa isa_chosen();

template <class Function>
struct IsaTable {
  Function functions[kIsaCount];
};

template <class Function>
Function chosen_of(const IsaTable<Function>& table) {
  return table.functions[isa_chosen()];
}

}  // namespace pyeff::cpu
