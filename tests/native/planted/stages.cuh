// Kernels with a planted bug in asynchronous copies, products or clusters. `Bug` none is the same without it.
#pragma once

#include "cuda/portable.cuh"

namespace planted {

using namespace pyeff::gpu;

struct Tiles {
  const char* in;
  char* out;
  int steps;
};

enum class StageBug { none, no_wait, short_wait, early_overwrite, no_barrier };

// Copies tiles of 16 bytes a thread through two stages of shared memory; each thread passes on its neighbour's piece.
template <StageBug Bug>
PYEFF_KERNEL void two_stages(const Tiles p) {
  const int t = thread_index(), n = block_size(), next = (t + 1) % n;
  const auto piece = [&](int step, int i) { return shared_memory() + (step % 2 * n + i) * 16; };
  const auto start = [&](int step) {
    if (step < p.steps) copy_async16(piece(step, t), p.in + (step * n + t) * 16, true);
    copy_async_commit();
  };
  start(0);
  for (int step = 0; step < p.steps; ++step) {
    // The stage of the step before is free only after the barrier at the end of the loop.
    start(step + 1);
    if (Bug == StageBug::short_wait)
      copy_async_wait<2>();
    else if (Bug != StageBug::no_wait)
      copy_async_wait<1>();
    if (Bug != StageBug::no_barrier) barrier();
    store16(p.out + (step * n + next) * 16, load_shared16(piece(step, next)));
    if (Bug != StageBug::early_overwrite) barrier();
  }
}

struct Factors {
  const char *a, *b;
  float* out;
};

enum class ProductBug {
  none,
  no_proxy_fence,
  late_write,
  no_wait,
  no_commit,
  no_fence,
  overwritten,
  early,
  wrong_stride
};

// out = a b^T for bf16 tiles [64, 64], in swizzled rows.
template <ProductBug Bug>
PYEFF_KERNEL void product(const Factors p) {
  char *a = shared_memory(), *b = a + 64 * 128;
  const int t = thread_index();
  for (int i = t; i < 64 * 8; i += kWarpgroup) {
    const int at = i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16;
    store_shared16(a + at, load16(p.a + i * 16));
    if (Bug != ProductBug::late_write) store_shared16(b + at, load16(p.b + i * 16));
  }
  // Pieces of the other threads that have not arrived: poison until this wait.
  const auto bring = [&] {
    for (int i = t; i < 64 * 8; i += kWarpgroup)
      copy_async16(b + i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16, p.b + i * 16, true);
    copy_async_commit();
  };
  if (Bug == ProductBug::early) bring();
  if (Bug != ProductBug::no_proxy_fence) async_proxy_fence();
  if (Bug == ProductBug::late_write)
    for (int i = t; i < 64 * 8; i += kWarpgroup)
      store_shared16(b + i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16, load16(p.b + i * 16));
  barrier();
  float d[32];
  for (float& x : d) x = 0;
  if (Bug != ProductBug::no_fence) wgmma_fence();
  const int stride = Bug == ProductBug::wrong_stride ? 2048 : 1024;
  for (int k = 0; k < 4; ++k)
    wgmma<bf16, 64, false>(d, wgmma_descriptor(a + k * 32, 0, 1024), wgmma_descriptor(b + k * 32, 0, stride), true);
  if (Bug != ProductBug::no_commit) wgmma_commit();
  if (Bug == ProductBug::early) copy_async_wait<0>();
  if (Bug == ProductBug::overwritten) {
    barrier();
    store_shared16(b + 16 * t, Vec16{{0, 0, 0, 0}});
  }
  if (Bug == ProductBug::no_wait)
    wgmma_wait<1>();
  else
    wgmma_wait<0>();
  const int row = warp() % 4 * 16 + lane() / 4, column = lane() % 4 * 2;
  for (int i = 0; i < 32; ++i) store(p.out + (row + 8 * (i / 2 % 2)) * 64 + i / 4 * 8 + column + i % 2, d[i]);
  if (Bug == ProductBug::no_wait) wgmma_wait<0>();
}

enum class ClusterBug { none, no_first, no_middle, no_last };

struct Exchange {
  const float* in;
  float* out;
};

// Each block shows its numbers to the other one of its cluster.
template <ClusterBug Bug>
PYEFF_KERNEL void exchange(const Exchange p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int t = thread_index(), at = block_index_x() * block_size() + t;
  const float* peer = cluster_map(shared, cluster_rank() ^ 1);
  if (Bug != ClusterBug::no_first && Bug != ClusterBug::no_middle) store_shared(shared + t, load(p.in + at));
  if (Bug != ClusterBug::no_first) cluster_barrier();
  if (Bug == ClusterBug::no_middle) store_shared(shared + t, load(p.in + at));
  const float x = load_cluster(peer + t);
  store(p.out + at, x);
  if (Bug != ClusterBug::no_last) cluster_barrier();
}

}  // namespace planted
