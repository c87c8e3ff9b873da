// The portable layer on the CPU: see portable.cuh, which includes this outside nvcc. What a primitive does is in
// machine.cpp, memory.cpp and matrix.cpp; here are the types, and where in the source the call stands.
#pragma once

#include <cmath>
#include <cstdlib>

#include "cuda/emulate/emulate.h"

namespace pyeff::gpu {

// A last parameter that the callers leave out: the place of the call, for the reports.
#define PYEFF_HERE emulate::Site site = emulate::Site::here(__builtin_FILE(), __builtin_LINE())

inline int thread_index() { return emulate::running->index; }
inline int block_size() { return emulate::running->block->threads; }
inline int block_index_x() { return emulate::running->block->index[0]; }
inline int block_index_y() { return emulate::running->block->index[1]; }
inline int block_index_z() { return emulate::running->block->index[2]; }
inline int grid_size_x() { return emulate::running->block->grid[0]; }
inline int grid_size_y() { return emulate::running->block->grid[1]; }
inline int grid_size_z() { return emulate::running->block->grid[2]; }
inline int lane() { return emulate::running->index % kWarp; }
inline int warp() { return emulate::running->index / kWarp; }

inline char* shared_memory() { return emulate::running->block->shared; }

inline void barrier(PYEFF_HERE) { emulate::block_barrier(site); }
inline void named_barrier(int id, int threads, PYEFF_HERE) { emulate::named_barrier(id, threads, site); }
inline void warp_barrier(PYEFF_HERE) { emulate::warp_barrier(site); }

namespace detail {

template <class T>
uint64_t as_bits(T v) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "32 or 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
template <class T>
constexpr void check_element() {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 8,
                "1, 2, 4 or 8 bytes; there is a 16-byte version");
}

}  // namespace detail

template <class T>
T shuffle(T v, int from, PYEFF_HERE) {
  return detail::from_bits<T>(emulate::shuffle(detail::as_bits(v), from, site));
}
template <class T>
T shuffle_xor(T v, int mask, PYEFF_HERE) {
  return detail::from_bits<T>(emulate::shuffle(detail::as_bits(v), lane() ^ mask, site));
}
inline uint32_t ballot(bool p, PYEFF_HERE) { return emulate::ballot(p, site); }
inline bool any(bool p, PYEFF_HERE) { return emulate::ballot(p, site) != 0; }
inline bool all(bool p, PYEFF_HERE) { return emulate::ballot(p, site) == 0xffffffffu; }

template <class T>
T load(const T* p, PYEFF_HERE) {
  detail::check_element<T>();
  emulate::check_global(p, sizeof(T), false, site);
  return *p;
}
template <class T>
void store(T* p, std::common_type_t<T> v, PYEFF_HERE) {
  detail::check_element<T>();
  emulate::check_global(p, sizeof(T), true, site);
  *p = v;
}
inline Vec16 load16(const void* p, PYEFF_HERE) {
  emulate::check_global(p, 16, false, site);
  return *static_cast<const Vec16*>(p);
}
inline void store16(void* p, const Vec16& v, PYEFF_HERE) {
  emulate::check_global(p, 16, true, site);
  *static_cast<Vec16*>(p) = v;
}

template <class T>
T load_shared(const T* p, PYEFF_HERE) {
  detail::check_element<T>();
  emulate::check_shared(p, sizeof(T), false, site);
  return *p;
}
template <class T>
void store_shared(T* p, std::common_type_t<T> v, PYEFF_HERE) {
  detail::check_element<T>();
  emulate::check_shared(p, sizeof(T), true, site);
  *p = v;
}
inline Vec16 load_shared16(const void* p, PYEFF_HERE) {
  emulate::check_shared(p, 16, false, site);
  return *static_cast<const Vec16*>(p);
}
inline void store_shared16(void* p, const Vec16& v, PYEFF_HERE) {
  emulate::check_shared(p, 16, true, site);
  *static_cast<Vec16*>(p) = v;
}

inline void copy_async16(void* shared, const void* global, bool valid, PYEFF_HERE) {
  emulate::copy_async(shared, global, valid, site);
}
inline void copy_async_commit() { emulate::copy_async_commit(); }
template <int N>
void copy_async_wait() {
  static_assert(N >= 0, "a number of groups");
  emulate::copy_async_wait(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, PYEFF_HERE) { emulate::ldmatrix(r, row, false, site); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, PYEFF_HERE) { emulate::ldmatrix(r, row, true, site); }

template <class T, int MT, int NT>
void mma_tile(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2], PYEFF_HERE) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "mma_tile takes bf16 or f16");
  emulate::mma(&d[0][0][0], &a[0][0], &b[0][0], MT, NT, std::is_same<T, bf16>::value, site);
}

constexpr bool kHasWgmma = true;
inline void wgmma_fence() { emulate::wgmma_fence(); }
inline void wgmma_commit() { emulate::wgmma_commit(); }
template <int N>
void wgmma_wait(PYEFF_HERE) {
  static_assert(N >= 0 && N < 8, "PTX allows 0 to 7 groups");
  emulate::wgmma_wait(N, site);
}
template <int K>
void wgmma_pin(float (&)[K]) {}
inline void async_proxy_fence() { emulate::async_proxy_fence(); }
inline uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes, int swizzle = 128,
                                 PYEFF_HERE) {
  return emulate::wgmma_descriptor(shared, leading_bytes, stride_bytes, swizzle, site);
}
template <class T, int N, bool TransB, bool TransA = false>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, PYEFF_HERE) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "wgmma takes bf16 or f16");
  static_assert(N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256,
                "the widths that the device page has");
  emulate::wgmma({a, b, N, TransB, TransA, std::is_same<T, bf16>::value, accumulate}, d, site);
}

inline int cluster_rank() { return emulate::running->block->rank; }
inline int cluster_size() { return emulate::running->block->cluster_size; }
inline void cluster_barrier(PYEFF_HERE) { emulate::cluster_barrier(site); }
template <class T>
T* cluster_map(T* shared, int rank, PYEFF_HERE) {
  return static_cast<T*>(emulate::cluster_map(const_cast<std::remove_const_t<T>*>(shared), rank, site));
}
template <class T>
T load_cluster(const T* p, PYEFF_HERE) {
  detail::check_element<T>();
  emulate::check_cluster(p, sizeof(T), false, site);
  return *p;
}
template <class T>
void store_cluster(T* p, std::common_type_t<T> v, PYEFF_HERE) {
  detail::check_element<T>();
  emulate::check_cluster(p, sizeof(T), true, site);
  *p = v;
}
inline Vec16 load_cluster16(const void* p, PYEFF_HERE) {
  emulate::check_cluster(p, 16, false, site);
  return *static_cast<const Vec16*>(p);
}
inline void store_cluster16(void* p, const Vec16& v, PYEFF_HERE) {
  emulate::check_cluster(p, 16, true, site);
  *static_cast<Vec16*>(p) = v;
}

inline void trap() { std::abort(); }
inline int64_t opaque(int64_t v) { return v; }
inline float exp_approx(float x) { return std::exp(x); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }

template <class P>
const char* launch(void (*kernel)(P), const Launch& how, const P& params) {
  static_assert(std::is_trivially_copyable<P>::value, "kernel parameters are copied as bytes");
  struct Call {
    void (*kernel)(P);
    const P* params;
  } call{kernel, &params};
  const auto run = [](const void* opaque) {
    const Call& c = *static_cast<const Call*>(opaque);
    c.kernel(*c.params);
  };
  return emulate::launch(how, __PRETTY_FUNCTION__, run, &call);
}

#undef PYEFF_HERE

// Few: each takes several tiles, so that what a cluster keeps between them is seen.
template <class P>
int clusters_at_once(void (*)(P), const Launch&) {
  return 2;
}

}  // namespace pyeff::gpu
