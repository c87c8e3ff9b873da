// Teacher targets on the GPU, forward.
#include "cuda/multimask_targets_launch.cuh"

namespace pyeff::gpu {
namespace {

// What a call cuts from its scratch.
TargetsScratch cut(Scratch& scratch, const MultimaskTargets& t) {
  const int64_t layers = by_stages(t.norm, t.sizes.tokens, false)        ? t.count
                         : by_stages(t.post_norm, t.sizes.tokens, false) ? 1
                                                                         : 0;
  return {scratch, t.sizes, layers, false};
}

}  // namespace

int64_t multimask_targets_scratch(const MultimaskTargets& t, const Machine&) {
  Scratch scratch(nullptr);
  cut(scratch, t);
  return scratch.used();
}

const char* multimask_targets(const MultimaskTargets& t, void* base, const Machine& machine, void* stream) {
  Scratch scratch(base);
  const TargetsScratch local = cut(scratch, t);
  Launches launches(stream);
  with_chunks(t.sizes.number, layers_by_vectors(t), [&](auto type, auto by_vectors) {
    run_norm<decltype(type), decltype(by_vectors)::value>(launches, t, t.norm, local, machine);
  });
  if (t.post_norm != MultimaskNorm::none) run_post_norm(launches, t, local, machine);
  return launches.error;
}

}  // namespace pyeff::gpu
