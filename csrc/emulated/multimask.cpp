// The multimask family's CUDA kernels built for the CPU, as `pyeff_cuda::multimask_*` of CPU tensors.
#define PYEFF_EMULATED
#include "ops/multimask_cuda.cpp"
