// The portable CUDA layer: everything that the kernels take from the machine, under one set of names with two meanings.
// nvcc maps them to the hardware (portable_device.cuh); any other C++ compiler builds the same kernels for the CPU
// (emulate/portable_emulate.cuh), where each CUDA thread is a fiber, every collective waits for its participants, and
// every access is checked. docs/gpu.md says what the emulation shows and what it cannot.
//
// Qualifiers (qualifiers.cuh): PYEFF_KERNEL, PYEFF_DEVICE, PYEFF_BOTH, PYEFF_LAUNCH_BOUNDS(threads, blocks),
// PYEFF_GRID_CONSTANT, PYEFF_UNROLL. A kernel takes one trivially copyable struct:
//   template <...> PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(256, 1) kernel(const PYEFF_GRID_CONSTANT Params p)
// Blocks are one-dimensional, of whole warps. Numbers (number.cuh): bf16, f16, to_float, from_float<T>, pack2<T>,
// low_of<T>, high_of<T>. In what follows T is any trivially copyable type of 1, 2, 4 or 8 bytes, naturally aligned.
//
// Indices
//   int thread_index(), lane(), warp()                              in the block; in the warp; of the warp
//   int block_index_x(), .._y(), .._z(), grid_size_x(), .._y(), .._z(), block_size()
// Shared memory: dynamic only, aligned to 1024 bytes
//   char* shared_memory()
// Barriers: each orders the memory accesses of the threads that meet there
//   void barrier()                           all threads of the block, at the same place of the source
//   void named_barrier(int id, int threads)  `threads` of the block, whole warps; id 1 to 15; any place
//   void warp_barrier()                      all 32 lanes
// Shuffles and votes: all 32 lanes, at the same place; they order no memory accesses. T of 4 or 8 bytes
//   T shuffle(T v, int lane), T shuffle_xor(T v, int mask), uint32_t ballot(bool), bool any(bool), bool all(bool)
// Memory: every access goes through these, and is checked in the emulation
//   T load(const T*), void store(T*, T)                             global
//   Vec16 load16(const void*), void store16(void*, Vec16)           global, 16 bytes, aligned to 16
//   T load_shared(const T*), void store_shared(T*, T)               shared memory of the own block
//   Vec16 load_shared16(const void*), void store_shared16(void*, Vec16)
// Asynchronous copies, 16 bytes each, both sides aligned to 16; PTX cp.async.cg
//   void copy_async16(void* shared, const void* global, bool valid)  not valid: writes zeros, `global` is not read
//   void copy_async_commit()                                         closes a group of this thread's copies
//   void copy_async_wait<N>()                                        until all groups but the last N are done
//   What a thread waited for is visible to itself; for the others a barrier must follow.
// Matrix tiles of a warp (all 32 lanes, at the same place); PTX ldmatrix and mma.sync.m16n8k16
//   void ldmatrix_x4(uint32_t (&r)[4], const void* row)              lane i names row i % 8 of matrix i / 8 (8 x 8)
//   void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row)
//   void mma_tile<T, MT, NT>(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2])
//     d += a b for MT x NT tiles of 16 x 8, depth 16; T = bf16 or f16; fragments as PTX lays them out
// Matrix tiles of a warpgroup (4 warps, the first a multiple of 4), where kHasWgmma; PTX wgmma on sm_90a
//   void wgmma_fence()               before the first wgmma and whenever registers of d were touched
//   void wgmma<T, N, TransB, TransA>(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate)
//     m64nNk16, N = 16, 32, 64, 96, 128, 192, 256: d = a b (+ d). a is K-major [M, K], or [K, M] with TransA; b is
//     K-major [N, K], or [K, N] with TransB
//   void wgmma_commit(), void wgmma_wait<N>()
//     d may not be looked at before the wait, nor may the shared memory of a and b be overwritten
//   void wgmma_pin(float (&d)[K])    keeps the compiler from moving d's reads and writes over this place: call it
//   before
//                                    the fence and after the wait
//   uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes, int swizzle = 128)
//     An operand is made of atoms of 8 rows of 128 bytes, each aligned to 1024. The 16-byte piece at row y, piece x of
//     an atom lies at y * 128 + (x ^ y) * 16. K-major: rows are along M or N, a row holds 64 numbers along K, stride is
//     from one 8 rows to the next, leading is not used, and a step of 16 in K is 32 bytes further. TransB: rows are
//     along K, a row holds 64 numbers along N; stride is from one 8 of K to the next, leading from one 64 of N to the
//     next. With a swizzle of 64 or 32 bytes, for fewer numbers along N, rows are as long, atoms of 8 rows are aligned
//     to 512 or 256, and the piece lies at x ^ (y / 2) or x ^ (y / 4) of its row.
//   void async_proxy_fence()         after writing what a wgmma reads, by each writer, before the barrier
// Clusters of blocks along x (Launch::cluster), sm_90 and later; elsewhere one block is its own cluster
//   int cluster_rank(), cluster_size()
//   void cluster_barrier()           all threads of all blocks of the cluster; release and acquire
//   T* cluster_map(T* shared, int rank)                              the same place in another block's shared memory
//   T load_cluster(const T*), void store_cluster(T*, T), Vec16 load_cluster16(const void*),
//   void store_cluster16(void*, Vec16)
//   One cluster_barrier must come before the first such access (the other block may not have begun) and one after the
//   last (it may have ended).
// Registers: int64_t opaque(int64_t v)   v, in a way that what is computed from it is not moved out of a loop, where it
//   would take registers all the time
// void trap()   ends the launch with an error, for what must not be reached
// Numbers: float exp_approx(float), float rsqrt(float): within 2 units in the last place near 0, and 2 of rsqrt
// Launch, on the host
//   struct Launch; const char* launch(kernel, const Launch&, const Params&): null, or why it failed
//   int clusters_at_once(kernel, const Launch&): how many clusters of such a launch the current device runs at the same
//   time; asked once for each kernel, device and amount of shared memory
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/number.cuh"
#include "cuda/qualifiers.cuh"

namespace pyeff::gpu {

struct alignas(16) Vec16 {
  uint32_t x[4];
};

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

struct Launch {
  int grid_x = 1, grid_y = 1, grid_z = 1;
  int threads = 32;      // of a block
  int cluster = 1;       // blocks of a cluster; divides grid_x
  int shared_bytes = 0;  // dynamic, of a block
  void* stream = nullptr;
  const char* name = nullptr;  // for the reports of the emulation; without one, the name of the parameters' type
};

}  // namespace pyeff::gpu

#ifdef __CUDACC__
#include "cuda/portable_device.cuh"
#else
#include "cuda/emulate/portable_emulate.cuh"
#endif
