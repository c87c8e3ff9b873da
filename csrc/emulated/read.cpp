// READ's CUDA kernels built for the CPU, as `pyeff_cuda::read_*` of CPU tensors.
#define PYEFF_EMULATED
#include "ops/read_cuda.cpp"
