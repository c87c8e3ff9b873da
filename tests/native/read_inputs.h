// What a call of READ is given, on watched memory: random numbers in every layout; and what its results are to be.
#pragma once

#include "read_oracle.h"
#include "support.h"

namespace check {

// How one layer's output lies in memory. Of `padded` the rows are apart by an odd number, of `chunks` by whole 16
// bytes; of `blocks` and `odd_blocks` the same in two dimensions, with more between the blocks than between their rows.
enum class Layout {
  dense,
  padded,
  strided,
  transposed,
  three_dims,
  broadcast_rows,
  broadcast_width,
  chunks,
  blocks,
  odd_blocks
};
constexpr Layout kLayouts[] = {Layout::dense,      Layout::padded,         Layout::strided,        Layout::transposed,
                               Layout::three_dims, Layout::broadcast_rows, Layout::broadcast_width};
// Contiguous rows, in at most two dimensions: what the GPU's kernels take.
constexpr Layout kRowLayouts[] = {Layout::dense,  Layout::padded, Layout::broadcast_rows,
                                  Layout::chunks, Layout::blocks, Layout::odd_blocks};

struct ReadOptions {
  bool b_ih = true, b_hh = true, norm_weight = true, norm_bias = true, h0 = true, c0 = true;
  bool grad_out = true, grad_c = true;
  bool wide_phi = false;                                              // with 16-bit weights: phi in f32
  Layout layouts[3] = {Layout::dense, Layout::dense, Layout::dense};  // of layer i: layouts[i % 3]
  double phi_mean = 0.3, phi_range = 2, grad_range = 1;               // uniform within mean +- range; grads around 0
  Begin begin = Begin::number;                                        // of everything
};

struct ForwardOutputs {
  Output out, c_last, h, c, gates, stats;
  std::vector<const Output*> all() const { return {&out, &c_last, &h, &c, &gates, &stats}; }
};
struct BackwardOutputs {
  std::vector<Output> dphi;
  Output dw_ih, dw_hh, db_ih, db_hh, dnorm_weight, dnorm_bias, dh0, dc0;
  std::vector<const Output*> all() const;
};

// Which gradients are wanted. `only` names one by its place among dphi[0], .., dphi[layers - 1], dw_ih, .., dc0.
struct Wanted {
  int64_t only = -1;
  bool operator()(int64_t i) const { return only < 0 || only == i; }
};

class ReadInputs {
 public:
  const Number number, phi_number;
  const ReadSizes sizes;
  ReadValues values;

  ReadInputs(Number number, const ReadSizes& sizes, const ReadOptions& options, uint64_t seed);

  int64_t gradients() const { return sizes.layers + 8; }

  // Both exit with a message, in which `who` names the kernels.
  void check(const char* who, const ForwardOutputs& found, const ReadTruth& truth, const ReadTruth& same_type) const;
  void check(const char* who, const BackwardOutputs& found, const ReadTruth& truth, const ReadTruth& same_type) const;

 protected:
  // Memory for the results, `aligned` to 16 bytes or to no vector. `save`: h, c and the statistics; `save_gates`: the
  // gates, too.
  ForwardOutputs forward_outputs(bool save, bool save_gates, bool aligned) const;
  BackwardOutputs backward_outputs(Wanted wanted, bool aligned) const;

  std::vector<Input> phi_;
  std::vector<pyeff::ReadRows> rows_;
  Input w_ih_, w_hh_, b_ih_, b_hh_, norm_weight_, norm_bias_, h0_, c0_, grad_out_, grad_c_;

 private:
  void lay_out(Random& random, Layout layout, const ReadOptions& options);
  void compare(const char* who, const char* what, const Output& found, const Values& truth, double same_type,
               int64_t terms, double scale = 0) const;
};

// True where all bytes agree.
bool same(const ForwardOutputs& a, const ForwardOutputs& b);
bool same(const BackwardOutputs& a, const BackwardOutputs& b);

// The definition as is, and as a step-by-step implementation in the call's type computes it. The truth is a double, so
// for f64 the latter is that for f32, and its errors count 2^-29 times.
ReadTruth truth_of(const ReadInputs& call);
ReadTruth same_type_of(const ReadInputs& call);

}  // namespace check
