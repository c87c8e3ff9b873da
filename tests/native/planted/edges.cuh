// Kernels with a planted bug at an edge, and with `Right` the same without it.
#pragma once

#include "cuda/portable.cuh"

namespace planted {

using namespace pyeff::gpu;

struct Edge {
  const float* in;
  float* out;
  int n;
};

// Wrong: the last tile is taken for a whole one, off by one.
template <bool Right>
PYEFF_KERNEL void load_past_edge(const Edge p) {
  const int i = block_index_x() * block_size() + thread_index();
  const float x = i < p.n + !Right ? load(p.in + i) : 0.0f;
  if (i < p.n) store(p.out + i, x);
}

template <bool Right>
PYEFF_KERNEL void store_past_edge(const Edge p) {
  const int i = block_index_x() * block_size() + thread_index();
  if (i < p.n + !Right) store(p.out + i, 1.0f);
}

// A row of `n` in shared memory, shifted. Wrong: one more is read, or written, than there is.
template <bool Right>
PYEFF_KERNEL void shared_load_past_edge(const Edge p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int t = thread_index();
  if (t < p.n) store_shared(shared + t, load(p.in + t));
  barrier();
  if (t < p.n) store(p.out + t, t + 1 < p.n + !Right ? load_shared(shared + t + 1) : 0.0f);
}

template <bool Right>
PYEFF_KERNEL void shared_store_past_edge(const Edge p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  if (thread_index() < p.n + !Right) store_shared(shared + thread_index(), 1.0f);
}

// Copies four at a time. Wrong: rows of odd length are not aligned to 16 bytes.
template <bool Right>
PYEFF_KERNEL void misaligned(const Edge p) {
  const int row = p.n + (Right ? -p.n & 3 : 0);
  store16(p.out + 4 * thread_index(), load16(p.in + row * thread_index()));
}

// Wrong: a copy whose source is past the edge is not marked so.
template <bool Right>
PYEFF_KERNEL void copy_past_edge(const Edge p) {
  const int first = 4 * thread_index();
  char* shared = shared_memory() + 16 * thread_index();
  copy_async16(shared, p.in + first, Right ? first < p.n : first <= p.n);
  copy_async_commit();
  copy_async_wait<0>();
  store16(p.out + first, load_shared16(shared));
}

// Wrong: the numbers after the last whole tile are forgotten.
template <bool Right>
PYEFF_KERNEL void forgotten_rest(const Edge p) {
  const int tile = block_size();
  for (int i = thread_index(); i < (Right ? p.n : p.n / tile * tile); i += tile) store(p.out + i, load(p.in + i));
}

// Wrong: writes where it should read.
template <bool Right>
PYEFF_KERNEL void writes_input(const Edge p) {
  if (thread_index() < p.n) store(Right ? p.out + thread_index() : const_cast<float*>(p.in) + thread_index(), 1.0f);
}

// Past the end by a plain pointer, which only AddressSanitizer can see.
template <bool Right>
PYEFF_KERNEL void unchecked(const Edge p) {
  volatile float* shared = reinterpret_cast<float*>(shared_memory());
  if (thread_index() < p.n + !Right) shared[thread_index()] = 1.0f;
}

}  // namespace planted
