// A call of READ's kernels on watched memory: random inputs in every layout, and outputs with guards.
#pragma once

#include "cpu/parallel.h"
#include "read_oracle.h"
#include "support.h"

namespace check {

// How one layer's output lies in memory.
enum class Layout { dense, padded, strided, transposed, three_dims, broadcast_rows, broadcast_width };
constexpr Layout kLayouts[] = {Layout::dense,      Layout::padded,         Layout::strided,        Layout::transposed,
                               Layout::three_dims, Layout::broadcast_rows, Layout::broadcast_width};

struct ReadOptions {
  bool b_ih = true, b_hh = true, norm_weight = true, norm_bias = true, h0 = true, c0 = true;
  bool grad_out = true, grad_c = true;
  bool wide_phi = false;                                              // with bf16 weights: phi in f32
  Layout layouts[3] = {Layout::dense, Layout::dense, Layout::dense};  // of layer i: layouts[i % 3]
};

struct ForwardOutputs {
  Output out, c_last, h, c, gates, stats;
};
struct BackwardOutputs {
  std::vector<Output> dphi;
  Output dw_ih, dw_hh, db_ih, db_hh, dnorm_weight, dnorm_bias, dh0, dc0;
};

// Which gradients are wanted. `only` names one by its place among dphi[0], .., dphi[layers - 1], dw_ih, .., dc0.
struct Wanted {
  int64_t only = -1;
  bool operator()(int64_t i) const { return only < 0 || only == i; }
};

class ReadCall {
 public:
  const Number number, phi_number;
  const ReadSizes sizes;
  ReadValues values;

  ReadCall(Number number, const ReadSizes& sizes, const ReadOptions& options, uint64_t seed);

  // `save`: h, c and the statistics; `save_gates`: the gates, too.
  ForwardOutputs forward(int isa, const pyeff::Parallel& parallel, bool save, bool save_gates) const;
  // Null gates are computed again.
  BackwardOutputs backward(int isa, const pyeff::Parallel& parallel, const ForwardOutputs& saved,
                           Wanted wanted = {}) const;
  int64_t gradients() const { return sizes.layers + 8; }

  // Both exit with a message.
  void check(int isa, const ForwardOutputs& found, const ReadTruth& truth, const ReadTruth& same_type) const;
  void check(int isa, const BackwardOutputs& found, const ReadTruth& truth, const ReadTruth& same_type) const;

 private:
  pyeff::ReadProblem problem() const;
  void lay_out(Random& random, Layout layout);
  void compare(int isa, const char* what, const Output& found, const Values& truth, double same_type, int64_t terms,
               double scale = 0) const;

  std::vector<Input> phi_;
  std::vector<pyeff::ReadRows> rows_;
  Input w_ih_, w_hh_, b_ih_, b_hh_, norm_weight_, norm_bias_, h0_, c0_, grad_out_, grad_c_;
};

// True where all bytes agree.
bool same(const ForwardOutputs& a, const ForwardOutputs& b);
bool same(const BackwardOutputs& a, const BackwardOutputs& b);

// The definition as is, and as a step-by-step implementation in the call's type computes it. The truth is a double, so
// for f64 the latter is that for f32, and its errors count 2^-29 times.
ReadTruth truth_of(const ReadCall& call);
ReadTruth same_type_of(const ReadCall& call);

}  // namespace check
