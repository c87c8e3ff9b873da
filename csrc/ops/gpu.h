// Where a call of CUDA kernels runs: its device made current, its stream, its scratch. In a build with PYEFF_EMULATED
// the same kernels run on the CPU, for tests, and there is neither.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cuda/device.h"
#include "cuda/machine.h"
#include "cuda/number.h"

#ifdef PYEFF_EMULATED
#define PYEFF_GPU_KEY CPU
#else
#define PYEFF_GPU_KEY CUDA
#endif

namespace pyeff {

inline gpu::Number gpu_number(const torch::stable::Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return gpu::Number::f32;
    case ScalarType::BFloat16:
      return gpu::Number::bf16;
    case ScalarType::Half:
      return gpu::Number::f16;
    default:
      STD_TORCH_CHECK(false, name, " has a dtype without CUDA kernels, expected float32, bfloat16 or float16");
  }
}

// Raises where a launch failed.
inline void report(const char* error, const char* op) {
  if (error) STD_TORCH_CHECK(false, op, ": the CUDA kernels could not be launched: ", std::string(error));
}

#ifdef PYEFF_EMULATED

inline int gpu_device(const torch::stable::Tensor&) { return -1; }

struct GpuCall {
  gpu::Machine machine;
  void* stream = nullptr;
  explicit GpuCall(const torch::stable::Tensor&) : machine(gpu::emulated_machine()) {}
#else

inline int gpu_device(const torch::stable::Tensor& t) { return t.get_device_index(); }

// torch's current stream of a device, from the library that is loaded only where torch has CUDA.
void* current_stream(int device);

struct GpuCall {
  torch::stable::accelerator::DeviceGuard guard;
  gpu::Machine machine;
  void* stream;
  explicit GpuCall(const torch::stable::Tensor& t)
      : guard(t.get_device_index()),
        machine(cuda::machine(t.get_device_index())),
        stream(current_stream(t.get_device_index())) {}
#endif

  // Freed when the call returns: torch's allocator gives it out again on the same stream only.
  static torch::stable::Tensor scratch(const torch::stable::Tensor& like, int64_t bytes) {
    return torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
  }
};

}  // namespace pyeff
