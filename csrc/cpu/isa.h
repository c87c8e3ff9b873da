// The instruction sets that the CPU kernels are built for, and the choice between them at run time.
//
// A kernel source is compiled once for each set, inside the namespace pyeff::<set> (the macro PYEFF_ISA).
// Everything outside these namespaces must be free of inline functions that such a source could emit: the linker keeps
// one copy of each, and it might keep the one that was compiled for a larger set than the processor has.
#pragma once

#include <cstdint>

// PYEFF_IF_<set>(x) is x where the set was built, PYEFF_OR_NULL_<set>(x) else a null pointer.
#if defined(PYEFF_BUILT_PORTABLE)
#define PYEFF_IF_PORTABLE(...) __VA_ARGS__
#define PYEFF_OR_NULL_PORTABLE(...) __VA_ARGS__
#else
#define PYEFF_IF_PORTABLE(...)
#define PYEFF_OR_NULL_PORTABLE(...) nullptr
#endif
#if defined(PYEFF_BUILT_AVX2)
#define PYEFF_IF_AVX2(...) __VA_ARGS__
#define PYEFF_OR_NULL_AVX2(...) __VA_ARGS__
#else
#define PYEFF_IF_AVX2(...)
#define PYEFF_OR_NULL_AVX2(...) nullptr
#endif
#if defined(PYEFF_BUILT_AVX512)
#define PYEFF_IF_AVX512(...) __VA_ARGS__
#define PYEFF_OR_NULL_AVX512(...) __VA_ARGS__
#else
#define PYEFF_IF_AVX512(...)
#define PYEFF_OR_NULL_AVX512(...) nullptr
#endif
#if defined(PYEFF_BUILT_AVX512BF16)
#define PYEFF_IF_AVX512BF16(...) __VA_ARGS__
#define PYEFF_OR_NULL_AVX512BF16(...) __VA_ARGS__
#else
#define PYEFF_IF_AVX512BF16(...)
#define PYEFF_OR_NULL_AVX512BF16(...) nullptr
#endif

// Declares functions or objects in the namespace of every set that was built, and of the portable one: its types stand
// for all. Use inside pyeff.
// clang-format off
#define PYEFF_FOR_EACH_ISA(...)                      \
  namespace portable { __VA_ARGS__ }                 \
  PYEFF_IF_AVX2(namespace avx2 { __VA_ARGS__ })      \
  PYEFF_IF_AVX512(namespace avx512 { __VA_ARGS__ })  \
  PYEFF_IF_AVX512BF16(namespace avx512bf16 { __VA_ARGS__ })

// The addresses of all versions of what PYEFF_FOR_EACH_ISA declared, named as within pyeff; and that of the chosen set.
#define PYEFF_ALL_OF(...)                                                                        \
  ::pyeff::IsaTable<decltype(&::pyeff::portable::__VA_ARGS__)>{{                                 \
      PYEFF_OR_NULL_PORTABLE(&::pyeff::portable::__VA_ARGS__),                                   \
      PYEFF_OR_NULL_AVX2(&::pyeff::avx2::__VA_ARGS__),                                           \
      PYEFF_OR_NULL_AVX512(&::pyeff::avx512::__VA_ARGS__),                                       \
      PYEFF_OR_NULL_AVX512BF16(&::pyeff::avx512bf16::__VA_ARGS__)}}
#define PYEFF_CHOSEN(...) (PYEFF_ALL_OF(__VA_ARGS__).of[::pyeff::isa_chosen()])
// clang-format on

namespace pyeff {

// Ordered: each set contains the ones before it, and a build that has one has those before it too, but for a build of
// the native tests with the sets that PYEFF_ONLY_ISAS names.
enum Isa : int { kPortable, kAvx2, kAvx512, kAvx512Bf16, kIsaCount };

const char* isa_name(int isa);

// Bit i stands for set i.
unsigned isa_built();
unsigned isa_detected();

// The largest set that was built, that the processor has and that the environment variable PYEFF_CPU_ISA, if set, does
// not exclude. Throws std::runtime_error if that variable names no set.
Isa isa_chosen();

// Null where a set was not built.
template <class Pointer>
struct IsaTable {
  Pointer of[kIsaCount];
};

}  // namespace pyeff
