// Plans of masks on the GPU: masks of blocks, the bias of distances, the moving average of parameters.
#include "cuda/multimask_draw.cuh"
#include "cuda/multimask_plan.cuh"

namespace pyeff::gpu {
namespace {

constexpr int64_t kMost = int64_t{1} << 30;

int64_t across_of(const MultimaskBias& p) { return div_up(p.slots * p.slots, int64_t{kBiasBlock}); }

// What both directions have in common; an error where a number does not fit.
const char* set(const MultimaskBias& p, const void* numbers, const Machine& machine, MultimaskBiasParams* params) {
  if (p.slots > 46340 || p.heads > 65535) return "a bias has more slots or heads than the kernels count";
  const int64_t across = across_of(p), size = p.number == Number::f32 ? 4 : 2;
  params->ids_keep = p.ids_keep, params->keep_len = p.keep_len, params->rows = p.rows;
  params->slots = static_cast<int>(p.slots), params->heads = static_cast<int>(p.heads);
  params->prefix = static_cast<int>(p.prefix < kMost ? p.prefix : kMost), params->across = static_cast<int>(across);
  // Distances are made once for several heads, if there are blocks enough.
  const int64_t parts = int64_t{8} * machine.processors / (across * p.rows);
  params->each = static_cast<int>(div_up(p.heads, parts < 1 ? 1 : parts < p.heads ? parts : p.heads));
  params->vector = aligned_to(numbers, 16) && p.slots * p.slots * size % 16 == 0;
  return nullptr;
}

Grid grid_of(const MultimaskBias& p, const MultimaskBiasParams& params) {
  return {params.across * p.rows, div_up(p.heads, int64_t{params.each})};
}

int64_t draw_bytes(const MultimaskBlocks& p) { return int64_t{draw_tokens(p.tokens)} * kThreads * kDrawToken; }
bool draw_in_shared(const MultimaskBlocks& p) { return kDrawShared + draw_bytes(p) <= kSharedAnywhere; }

}  // namespace

const char* multimask_relative_bias(const MultimaskBias& p, const float* slopes, void* out, const Machine& machine,
                                    void* stream) {
  Launches launches(stream);
  MultimaskBiasParams params{};
  launches.error = set(p, out, machine, &params);
  params.slopes = slopes, params.out = out;
  with_number(p.number, [&](auto type) {
    launches.run("multimask_bias_kernel", multimask_bias_kernel<decltype(type)>, grid_of(p, params), kThreads, 0,
                 params);
  });
  return launches.error;
}

int64_t multimask_relative_bias_scratch(const MultimaskBias& p) { return 4 * across_of(p) * p.rows * p.heads; }

const char* multimask_relative_bias_backward(const MultimaskBias& p, const void* grad, float* dslopes, void* scratch,
                                             const Machine& machine, void* stream) {
  Launches launches(stream);
  MultimaskBiasParams params{};
  launches.error = set(p, grad, machine, &params);
  params.grad = grad, params.partial = static_cast<float*>(scratch);
  // Their sums lie in shared memory.
  constexpr int kHeads = 512;
  params.each = params.each < kHeads ? params.each : kHeads;
  with_number(p.number, [&](auto type) {
    launches.run("multimask_bias_backward_kernel", multimask_bias_backward_kernel<decltype(type)>, grid_of(p, params),
                 kThreads, params.each * 4 * (kThreads / kWarp), params);
  });
  const MultimaskBiasSumParams sum{params.partial, dslopes, params.across * p.rows};
  launches.run("multimask_bias_sum_kernel", multimask_bias_sum_kernel, {p.heads}, kThreads, 4 * (kThreads / kWarp),
               sum);
  return launches.error;
}

int64_t multimask_block_mask_scratch(const MultimaskBlocks& p) {
  return draw_in_shared(p) ? 0 : p.rows * draw_bytes(p);
}

const char* multimask_block_mask(const MultimaskBlocks& p, void* scratch, const Machine&, void* stream) {
  if (p.tokens >= kMost || p.slots >= kMost || p.masks >= kMost) return "a mask has 2^30 tokens or more";
  // Longer than twice all tokens, a block has all of them as well.
  const int length = static_cast<int>(p.length < 2 * p.tokens + 1 ? p.length : 2 * p.tokens + 1);
  MultimaskDrawParams params{};
  params.seed = p.seed, params.sample_ids = p.sample_ids, params.lengths = p.lengths;
  params.ids_keep = p.ids_keep, params.keep_len = p.keep_len, params.kept_slot = p.kept_slot;
  params.scratch = static_cast<char*>(scratch), params.keep = p.keep, params.share = p.share, params.slots = p.slots;
  params.masks = static_cast<int>(p.masks), params.tokens = static_cast<int>(p.tokens);
  params.grid_width = static_cast<int>(p.grid_width), params.inverse = p.inverse;
  params.below = length / 2, params.above = length - 1 - length / 2, params.own = draw_tokens(p.tokens);
  Launches launches(stream);
  if (draw_in_shared(p)) {
    launches.run("multimask_draw_kernel", multimask_draw_kernel<true>, {p.rows}, kThreads,
                 kDrawShared + static_cast<int>(draw_bytes(p)), params);
  } else {
    launches.run("multimask_draw_kernel", multimask_draw_kernel<false>, {p.rows}, kThreads, kDrawShared, params);
  }
  return launches.error;
}

const char* multimask_ema_update(const MultimaskAverage* tensors, int64_t count, const double* decay, const Machine&,
                                 void* stream) {
  Launches launches(stream);
  int64_t i = 0;
  while (i < count && !launches.error) {
    MultimaskEmaParams params{};
    params.decay = decay;
    int64_t blocks = 0;
    for (; i < count && params.tensors < kEmaTensors; ++i) {
      const MultimaskAverage& t = tensors[i];
      if (t.count == 0) continue;
      const int64_t own = div_up(t.count, int64_t{kEmaBlock});
      if (blocks + own > INT32_MAX) break;
      const int n = params.tensors++;
      params.entries[n] = {t.ema, t.param, t.copy, t.count};
      const bool aligned = aligned_to(t.ema, 16) && aligned_to(t.param, 16) && aligned_to(t.copy, 16);
      params.kinds[n] = static_cast<uint8_t>(static_cast<int>(t.ema_number) | static_cast<int>(t.param_number) << 2 |
                                             static_cast<int>(t.copy_number) << 4 | (aligned ? 64 : 0));
      params.first[n] = static_cast<int>(blocks);
      blocks += own;
    }
    if (i < count && params.tensors == 0 && tensors[i].count > 0) return "a tensor has more numbers than a grid";
    launches.run("multimask_ema_kernel", multimask_ema_kernel, {blocks}, kThreads, 0, params);
  }
  return launches.error;
}

}  // namespace pyeff::gpu
