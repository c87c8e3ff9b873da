// Masks of blocks, the bias of distances and the moving average built for the CPU, as `pyeff_cuda::multimask_*` of CPU
// tensors.
#define PYEFF_EMULATED
#include "ops/multimask_plan_cuda.cpp"
