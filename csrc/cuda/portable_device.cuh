// The portable layer on the GPU: see portable.cuh, which includes this under nvcc. Every function is a few
// instructions.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

namespace pyeff::gpu {

PYEFF_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
PYEFF_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
PYEFF_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }
PYEFF_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
PYEFF_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
PYEFF_DEVICE int grid_size_x() { return static_cast<int>(gridDim.x); }
PYEFF_DEVICE int grid_size_y() { return static_cast<int>(gridDim.y); }
PYEFF_DEVICE int grid_size_z() { return static_cast<int>(gridDim.z); }
PYEFF_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
PYEFF_DEVICE int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

PYEFF_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char pyeff_shared[];
  return pyeff_shared;
}

PYEFF_DEVICE void barrier() { __syncthreads(); }
PYEFF_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PYEFF_DEVICE void warp_barrier() { __syncwarp(); }

template <class T>
PYEFF_DEVICE T shuffle(T v, int from) {
  return __shfl_sync(0xffffffffu, v, from);
}
template <class T>
PYEFF_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
PYEFF_DEVICE uint32_t ballot(bool p) { return __ballot_sync(0xffffffffu, p); }
PYEFF_DEVICE bool any(bool p) { return __any_sync(0xffffffffu, p); }
PYEFF_DEVICE bool all(bool p) { return __all_sync(0xffffffffu, p); }

namespace detail {

PYEFF_DEVICE Vec16 read16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
PYEFF_DEVICE void write16(void* p, const Vec16& v) {
  *static_cast<uint4*>(p) = make_uint4(v.x[0], v.x[1], v.x[2], v.x[3]);
}
PYEFF_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

}  // namespace detail

template <class T>
PYEFF_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
PYEFF_DEVICE void store(T* p, std::common_type_t<T> v) {
  *p = v;
}
PYEFF_DEVICE Vec16 load16(const void* p) { return detail::read16(p); }
PYEFF_DEVICE void store16(void* p, const Vec16& v) { detail::write16(p, v); }

// The compiler knows the state space from shared_memory(), so these become ld.shared and st.shared.
template <class T>
PYEFF_DEVICE T load_shared(const T* p) {
  return *p;
}
template <class T>
PYEFF_DEVICE void store_shared(T* p, std::common_type_t<T> v) {
  *p = v;
}
PYEFF_DEVICE Vec16 load_shared16(const void* p) { return detail::read16(p); }
PYEFF_DEVICE void store_shared16(void* p, const Vec16& v) { detail::write16(p, v); }

PYEFF_DEVICE void copy_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
PYEFF_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
PYEFF_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
PYEFF_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
PYEFF_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
PYEFF_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <class T>
PYEFF_DEVICE T* cluster_map(T* shared, int rank) {
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
  return mapped;
}
#else
PYEFF_DEVICE int cluster_rank() { return 0; }
PYEFF_DEVICE int cluster_size() { return 1; }
PYEFF_DEVICE void cluster_barrier() { __syncthreads(); }
template <class T>
PYEFF_DEVICE T* cluster_map(T* shared, int) {
  return shared;
}
#endif
template <class T>
PYEFF_DEVICE T load_cluster(const T* p) {
  return *p;
}
template <class T>
PYEFF_DEVICE void store_cluster(T* p, std::common_type_t<T> v) {
  *p = v;
}
PYEFF_DEVICE Vec16 load_cluster16(const void* p) { return detail::read16(p); }
PYEFF_DEVICE void store_cluster16(void* p, const Vec16& v) { detail::write16(p, v); }

PYEFF_DEVICE void trap() { __trap(); }

PYEFF_DEVICE int64_t opaque(int64_t v) {
  asm volatile("" : "+l"(v));
  return v;
}

PYEFF_DEVICE float exp_approx(float x) { return __expf(x); }
PYEFF_DEVICE float rsqrt(float x) { return rsqrtf(x); }

namespace detail {

// What cudaLaunchKernelExC and the occupancy query take; refers to itself, so it is not copied.
struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  explicit LaunchConfig(const Launch& how) {
    config.gridDim =
        dim3(static_cast<unsigned>(how.grid_x), static_cast<unsigned>(how.grid_y), static_cast<unsigned>(how.grid_z));
    config.blockDim = dim3(static_cast<unsigned>(how.threads));
    config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
    config.stream = static_cast<cudaStream_t>(how.stream);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(how.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = how.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

inline cudaError_t allow_shared(const void* function, int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace detail

template <class P>
const char* launch(void (*kernel)(P), const Launch& how, const P& params) {
  static_assert(std::is_trivially_copyable<P>::value, "kernel parameters are copied as bytes");
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = detail::allow_shared(function, how.shared_bytes);
  if (error == cudaSuccess) {
    const detail::LaunchConfig launch(how);
    void* arguments[] = {const_cast<P*>(&params)};
    error = cudaLaunchKernelExC(&launch.config, function, arguments);
  }
  if (error == cudaSuccess) return nullptr;
  // The runtime remembers an error until it is asked for; torch would report it as its own.
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <class P>
int clusters_at_once(void (*kernel)(P), const Launch& how) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int>, int> known;
  const void* function = reinterpret_cast<const void*>(kernel);
  int device = 0, count = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(function, device, how.shared_bytes);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    cudaError_t error = detail::allow_shared(function, how.shared_bytes);
    const detail::LaunchConfig launch(how);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, function, &launch.config);
    if (error == cudaSuccess) return known[key] = count;
  }
  cudaGetLastError();
  return 0;
}

}  // namespace pyeff::gpu

#include "cuda/portable_matrix.cuh"
