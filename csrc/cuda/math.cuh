// The activations of the recurrent cells, accurate to what the number type T can hold.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/portable.cuh"

namespace pyeff::gpu {

PYEFF_DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + e^-x). Where e^-x overflows the result is 0, as it should be.
template <class T>
PYEFF_DEVICE float sigmoid(float x) {
  if constexpr (std::is_same<T, float>::value) return 1.0f / (1.0f + expf(-x));
  // The fast division gives 0 from 2^126 on, and NaN for NaN.
  return reciprocal(1.0f + exp_approx(-x));
}

template <class T>
PYEFF_DEVICE float tanh_of(float x) {
  if constexpr (std::is_same<T, float>::value) return tanhf(x);
  // The quotient's difference to 1 has no digits left where x is small.
  return fabsf(x) < 0.03f ? x - x * x * x * (1.0f / 3.0f) : 1.0f - 2.0f * reciprocal(1.0f + exp_approx(2.0f * x));
}

}  // namespace pyeff::gpu
