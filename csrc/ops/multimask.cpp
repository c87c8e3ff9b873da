// The multimask family's kernels that move tokens, for the dispatcher, and those of its masks, biases and averages. The
// callers in pyeff/ops have checked the arguments of their user and allocated the outputs; what is checked here is that
// no kernel can be led outside of its tensors, by the index, too.
#include "cpu/multimask.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "ops/averages.h"
#include "ops/checked.h"
#include "ops/number.h"
#include "ops/parallel.h"

namespace pyeff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What says "name[i] is 7, expected 0 to 5" of the first number that is outside.
void check_numbers(const int32_t* numbers, int64_t count, int64_t lowest, int64_t highest, const char* name,
                   int64_t first) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(lowest <= numbers[i] && numbers[i] <= highest, name, " has ", numbers[i], " as element ", first + i,
                    ", expected ", lowest, " to ", highest);
}

struct Arguments {
  MultimaskProblem problem{};
  Checked checked;

  Arguments() { problem.rows = -1; }
  Arguments(const Tensor& like, const char* name) : Arguments() {
    problem.number = number_of(like, name);
    checked.type = like.scalar_type();
  }

  ScalarType wide() const { return problem.number == Number::f64 ? ScalarType::Double : ScalarType::Float; }
  const int32_t* index(const Tensor& t, int64_t numel, const char* name) const {
    return static_cast<const int32_t*>(checked.read(t, numel, ScalarType::Int, name));
  }

  void matrix(const Tensor& t, const char* name, int64_t* columns) {
    STD_TORCH_CHECK(t.dim() == 2, name, " is not a matrix");
    STD_TORCH_CHECK(problem.rows < 0 || problem.rows == t.sizes()[0], name, " has ", t.sizes()[0], " rows, expected ",
                    problem.rows);
    problem.rows = t.sizes()[0], *columns = t.sizes()[1];
  }
  void take_kept(const Tensor& ids_keep, const Tensor& keep_len) {
    matrix(ids_keep, "ids_keep", &problem.slots);
    problem.ids_keep = index(ids_keep, problem.rows * problem.slots, "ids_keep");
    problem.keep_len = index(keep_len, problem.rows, "keep_len");
  }
  void take_inverse(const Tensor& inverse) {
    matrix(inverse, "inverse", &problem.tokens);
    problem.inverse = index(inverse, problem.rows * problem.tokens, "inverse");
  }
  void take_lengths(const Tensor& lengths) { problem.lengths = index(lengths, problem.batch, "lengths"); }

  // [outer, inner, width] with contiguous rows, and any distances between them.
  StridedRows rows(const Tensor& t, int64_t outer, int64_t inner, const char* name) const {
    STD_TORCH_CHECK(checked.here(t) && t.scalar_type() == checked.type, name,
                    " is not on the CPU, or has another dtype than the others");
    STD_TORCH_CHECK(t.dim() == 3 && t.sizes()[0] == outer && t.sizes()[1] == inner && t.sizes()[2] == problem.width,
                    name, " is not [", outer, ", ", inner, ", ", problem.width, "]");
    STD_TORCH_CHECK(problem.width == 1 || t.strides()[2] == 1, name, " has rows that are not contiguous");
    return {t.const_data_ptr(), t.strides()[0], t.strides()[1]};
  }

  // To be called when all is known; the last of the checks.
  void check() const {
    const MultimaskProblem& p = problem;
    STD_TORCH_CHECK(p.batch > 0 && p.rows > 0 && p.rows % p.batch == 0, "there are ", p.rows,
                    " rows, expected a multiple of the ", p.batch, " samples");
    if (PYEFF_CHOSEN(multimask_index_ok)(p)) return;
    if (p.inverse) check_numbers(p.inverse, p.rows * p.tokens, INT32_MIN, p.slots - 1, "inverse", 0);
    if (p.lengths) check_numbers(p.lengths, p.batch, 0, p.tokens, "lengths", 0);
    if (p.keep_len) check_numbers(p.keep_len, p.rows, 0, p.slots, "keep_len", 0);
    for (int64_t r = 0; p.ids_keep && r < p.rows; ++r)
      check_numbers(p.ids_keep + r * p.slots, p.keep_len[r], 0, p.tokens - 1, "ids_keep", r * p.slots);
    STD_TORCH_CHECK(false, "the index is not that of a plan");
  }
};

int64_t size_of(const Tensor& t, int64_t dim, int64_t dims, const char* name) {
  STD_TORCH_CHECK(t.dim() == dims, name, " has ", t.dim(), " dimensions, expected ", dims);
  return t.sizes()[dim];
}

// The seed and the samples' names.
MultimaskNoise noise_of(const Arguments& a, const Tensor& seed, const MaybeTensor& sample_ids, double std) {
  MultimaskNoise noise{};
  noise.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(a.checked.read(seed, 1, ScalarType::Long, "seed")));
  if (sample_ids)
    noise.sample_ids =
        static_cast<const int64_t*>(a.checked.read(*sample_ids, a.problem.batch, ScalarType::Long, "sample_ids"));
  noise.std = std;
  return noise;
}

void gather(Tensor x, Tensor ids_keep, Tensor keep_len, Tensor out) {
  Arguments a(x, "x");
  MultimaskProblem& p = a.problem;
  a.take_kept(ids_keep, keep_len);
  p.batch = size_of(x, 0, 3, "x"), p.tokens = x.sizes()[1], p.width = x.sizes()[2];
  const StridedRows from = a.rows(x, p.batch, p.tokens, "x");
  a.check();
  void* to = a.checked.write(out, p.rows * p.slots * p.width, "out");
  if (to) PYEFF_CHOSEN(multimask_gather)(p, from, to, torch_parallel());
}

void gather_backward(Tensor grad, Tensor inverse, Tensor dx) {
  Arguments a(grad, "grad");
  MultimaskProblem& p = a.problem;
  a.take_inverse(inverse);
  p.batch = size_of(dx, 0, 3, "dx"), p.slots = size_of(grad, 1, 3, "grad"), p.width = grad.sizes()[2];
  const StridedRows from = a.rows(grad, p.rows, p.slots, "grad");
  a.check();
  void* to = a.checked.write(dx, p.batch * p.tokens * p.width, "dx");
  if (to) PYEFF_CHOSEN(multimask_gather_backward)(p, from, to, torch_parallel());
}

void scatter(Tensor x, Tensor inverse, Tensor lengths, MaybeTensor fill, Tensor seed, MaybeTensor sample_ids,
             double noise_std, Tensor out) {
  Arguments a(x, "x");
  MultimaskProblem& p = a.problem;
  a.take_inverse(inverse);
  p.batch = size_of(lengths, 0, 1, "lengths"), p.slots = size_of(x, 1, 3, "x"), p.width = x.sizes()[2];
  a.take_lengths(lengths);
  const StridedRows from = a.rows(x, p.rows, p.slots, "x");
  StridedRows under{};
  if (fill) {
    const int64_t fills = size_of(*fill, 0, 3, "fill");
    under = a.rows(*fill, fills == 1 ? 1 : p.batch, p.tokens, "fill");
    if (fills == 1) under.outer = 0;
  }
  a.check();
  const MultimaskNoise noise = noise_of(a, seed, sample_ids, noise_std);
  void* to = a.checked.write(out, p.rows * p.tokens * p.width, "out");
  if (to) PYEFF_CHOSEN(multimask_scatter)(p, from, under, noise, to, torch_parallel());
}

void scatter_backward(Tensor grad, Tensor ids_keep, Tensor keep_len, Tensor inverse, Tensor lengths, Tensor dx,
                      Tensor dfill) {
  Arguments a(grad, "grad");
  MultimaskProblem& p = a.problem;
  a.take_kept(ids_keep, keep_len);
  a.take_inverse(inverse);
  p.batch = size_of(lengths, 0, 1, "lengths"), p.width = size_of(grad, 2, 3, "grad");
  a.take_lengths(lengths);
  const StridedRows from = a.rows(grad, p.rows, p.tokens, "grad");
  a.check();
  const int64_t fills = dfill.dim() == 3 && dfill.sizes()[0] == 1 ? 1 : p.batch;
  void* kept = a.checked.write(dx, p.rows * p.slots * p.width, "dx");
  void* hidden = a.checked.write(dfill, fills * p.tokens * p.width, "dfill");
  PYEFF_CHOSEN(multimask_scatter_backward)(p, from, kept, hidden, fills, torch_parallel());
}

// Any number of tokens: they are only subtracted from each other.
void take_places(Arguments* a, const Tensor& ids_keep, const Tensor& keep_len, int64_t prefix) {
  STD_TORCH_CHECK(prefix >= 0, "prefix is ", prefix, ", expected at least 0");
  a->take_kept(ids_keep, keep_len);
  a->problem.batch = 1, a->problem.tokens = int64_t(INT32_MAX) + 1;
  a->check();
}

void relative_bias(Tensor ids_keep, Tensor keep_len, Tensor slopes, int64_t prefix, Tensor out) {
  Arguments a(out, "out");
  const MultimaskProblem& p = a.problem;
  take_places(&a, ids_keep, keep_len, prefix);
  const int64_t heads = size_of(slopes, 0, 1, "slopes");
  const void* scales = a.checked.read(slopes, heads, a.wide(), "slopes");
  void* to = a.checked.write(out, p.rows * heads * p.slots * p.slots, "out");
  if (!to) return;
  STD_TORCH_CHECK(PYEFF_CHOSEN(multimask_relative_bias)(p, scales, heads, prefix, to, torch_parallel()),
                  "multimask_relative_bias: out of memory");
}

void relative_bias_backward(Tensor grad, Tensor ids_keep, Tensor keep_len, int64_t prefix, Tensor dslopes) {
  Arguments a(grad, "grad");
  const MultimaskProblem& p = a.problem;
  take_places(&a, ids_keep, keep_len, prefix);
  const int64_t heads = size_of(dslopes, 0, 1, "dslopes");
  const void* from = a.checked.read(grad, p.rows * heads * p.slots * p.slots, "grad");
  void* to = a.checked.write(dslopes, heads, a.wide(), "dslopes");
  if (!to) return;
  STD_TORCH_CHECK(PYEFF_CHOSEN(multimask_relative_bias_backward)(p, from, heads, prefix, to, torch_parallel()),
                  "multimask_relative_bias_backward: out of memory");
}

void block_mask(Tensor seed, MaybeTensor sample_ids, Tensor lengths, int64_t masks, int64_t grid_width, double keep,
                double share, int64_t length, bool inverse, Tensor ids_keep, Tensor keep_len, Tensor kept_slot) {
  Arguments a;
  MultimaskProblem& p = a.problem;
  p.batch = size_of(lengths, 0, 1, "lengths");
  a.matrix(ids_keep, "ids_keep", &p.slots);
  a.matrix(kept_slot, "inverse", &p.tokens);
  STD_TORCH_CHECK(masks > 0 && p.batch > 0 && p.rows == p.batch * masks, "ids_keep has ", p.rows, " rows, expected ",
                  masks, " for each of ", p.batch, " samples");
  constexpr int64_t kMost = int64_t{1} << 30;
  STD_TORCH_CHECK(p.tokens < kMost && masks < kMost, "inverse is of ", p.tokens, " tokens and masks is ", masks,
                  ", expected less than 2^30");
  STD_TORCH_CHECK(grid_width >= 0 && (grid_width == 0 || p.tokens % grid_width == 0), "grid_width is ", grid_width,
                  ", expected 0 or a divisor of ", p.tokens);
  STD_TORCH_CHECK(0 <= keep && keep <= 1, "keep is ", keep, ", expected 0 to 1");
  STD_TORCH_CHECK(std::fabs(share) * static_cast<double>(p.tokens) < 0x1p32, "share is ", share,
                  ", expected less than 2^32 centres of blocks");
  STD_TORCH_CHECK(0 < length && length < kMost, "length is ", length, ", expected 1 to 2^30");
  a.take_lengths(lengths);
  a.check();
  const MultimaskNoise noise = noise_of(a, seed, sample_ids, 0);
  auto write = [&](const Tensor& t, int64_t numel, const char* name) {
    return static_cast<int32_t*>(a.checked.write(t, numel, ScalarType::Int, name));
  };
  BlockMasks made{grid_width, keep, share, length, inverse, nullptr, nullptr, nullptr};
  made.ids_keep = write(ids_keep, p.rows * p.slots, "ids_keep");
  made.keep_len = write(keep_len, p.rows, "keep_len");
  made.inverse = write(kept_slot, p.rows * p.tokens, "inverse");
  STD_TORCH_CHECK(made.keep_len, "keep_len is empty");
  STD_TORCH_CHECK(PYEFF_CHOSEN(multimask_block_mask)(p, noise, made, torch_parallel()),
                  "multimask_block_mask: out of memory");
}

void ema_update(std::vector<Tensor> ema, std::vector<Tensor> params, Tensor decay, std::vector<Tensor> copies) {
  check_averages(ema, params, copies);
  const Checked checked{ScalarType::Double};
  const double keep = *static_cast<const double*>(checked.read(decay, 1, "decay"));
  std::vector<EmaTensor> all(ema.size());
  for (size_t i = 0; i < ema.size(); ++i) {
    EmaTensor& one = all[i];
    one.count = ema[i].numel();
    one.first = i ? all[i - 1].first + all[i - 1].count : 0;
    one.number = number_of(ema[i], "ema"), one.param_number = number_of(params[i], "params");
    one.ema = checked.write(ema[i], one.count, ema[i].scalar_type(), "ema");
    one.param = checked.read(params[i], one.count, params[i].scalar_type(), "params");
    if (copies.empty()) continue;
    one.copy_number = number_of(copies[i], "copies");
    one.copy = checked.write(copies[i], one.count, copies[i].scalar_type(), "copies");
  }
  PYEFF_CHOSEN(multimask_ema_update)(all.data(), static_cast<int64_t>(all.size()), keep, kMultimaskStreamed,
                                     torch_parallel());
}

STABLE_TORCH_LIBRARY_FRAGMENT(pyeff_cpu, m) {
  m.def("multimask_gather(Tensor x, Tensor ids_keep, Tensor keep_len, Tensor(a!) out) -> ()");
  m.def("multimask_gather_backward(Tensor grad, Tensor inverse, Tensor(a!) dx) -> ()");
  m.def(
      "multimask_scatter(Tensor x, Tensor inverse, Tensor lengths, Tensor? fill, Tensor seed, Tensor? sample_ids, "
      "float noise_std, Tensor(a!) out) -> ()");
  m.def(
      "multimask_scatter_backward(Tensor grad, Tensor ids_keep, Tensor keep_len, Tensor inverse, Tensor lengths, "
      "Tensor(a!) dx, Tensor(b!) dfill) -> ()");
  m.def("multimask_relative_bias(Tensor ids_keep, Tensor keep_len, Tensor slopes, int prefix, Tensor(a!) out) -> ()");
  m.def(
      "multimask_relative_bias_backward(Tensor grad, Tensor ids_keep, Tensor keep_len, int prefix, "
      "Tensor(a!) dslopes) -> ()");
  m.def(
      "multimask_block_mask(Tensor seed, Tensor? sample_ids, Tensor lengths, int masks, int grid_width, float keep, "
      "float share, int length, bool inverse, Tensor(a!) ids_keep, Tensor(b!) keep_len, Tensor(c!) kept_slot) -> ()");
  m.def("multimask_ema_update(Tensor(a!)[] ema, Tensor[] params, Tensor decay, Tensor(b!)[] copies) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cpu, CPU, m) {
  m.impl("multimask_gather", TORCH_BOX(&gather));
  m.impl("multimask_gather_backward", TORCH_BOX(&gather_backward));
  m.impl("multimask_scatter", TORCH_BOX(&scatter));
  m.impl("multimask_scatter_backward", TORCH_BOX(&scatter_backward));
  m.impl("multimask_relative_bias", TORCH_BOX(&relative_bias));
  m.impl("multimask_relative_bias_backward", TORCH_BOX(&relative_bias_backward));
  m.impl("multimask_block_mask", TORCH_BOX(&block_mask));
  m.impl("multimask_ema_update", TORCH_BOX(&ema_update));
}

}  // namespace
}  // namespace pyeff
