// The number types that the CPU kernels are built for.
#pragma once

namespace pyeff {

enum class Number : int { f64, f32, bf16 };

}  // namespace pyeff
