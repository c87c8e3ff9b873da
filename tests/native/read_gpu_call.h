// A call of READ's CUDA kernels, which the emulation runs: all that they may touch is known to it, so that any other
// access is an error, and their scratch is NaN at first.
#pragma once

#include "cuda/read.h"
#include "read_inputs.h"

namespace check {

// Types that the kernels are built for.
constexpr Number kGpuNumbers[] = {Number::f32, Number::bf16, kHalf};
pyeff::gpu::Number gpu_number(Number number);

// The memory of a call that every test of the kernels makes: scratch at 256 bytes, of exactly its size.
class GpuScratch {
 public:
  explicit GpuScratch(int64_t bytes);
  void* data() const { return block_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> block_;
};

// The rows of a layer as the CUDA kernels know them: contiguous ones, in at most two dimensions.
pyeff::gpu::ReadLayer gpu_layer(Number number, const pyeff::ReadRows& rows);

class ReadGpuCall : public ReadInputs {
 public:
  ReadGpuCall(Number number, const ReadSizes& sizes, const ReadOptions& options, uint64_t seed);

  // Of h, c, gates and stats, `kept` may name one, the others then have no memory.
  ForwardOutputs forward(const pyeff::gpu::Machine& machine, bool save, bool save_gates, Wanted kept = {}) const;
  // Null gates are computed again.
  BackwardOutputs backward(const pyeff::gpu::Machine& machine, const ForwardOutputs& saved, Wanted wanted = {}) const;

 private:
  pyeff::gpu::ReadProblem problem() const;

  std::vector<pyeff::gpu::ReadLayer> layers_;
};

}  // namespace check
