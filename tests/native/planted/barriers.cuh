// Kernels with a planted bug at a barrier, and with `Right` the same without it.
#pragma once

#include "cuda/portable.cuh"

namespace planted {

using namespace pyeff::gpu;

struct Row {
  const float* in;
  float* out;
  int n;
};

// Reverses a row through shared memory. Wrong: nobody waits for the others' numbers.
template <bool Right>
PYEFF_KERNEL void missing_barrier(const Row p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  store_shared(shared + thread_index(), load(p.in + thread_index()));
  if (Right) barrier();
  store(p.out + thread_index(), load_shared(shared + block_size() - 1 - thread_index()));
}

// Sums neighbours, row after row over one buffer. Wrong: the next row comes while others still read this one.
template <bool Right>
PYEFF_KERNEL void missing_second_barrier(const Row p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int t = thread_index(), n = block_size();
  for (int i = 0; i < p.n; ++i) {
    store_shared(shared + t, load(p.in + i * n + t));
    barrier();
    store(p.out + i * n + t, load_shared(shared + t) + load_shared(shared + (t + 1) % n));
    if (Right) barrier();
  }
}

// Two sums over the block, through one place for each warp. Wrong: the second sum's parts come while others still read
// those of the first; but before them come shuffles, which keep the warps together unless one is far ahead.
template <bool Right>
PYEFF_KERNEL void two_sums(const Row p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  for (int i = 0; i < 2; ++i) {
    float x = load(p.in + thread_index()) * static_cast<float>(i + 1);
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    if (lane() == 0) store_shared(shared + warp(), x);
    barrier();
    float sum = 0;
    for (int w = 0; w < block_size() / kWarp; ++w) sum += load_shared(shared + w);
    if (Right) barrier();
    store(p.out + i * block_size() + thread_index(), sum);
  }
}

// Wrong: a shuffle is no barrier for memory.
template <bool Right>
PYEFF_KERNEL void shuffle_for_warp_barrier(const Row p) {
  float* shared = reinterpret_cast<float*>(shared_memory()) + warp() * kWarp;
  store_shared(shared + lane(), load(p.in + thread_index()));
  if (Right)
    warp_barrier();
  else
    shuffle(0, 0);
  store(p.out + thread_index(), load_shared(shared + (lane() ^ 1)));
}

// Wrong: who has nothing to do leaves before the barrier.
template <bool Right>
PYEFF_KERNEL void early_end(const Row p) {
  const int t = thread_index();
  if (!Right && t >= p.n) return;
  barrier();
  if (t < p.n) store(p.out + t, load(p.in + t));
}

// Wrong: some wait at one barrier, others at another.
template <bool Right>
PYEFF_KERNEL void barrier_in_branch(const Row p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int t = thread_index();
  if (Right) {
    if (t < p.n) store_shared(shared + t, load(p.in + t));
    barrier();
  } else if (t < p.n) {
    store_shared(shared + t, load(p.in + t));
    barrier();
  } else {
    barrier();
  }
  store(p.out + t, load_shared(shared + t % p.n));
}

// Wrong: half of the lanes do not take part in the sum.
template <bool Right>
PYEFF_KERNEL void shuffle_in_branch(const Row p) {
  float x = load(p.in + thread_index());
  if (Right || lane() < 16) x += shuffle_xor(x, 1);
  store(p.out + thread_index(), x);
}

// Wrong: the named barrier counts one warp too many.
template <bool Right>
PYEFF_KERNEL void wrong_count(const Row p) {
  const int half = block_size() / 2;
  if (thread_index() < half) named_barrier(3, Right ? half : half + kWarp);
  store(p.out + thread_index(), load(p.in + thread_index()));
}

// Wrong: two roles wait for each other.
template <bool Right>
PYEFF_KERNEL void crossed_barriers(const Row p) {
  const bool first = thread_index() < block_size() / 2;
  named_barrier(first || Right ? 1 : 2, block_size());
  named_barrier(first || Right ? 2 : 1, block_size());
  store(p.out + thread_index(), load(p.in + thread_index()));
}

// Wrong: every block writes the whole row, not its own part.
template <bool Right>
PYEFF_KERNEL void blocks_collide(const Row p) {
  const int n = block_size();
  for (int i = Right ? block_index_x() : 0; i < (Right ? block_index_x() + 1 : grid_size_x()); ++i)
    store(p.out + i * n + thread_index(), load(p.in + i * n + thread_index()));
}

}  // namespace planted
