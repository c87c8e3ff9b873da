// What the CUDA code was built for, and whether that serves a device. Free of torch and of CUDA's own headers.
#pragma once

#include <string>

namespace pyeff::cuda {

// The architectures, as given to nvcc.
std::string built_architectures();

// Empty if the code runs on the device with this index, or the reason why it does not.
std::string why_not(int device);

}  // namespace pyeff::cuda
