// READ's definition and its gradients, in plain loops and double precision.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/read.h"

namespace check {

using Values = std::vector<double>;

struct ReadSizes {
  pyeff::Cell cell;
  pyeff::Norm norm;
  pyeff::Reduce reduce;
  int64_t layers, tokens, width, rank;
  double eps = 1e-6;
  int64_t gates() const { return cell == pyeff::Cell::rnn ? 1 : cell == pyeff::Cell::gru ? 3 : 4; }
  int64_t saved_gates() const { return cell == pyeff::Cell::rnn ? 0 : 4; }
};

// Empty: not given.
struct ReadValues {
  std::vector<Values> phi;  // [layers] of [tokens, width]
  Values w_ih, w_hh, b_ih, b_hh, norm_weight, norm_bias, h0, c0, grad_out, grad_c;
};

struct ReadTruth {
  Values out, c_last, h, c, gates, rstd, mean;
  std::vector<Values> dphi;
  Values dphi_terms;  // [layers] the largest number whose difference to others a dphi is
  Values dw_ih, dw_hh, db_ih, db_hh, dnorm_weight, dnorm_bias, dh0, dc0;
};

// `round` is applied wherever a step-by-step implementation would store a tensor, and `round_wide` where it would store
// what it computes in at least float32, the statistics: identities give the truth, and rounding to types what that
// implementation makes of it in these types.
using Rounding = double (*)(double);
ReadTruth read_oracle(const ReadSizes& sizes, const ReadValues& values, Rounding round, Rounding round_wide);

}  // namespace check
