// What the CUDA kernels of the multimask family are launched with, for the resource report; see read.cpp.
#include <initializer_list>

#include "cuda/multimask_loss.cuh"
#include "cuda/multimask_move.cuh"
#include "cuda/multimask_targets_grad.cuh"
#include "dev/launches/line.h"

namespace {

using namespace pyeff::gpu;

// With as many tokens as there may be.
template <int Columns>
void slices() {
  int most = 0;
  for (const int shared : {TargetsTile<float, true, Columns>::shared(TargetsTile<float, true, Columns>::kTokens),
                           TargetsTile<bf16, true, Columns>::shared(TargetsTile<bf16, true, Columns>::kTokens)})
    most = shared > most ? shared : most;
  line(kThreads, most, 0, "none", "multimask_targets_slice<*, %d>", Columns);
}

}  // namespace

int main() {
  for (const char* name : {"multimask_gather_kernel<*", "multimask_scatter_kernel<*", "multimask_sums_kernel<*",
                           "multimask_parts_kernel<*", "multimask_rescale_kernel<*", "multimask_targets_apply<*",
                           "multimask_targets_warp<*", "multimask_targets_whole<*", "multimask_targets_grad<*"})
    line(name, kThreads, 0);
  slices<8>();
  slices<4>();
  slices<2>();
  line("multimask_targets_part<*", kThreads, TargetsTile<bf16, true, 8>::kSums);
  line("multimask_targets_block<*", kThreads, TokenTile<float, true, false>::kShared);
  line("multimask_targets_grad_token<*, true>", kThreads, 0);
  line("multimask_targets_grad_token<*, false>", kThreads, TokenTile<float, true, false>::kShared);
  line("multimask_loss_channels<*, false>", kThreads, kLossShared);
  line("multimask_loss_channels<*, true>", kThreads, kThreads * 4 * static_cast<int>(sizeof(double)));
  line("multimask_loss_tokens<*, true>", kThreads, kLossShared);
  line("multimask_loss_tokens<*, false>", kThreads, TokenTile<float, true, false>::kShared + kLossShared);
  line("multimask_loss_total<*", kThreads, kLossShared);
  line("multimask_loss_moments<*", kThreads, kMomentsShared);
}
