// What the kernels of every operation share: the size of a block, pairs of neighbouring numbers, sums over threads.
#pragma once

#include "cuda/portable.cuh"

namespace pyeff::gpu {

constexpr int kThreads = 256;

template <class T>
PYEFF_BOTH T div_up(T a, T b) {
  return (a + b - 1) / b;
}

// Two neighbouring numbers, of which `count` exist; the others are 0. `pairs`: both lie in one aligned word.
template <class T>
PYEFF_DEVICE void load_two(float (&x)[2], const T* p, int count, bool pairs) {
  if constexpr (sizeof(T) == 2) {
    if (pairs && count >= 2) {
      const uint32_t both = load(reinterpret_cast<const uint32_t*>(p));
      x[0] = low_of<T>(both), x[1] = high_of<T>(both);
      return;
    }
  }
  x[0] = count > 0 ? to_float(load(p)) : 0.0f;
  x[1] = count > 1 ? to_float(load(p + 1)) : 0.0f;
}

template <class T>
PYEFF_DEVICE void store_two(T* p, float low, float high, int count, bool pairs) {
  if constexpr (sizeof(T) == 2) {
    if (pairs && count >= 2) {
      store(reinterpret_cast<uint32_t*>(p), pack2<T>(low, high));
      return;
    }
  }
  if (count > 0) store(p, from_float<T>(low));
  if (count > 1) store(p + 1, from_float<T>(high));
}

// Adds over the block, in a fixed order; every thread gets the sum. `shared` has a place for each warp.
PYEFF_DEVICE float block_sum(float x, float* shared) {
  PYEFF_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  if (lane() == 0) store_shared(shared + warp(), x);
  barrier();
  float sum = 0.0f;
  for (int i = 0; i < block_size() / kWarp; ++i) sum += load_shared(shared + i);
  barrier();
  return sum;
}

PYEFF_DEVICE float warp_sum(float x) {
  PYEFF_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

}  // namespace pyeff::gpu
