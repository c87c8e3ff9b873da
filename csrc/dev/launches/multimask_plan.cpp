// What the kernels of plans are launched with, for the resource report; see read.cpp.
#include "cuda/multimask_plan.cuh"
#include "cuda/multimask_draw.cuh"
#include "dev/launches/line.h"

int main() {
  using namespace pyeff::gpu;
  line("multimask_bias_kernel<*", kThreads, 0);
  line("multimask_bias_backward_kernel<*", kThreads, 512 * 4 * (kThreads / kWarp));
  line("multimask_bias_sum_kernel", kThreads, 4 * (kThreads / kWarp));
  // Either with the most shared memory that a row takes, or with none for its tokens.
  line("multimask_draw_kernel<true>", kThreads, kSharedAnywhere);
  line("multimask_draw_kernel<false>", kThreads, kDrawShared);
  line("multimask_ema_kernel", kThreads, 0);
}
