// Where a call of CUDA kernels runs: its device made current, its stream, its scratch. In a build with PYEFF_EMULATED
// the same kernels run on the CPU, for tests, and there is neither.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/device.h"
#include "cuda/machine.h"

#ifdef PYEFF_EMULATED
#define PYEFF_GPU_KEY CPU
#else
#define PYEFF_GPU_KEY CUDA
#endif

namespace pyeff {

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
