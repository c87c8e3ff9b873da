// The number types that the CUDA kernels are built for.
#pragma once

namespace pyeff::gpu {

enum class Number : int { f32, bf16, f16 };

}  // namespace pyeff::gpu
