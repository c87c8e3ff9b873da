// From torch's dtypes to the kernels'.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/number.h"

namespace pyeff {

inline Number number_of(const torch::stable::Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Number::f64;
    case ScalarType::Float:
      return Number::f32;
    case ScalarType::BFloat16:
      return Number::bf16;
    default:
      STD_TORCH_CHECK(false, name, " has a dtype without CPU kernels, expected float64, float32 or bfloat16");
  }
}

}  // namespace pyeff
