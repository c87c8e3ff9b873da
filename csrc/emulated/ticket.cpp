// The ticket's CUDA kernels built for the CPU, as `pyeff_cuda::ticket_*` of CPU tensors.
#define PYEFF_EMULATED
#include "ops/ticket_cuda.cpp"
