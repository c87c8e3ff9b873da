#include "cuda/device.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>

namespace pyeff::cuda {
namespace {

// Stands for every kernel of the library: all are built for the same architectures.
__global__ void probe(int* out) {
  if (out != nullptr) *out = 1;
}

std::string capability(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return std::to_string(major) + "." + std::to_string(minor);
}

// Leaves the caller's device current.
struct DeviceGuard {
  int before = -1;
  cudaError_t error;
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (before >= 0) cudaSetDevice(before);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

}  // namespace

std::string built_architectures() { return PYEFF_CUDA_ARCHS; }

std::string why_not(int device) {
  DeviceGuard guard(device);
  cudaError_t error = guard.error;
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
        error == cudaErrorUnsupportedPtxVersion) {
      cudaGetLastError();
      return "the CUDA kernels were built for " + built_architectures() + ", which does not serve compute capability " +
             capability(device);
    }
  }
  if (error == cudaSuccess) return "";
  // The runtime remembers an error until it is asked for; torch would report it as its own.
  cudaGetLastError();
  return std::string("CUDA: ") + cudaGetErrorString(error);
}

gpu::Machine machine(int device) {
  static std::mutex mutex;
  static std::map<int, gpu::Machine> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  gpu::Machine machine;
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&machine.processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  // The code for it is in no other architecture's, and not in a build without the "a".
  machine.wgmma = major == 9 && minor == 0 && built_architectures().find("90a") != std::string::npos;
  return known[device] = machine;
}

}  // namespace pyeff::cuda
