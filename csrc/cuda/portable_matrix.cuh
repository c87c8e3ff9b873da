// The matrix tiles of the portable layer on the GPU: see portable.cuh. Included by portable_device.cuh.
#pragma once

namespace pyeff::gpu {

PYEFF_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(row))
               : "memory");
}
PYEFF_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(row))
               : "memory");
}

namespace detail {

template <class T>
PYEFF_DEVICE void mma_one(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "mma_tile takes bf16 or f16");
  if constexpr (std::is_same<T, bf16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace detail

template <class T, int MT, int NT>
PYEFF_DEVICE void mma_tile(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2]) {
  PYEFF_UNROLL
  for (int m = 0; m < MT; ++m) {
    PYEFF_UNROLL
    for (int n = 0; n < NT; ++n) detail::mma_one<T>(d[m][n], a[m], b[n]);
  }
}

// The instructions are in the code for sm_90a alone, not in that for any later processor.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWgmma = true;
#define PYEFF_WGMMA_ASM(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kHasWgmma = false;
#define PYEFF_WGMMA_ASM(...) __trap()
#endif

PYEFF_DEVICE void wgmma_fence() { PYEFF_WGMMA_ASM("wgmma.fence.sync.aligned;" :: : "memory"); }
PYEFF_DEVICE void wgmma_commit() { PYEFF_WGMMA_ASM("wgmma.commit_group.sync.aligned;" :: : "memory"); }
template <int N>
PYEFF_DEVICE void wgmma_wait() {
  PYEFF_WGMMA_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int K>
PYEFF_DEVICE void wgmma_pin(float (&d)[K]) {
  PYEFF_UNROLL
  for (int i = 0; i < K; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
PYEFF_DEVICE void async_proxy_fence() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

PYEFF_DEVICE uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes, int swizzle = 128) {
  const auto encode = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffffu) >> 4); };
  return encode(detail::shared_address(shared)) | encode(static_cast<uint32_t>(leading_bytes)) << 16 |
         encode(static_cast<uint32_t>(stride_bytes)) << 32 |
         uint64_t{swizzle == 128  ? 1u
                  : swizzle == 64 ? 2u
                                  : 3u}
             << 62;
}

namespace detail {

template <int N, bool TransB, bool TransA>
struct Wgmma;

// Ten operands whose numbers begin with the digits `p`, and eight registers of d.
#define PYEFF_TEN(p) "%" p "0, %" p "1, %" p "2, %" p "3, %" p "4, %" p "5, %" p "6, %" p "7, %" p "8, %" p "9"
#define PYEFF_EIGHT(i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PYEFF_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PYEFF_REGISTERS_16 PYEFF_TEN("") ", %10, %11, %12, %13, %14, %15"
#define PYEFF_REGISTERS_32 PYEFF_TEN("") ", " PYEFF_TEN("1") ", " PYEFF_TEN("2") ", %30, %31"
#define PYEFF_REGISTERS_48 \
  PYEFF_TEN("") ", " PYEFF_TEN("1") ", " PYEFF_TEN("2") ", " PYEFF_TEN("3") ", " \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define PYEFF_REGISTERS_60 \
  PYEFF_TEN("") ", " PYEFF_TEN("1") ", " PYEFF_TEN("2") ", " PYEFF_TEN("3") ", " PYEFF_TEN("4") ", " PYEFF_TEN("5")
#define PYEFF_REGISTERS_64 PYEFF_REGISTERS_60 ", %60, %61, %62, %63"
#define PYEFF_REGISTERS_96 \
  PYEFF_REGISTERS_60 ", " PYEFF_TEN("6") ", " PYEFF_TEN("7") ", " PYEFF_TEN("8") ", " \
  "%90, %91, %92, %93, %94, %95"
#define PYEFF_REGISTERS_128                                                                                          \
  PYEFF_REGISTERS_60 ", " PYEFF_TEN("6") ", " PYEFF_TEN("7") ", " PYEFF_TEN("8") ", " PYEFF_TEN("9") ", " PYEFF_TEN( \
      "10") ", " PYEFF_TEN("11") ", %120, %121, %122, %123, %124, %125, %126, %127"
#define PYEFF_D_8 PYEFF_EIGHT(0)
#define PYEFF_D_16 PYEFF_EIGHT(0), PYEFF_EIGHT(8)
#define PYEFF_D_32 PYEFF_EIGHT(0), PYEFF_EIGHT(8), PYEFF_EIGHT(16), PYEFF_EIGHT(24)
#define PYEFF_D_48 PYEFF_D_32, PYEFF_EIGHT(32), PYEFF_EIGHT(40)
#define PYEFF_D_64 PYEFF_D_48, PYEFF_EIGHT(48), PYEFF_EIGHT(56)
#define PYEFF_D_96 PYEFF_D_64, PYEFF_EIGHT(64), PYEFF_EIGHT(72), PYEFF_EIGHT(80), PYEFF_EIGHT(88)
#define PYEFF_D_128 PYEFF_D_96, PYEFF_EIGHT(96), PYEFF_EIGHT(104), PYEFF_EIGHT(112), PYEFF_EIGHT(120)

// The operands after the `count` registers: descriptors, whether to add to d, whether b is transposed. Scales are 1.
#define PYEFF_WGMMA_TYPED(n, type, registers, outputs, a_at, b_at, add_at, at_at, bt_at)                        \
  PYEFF_WGMMA_ASM("{\n.reg .pred add;\nsetp.ne.b32 add, %" add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" n   \
                  "k16."                                                                                        \
                  "f32." type "." type " {" registers "}, %" a_at ", %" b_at ", add, 1, 1, %" at_at ", %" bt_at \
                  ";\n}" : outputs : "l"(a),                                                                    \
                  "l"(b), "r"(static_cast<int>(accumulate)), "n"(TransA ? 1 : 0), "n"(TransB ? 1 : 0) : "memory")
#define PYEFF_WGMMA(n, text, count, ...)                                                        \
  template <bool TransB, bool TransA>                                                           \
  struct Wgmma<n, TransB, TransA> {                                                             \
    template <class T>                                                                          \
    PYEFF_DEVICE static void run(float (&d)[count], uint64_t a, uint64_t b, bool accumulate) {  \
      if constexpr (std::is_same<T, bf16>::value)                                               \
        PYEFF_WGMMA_TYPED(text, "bf16", PYEFF_REGISTERS_##count, PYEFF_D_##count, __VA_ARGS__); \
      else                                                                                      \
        PYEFF_WGMMA_TYPED(text, "f16", PYEFF_REGISTERS_##count, PYEFF_D_##count, __VA_ARGS__);  \
    }                                                                                           \
  }
PYEFF_WGMMA(16, "16", 8, "8", "9", "10", "11", "12");
PYEFF_WGMMA(32, "32", 16, "16", "17", "18", "19", "20");
PYEFF_WGMMA(64, "64", 32, "32", "33", "34", "35", "36");
PYEFF_WGMMA(96, "96", 48, "48", "49", "50", "51", "52");
PYEFF_WGMMA(128, "128", 64, "64", "65", "66", "67", "68");
PYEFF_WGMMA(192, "192", 96, "96", "97", "98", "99", "100");
PYEFF_WGMMA(256, "256", 128, "128", "129", "130", "131", "132");

}  // namespace detail

template <class T, int N, bool TransB, bool TransA = false>
PYEFF_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "wgmma takes bf16 or f16");
  detail::Wgmma<N, TransB, TransA>::template run<T>(d, a, b, accumulate);
}

#undef PYEFF_TEN
#undef PYEFF_EIGHT
#undef PYEFF_REGISTERS_8
#undef PYEFF_REGISTERS_16
#undef PYEFF_REGISTERS_32
#undef PYEFF_REGISTERS_48
#undef PYEFF_REGISTERS_60
#undef PYEFF_REGISTERS_64
#undef PYEFF_REGISTERS_96
#undef PYEFF_REGISTERS_128
#undef PYEFF_D_8
#undef PYEFF_D_16
#undef PYEFF_D_32
#undef PYEFF_D_48
#undef PYEFF_D_64
#undef PYEFF_D_96
#undef PYEFF_D_128
#undef PYEFF_WGMMA
#undef PYEFF_WGMMA_TYPED
#undef PYEFF_WGMMA_ASM

}  // namespace pyeff::gpu
