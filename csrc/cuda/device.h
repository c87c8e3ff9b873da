// What the CUDA code was built for, and whether that serves a device. Free of torch and of CUDA's own headers.
#pragma once

#include <string>

#include "cuda/machine.h"

namespace pyeff::cuda {

// The architectures, as given to nvcc.
std::string built_architectures();

// Empty if the code runs on the device with this index, or the reason why it does not.
std::string why_not(int device);

// Of the device with this index, asked once.
gpu::Machine machine(int device);

}  // namespace pyeff::cuda
