#include "read_inputs.h"

#include <algorithm>

namespace check {
namespace {

using pyeff::Cell;
using pyeff::Norm;
using pyeff::ReadRows;

// The largest divisor up to `most`.
int64_t divisor(int64_t count, int64_t most) {
  for (int64_t i = most; i > 1; --i)
    if (count % i == 0) return i;
  return 1;
}

double largest(const Values& a) {
  double most = 0;
  for (double x : a) most = std::max(most, std::fabs(x));
  return most;
}

// The largest error, as a part of `scale`.
double worst(const Values& truth, const Values& found, double scale) {
  Values gap(truth.size());
  for (size_t i = 0; i < gap.size(); ++i) gap[i] = found[i] - truth[i];
  return scale == 0 ? 0 : largest(gap) / scale;
}
double worst(const Values& truth, const Values& found) { return worst(truth, found, largest(truth)); }

}  // namespace

ReadTruth truth_of(const ReadInputs& call) {
  const Rounding none = [](double x) { return x; };
  return read_oracle(call.sizes, call.values, none, none);
}

ReadTruth same_type_of(const ReadInputs& call) {
  const Rounding to_f32 = [](double x) { return rounded(Number::f32, x); };
  const Rounding to_bf16 = [](double x) { return rounded(Number::bf16, x); };
  const Rounding to_f16 = [](double x) { return rounded(kHalf, x); };
  const Rounding own = call.number == Number::bf16 ? to_bf16 : call.number == kHalf ? to_f16 : to_f32;
  return read_oracle(call.sizes, call.values, own, to_f32);
}

ReadInputs::ReadInputs(Number number, const ReadSizes& sizes, const ReadOptions& o, uint64_t seed)
    : number(number), phi_number(o.wide_phi && size_of(number) == 2 ? Number::f32 : number), sizes(sizes) {
  Random random(seed);
  const int64_t rows = sizes.gates() * sizes.rank, state = sizes.tokens * sizes.rank;
  auto fill = [&](Input& input, Values& value, bool given, int64_t count, double scale, double offset = 0) {
    if (!given) return;
    input = Input(number, count, o.begin);
    for (int64_t i = 0; i < count; ++i) input.set(i, offset + scale * random.uniform());
    for (int64_t i = 0; i < count; ++i) value.push_back(input[i]);
  };
  for (int64_t i = 0; i < sizes.layers; ++i) lay_out(random, o.layouts[i % 3], o);
  fill(w_ih_, values.w_ih, true, rows * sizes.width, 1.7 / std::sqrt(double(sizes.width)));
  fill(w_hh_, values.w_hh, true, rows * sizes.rank, 1.2 / std::sqrt(double(sizes.rank)));
  fill(b_ih_, values.b_ih, o.b_ih, rows, 0.5);
  fill(b_hh_, values.b_hh, o.b_hh, rows, 0.5);
  fill(norm_weight_, values.norm_weight, o.norm_weight && sizes.norm != Norm::none, sizes.width, 0.4, 1.0);
  fill(norm_bias_, values.norm_bias, o.norm_bias && sizes.norm == Norm::layer, sizes.width, 0.4);
  fill(h0_, values.h0, o.h0, state, 1.0);
  fill(c0_, values.c0, o.c0 && sizes.cell == Cell::lstm, state, 1.0);
  fill(grad_out_, values.grad_out, o.grad_out, state, o.grad_range);
  fill(grad_c_, values.grad_c, o.grad_c && sizes.cell == Cell::lstm, state, o.grad_range);
}

void ReadInputs::lay_out(Random& random, Layout layout, const ReadOptions& o) {
  const int64_t n = sizes.tokens, d = sizes.width, a = divisor(n, 9), b = divisor(n / a, 4);
  const int64_t chunk = 16 / size_of(phi_number), whole = (d + chunk - 1) / chunk * chunk;
  ReadRows rows{};
  rows.inner = layout == Layout::strided ? 2 : layout == Layout::broadcast_width ? 0 : 1;
  rows.dims = 1;
  rows.size[0] = n;
  switch (layout) {
    case Layout::dense:
      rows.stride[0] = d;
      break;
    case Layout::padded:
    case Layout::strided:
      rows.stride[0] = rows.inner * d + 3;
      break;
    case Layout::transposed:  // [a, n / a], of which the second lies outermost; d is neither dense
      rows.dims = 2;
      rows.size[0] = a, rows.size[1] = n / a;
      rows.inner = a;
      rows.stride[0] = 1, rows.stride[1] = a * d;
      break;
    case Layout::three_dims:
      rows.dims = 3;
      rows.size[0] = a, rows.size[1] = b, rows.size[2] = n / a / b;
      rows.stride[1] = d + 1, rows.stride[0] = rows.stride[1] * b, rows.stride[2] = rows.stride[0] * a + 5;
      break;
    case Layout::broadcast_rows:
      rows.dims = 2;
      rows.size[0] = a, rows.size[1] = n / a;
      rows.stride[0] = d, rows.stride[1] = 0;
      break;
    case Layout::broadcast_width:
      rows.stride[0] = 1;
      break;
    case Layout::chunks:
      rows.stride[0] = whole;
      break;
    case Layout::blocks:
    case Layout::odd_blocks:
      rows.dims = 2;
      rows.size[0] = n / a, rows.size[1] = a;
      rows.stride[1] = layout == Layout::blocks ? whole : d + 1;
      rows.stride[0] = rows.stride[1] * a + (layout == Layout::blocks ? 3 * chunk : 5);
      break;
  }
  int64_t last = (d - 1) * rows.inner;
  for (int i = 0; i < rows.dims; ++i) last += (rows.size[i] - 1) * rows.stride[i];
  Input phi(phi_number, last + 1, o.begin);
  for (int64_t i = 0; i <= last; ++i) phi.set(i, o.phi_mean + o.phi_range * random.uniform());
  Values value;
  for (int64_t token = 0; token < n; ++token) {
    int64_t at = 0, rest = token;
    for (int i = rows.dims - 1; i >= 0; rest /= rows.size[i--]) at += rest % rows.size[i] * rows.stride[i];
    for (int64_t k = 0; k < d; ++k) value.push_back(phi[at + k * rows.inner]);
  }
  rows.data = phi.data();
  rows_.push_back(rows);
  values.phi.push_back(std::move(value));
  phi_.push_back(std::move(phi));
}

namespace {

// Between guards of a line, at a multiple of 16 bytes; or at no vector's alignment.
Output output(Number number, int64_t count, bool aligned) {
  return aligned ? Output(number, count, 64) : Output(number, count);
}

}  // namespace

ForwardOutputs ReadInputs::forward_outputs(bool save, bool save_gates, bool aligned) const {
  const int64_t state = sizes.tokens * sizes.rank, kinds = sizes.norm == Norm::none  ? 0
                                                           : sizes.norm == Norm::rms ? 1
                                                                                     : 2;
  const bool lstm = sizes.cell == Cell::lstm;
  const auto make = [&](Number type, int64_t count) { return output(type, count, aligned); };
  ForwardOutputs o;
  o.out = make(number, state);
  if (lstm) o.c_last = make(number, state);
  if (save) o.h = make(number, sizes.layers * state);
  if (save && lstm) o.c = make(number, sizes.layers * state);
  if (save_gates) o.gates = make(number, sizes.saved_gates() * sizes.layers * state);
  if (save) o.stats = make(compute_of(number), kinds * sizes.layers * sizes.tokens);
  return o;
}

BackwardOutputs ReadInputs::backward_outputs(Wanted wanted, bool aligned) const {
  const int64_t state = sizes.tokens * sizes.rank, rows = sizes.gates() * sizes.rank, d = sizes.width;
  BackwardOutputs o;
  int64_t next = 0;
  auto make = [&](int64_t count) { return wanted(next++) ? output(number, count, aligned) : Output(); };
  for (int64_t i = 0; i < sizes.layers; ++i) o.dphi.push_back(make(sizes.tokens * d));
  o.dw_ih = make(rows * d), o.dw_hh = make(rows * sizes.rank), o.db_ih = make(rows), o.db_hh = make(rows);
  o.dnorm_weight = make(sizes.norm == Norm::none ? 0 : d), o.dnorm_bias = make(sizes.norm == Norm::layer ? d : 0);
  o.dh0 = make(state), o.dc0 = make(sizes.cell == Cell::lstm ? state : 0);
  return o;
}

// The error is at most what a step-by-step implementation makes in the same type, plus what rounding does to a sum of
// `terms` terms of random signs and to its result: (eps + eps of the sum * sqrt(terms)) of the largest number, or of
// `scale`. The terms are those of all sums on the way, layer after layer. That implementation counts twice, since its
// error is one draw, and of the kernels' the largest of all instruction sets is seen. For f64 the truth has the same
// error once more.
void ReadInputs::compare(const char* who, const char* what, const Output& found, const Values& truth, double same_type,
                         int64_t terms, double scale) const {
  if (found.count() == 0) return;
  scale = std::max(scale, largest(truth));
  const double rounding = epsilon(number) + epsilon(compute_of(number)) * std::sqrt(double(terms));
  const double bound =
      scale * (number == Number::f64 ? 2 * (2 * same_type * 0x1p-29 + rounding) : 2 * same_type + rounding);
  for (int64_t i = 0; i < found.count(); ++i) {
    const double error = std::fabs(found[i] - truth[static_cast<size_t>(i)]);
    if (error <= bound) continue;  // false for a NaN
    const char *cells[] = {"rnn", "gru", "lstm"}, *norms[] = {"rms", "layer", "none"}, *reductions[] = {"mean", "last"};
    std::fprintf(stderr,
                 "%s %s %s %s %s, %ld layers x %ld tokens x %ld -> %ld: %s[%ld] is wrong by %g, allowed %g (of %g)\n",
                 who, name_of(number), cells[int(sizes.cell)], norms[int(sizes.norm)], reductions[int(sizes.reduce)],
                 long(sizes.layers), long(sizes.tokens), long(sizes.width), long(sizes.rank), what, long(i), error,
                 bound, scale);
    std::exit(1);
  }
}

// What the step-by-step implementation is wrong by in a tensor of few elements is small by luck every now and then: the
// largest part of all of a call's results counts for each of them.
void ReadInputs::check(const char* who, const ForwardOutputs& found, const ReadTruth& t,
                       const ReadTruth& same_type) const {
  const int64_t terms = sizes.layers * (sizes.width + sizes.rank);
  const double error = std::max({worst(t.out, same_type.out), worst(t.c_last, same_type.c_last),
                                 worst(t.h, same_type.h), worst(t.c, same_type.c), worst(t.gates, same_type.gates)});
  compare(who, "out", found.out, t.out, error, terms);
  compare(who, "c_last", found.c_last, t.c_last, error, terms);
  compare(who, "h", found.h, t.h, error, terms);
  compare(who, "c", found.c, t.c, error, terms);
  compare(who, "gates", found.gates, t.gates, error, terms);
  Values stats = t.rstd, same_stats = same_type.rstd;
  if (sizes.norm == Norm::layer) {
    stats.insert(stats.end(), t.mean.begin(), t.mean.end());
    same_stats.insert(same_stats.end(), same_type.mean.begin(), same_type.mean.end());
  }
  compare(who, "stats", found.stats, stats, worst(stats, same_stats), sizes.width);
}

void ReadInputs::check(const char* who, const BackwardOutputs& found, const ReadTruth& t,
                       const ReadTruth& same_type) const {
  const int64_t inner = sizes.layers * (sizes.gates() * sizes.rank + sizes.width);
  const int64_t outer = inner + sizes.layers * sizes.tokens;
  double error = 0;
  for (auto gradient : {&ReadTruth::dw_ih, &ReadTruth::dw_hh, &ReadTruth::db_ih, &ReadTruth::db_hh,
                        &ReadTruth::dnorm_weight, &ReadTruth::dnorm_bias, &ReadTruth::dh0, &ReadTruth::dc0})
    error = std::max(error, worst(t.*gradient, same_type.*gradient));
  for (int64_t i = 0; i < sizes.layers; ++i)
    error = std::max(error, worst(t.dphi[i], same_type.dphi[i], t.dphi_terms[i]));
  for (int64_t i = 0; i < sizes.layers; ++i)
    compare(who, "dphi", found.dphi[i], t.dphi[i], error, inner, t.dphi_terms[i]);
  compare(who, "dw_ih", found.dw_ih, t.dw_ih, error, outer);
  compare(who, "dw_hh", found.dw_hh, t.dw_hh, error, outer);
  compare(who, "db_ih", found.db_ih, t.db_ih, error, outer);
  compare(who, "db_hh", found.db_hh, t.db_hh, error, outer);
  compare(who, "dnorm_weight", found.dnorm_weight, t.dnorm_weight, error, outer);
  compare(who, "dnorm_bias", found.dnorm_bias, t.dnorm_bias, error, outer);
  compare(who, "dh0", found.dh0, t.dh0, error, inner);
  compare(who, "dc0", found.dc0, t.dc0, error, inner);
}

std::vector<const Output*> BackwardOutputs::all() const {
  std::vector<const Output*> all;
  for (const Output& output : dphi) all.push_back(&output);
  for (const Output* output : {&dw_ih, &dw_hh, &db_ih, &db_hh, &dnorm_weight, &dnorm_bias, &dh0, &dc0})
    all.push_back(output);
  return all;
}

namespace {

template <class Outputs>
bool all_same(const Outputs& a, const Outputs& b) {
  const auto left = a.all(), right = b.all();
  return std::equal(left.begin(), left.end(), right.begin(), right.end(),
                    [](const Output* x, const Output* y) { return x->same(*y); });
}

}  // namespace

bool same(const ForwardOutputs& a, const ForwardOutputs& b) { return all_same(a, b); }
bool same(const BackwardOutputs& a, const BackwardOutputs& b) { return all_same(a, b); }

}  // namespace check
