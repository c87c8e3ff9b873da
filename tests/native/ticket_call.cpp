#include "ticket_call.h"

#include <algorithm>
#include <string>

namespace check {
namespace {

const double kNan = std::nan("");

double normal_cdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

double activated(Activation a, double z) {
  return a == Activation::relu ? (z < 0 ? 0 : z) : a == Activation::gelu ? z * normal_cdf(z) : z;
}

// Sums of `terms` products of total size `size` that come out at `value`: each of them is rounded by the accumulator
// (the lanes of a vector share the sum, so sqrt is generous), and the result is.
double sum_bound(Number number, int64_t terms, double size, double value) {
  return size * epsilon(compute_of(number)) * (4 + std::sqrt(double(terms))) + std::fabs(value) * epsilon(number);
}

struct Sum {
  double value = 0, size = 0, wrong = 0;
  // a * b, where b may be wrong by so much already.
  void add(double a, double b, double b_wrong) {
    value += a * b, size += std::fabs(a * b), wrong += std::fabs(a) * b_wrong;
  }
  double bound(Number number, int64_t terms) const { return sum_bound(number, terms, size, value) + wrong; }
};

}  // namespace

void Near::check(const char* what, const Output& found, const std::string& where) const {
  CHECK(found.count() == static_cast<int64_t>(value.size()));
  CHECK(found.guarded());
  for (size_t i = 0; i < value.size(); ++i) {
    const double x = found[static_cast<int64_t>(i)];
    if (std::fabs(x - value[i]) <= bound[i]) continue;
    std::fprintf(stderr, "%s: %s[%zu] is %g, not %g (+- %g)\n", where.c_str(), what, i, x, value[i], bound[i]);
    std::exit(1);
  }
}

std::vector<int32_t> ticket_index(const std::vector<std::vector<int32_t>>& living, int64_t columns) {
  const int32_t rows = static_cast<int32_t>(living.size());
  std::vector<int32_t> row_start{0}, column, column_start{0}, row, slot;
  for (const auto& in_row : living) {
    column.insert(column.end(), in_row.begin(), in_row.end());
    row_start.push_back(static_cast<int32_t>(column.size()));
  }
  for (int32_t c = 0; c < columns; ++c) {
    for (int32_t r = 0; r < rows; ++r)
      for (int32_t s = row_start[r]; s < row_start[r + 1]; ++s)
        if (column[s] == c) row.push_back(r), slot.push_back(s);
    column_start.push_back(static_cast<int32_t>(row.size()));
  }
  auto order = [](const std::vector<int32_t>& start) {
    std::vector<int32_t> of(start.size() - 1);
    for (size_t i = 0; i < of.size(); ++i) of[i] = static_cast<int32_t>(i);
    std::stable_sort(of.begin(), of.end(),
                     [&](int32_t a, int32_t b) { return start[a + 1] - start[a] > start[b + 1] - start[b]; });
    return of;
  };
  std::vector<int32_t> index;
  for (const auto& part : {row_start, column, column_start, row, slot, order(row_start), order(column_start)})
    index.insert(index.end(), part.begin(), part.end());
  return index;
}

TicketCall::TicketCall(Number number, const TicketSizes& sizes, const TicketOptions& options, uint64_t seed)
    : number(number), sizes(sizes), options(options) {
  Random random(seed);
  rows = (sizes.out + sizes.bo - 1) / sizes.bo, columns = (sizes.in + sizes.bi - 1) / sizes.bi;
  living_.resize(static_cast<size_t>(rows));
  std::vector<bool> selected(static_cast<size_t>(columns));
  // A row and a column of blocks are empty where there are enough.
  const int64_t no_row = rows > 3 ? random.below(rows) : -1, no_column = columns > 3 ? random.below(columns) : -1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      if (std::fabs(random.uniform()) < options.density && r != no_row && c != no_column) {
        living_[static_cast<size_t>(r)].push_back(static_cast<int32_t>(c));
        selected[static_cast<size_t>(c)] = true;
        ++nnz;
      }
  index = ticket_index(living_, columns);

  values = Input(number, nnz * sizes.bo * sizes.bi);
  int64_t at = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t c : living_[static_cast<size_t>(r)])
      for (int64_t i = 0; i < sizes.bo; ++i)
        for (int64_t j = 0; j < sizes.bi; ++j) values.set(at++, inside(r, c, i, j) ? random.uniform() : kNan);

  x_stride = sizes.in + (options.strided ? 3 : 0), grad_stride = sizes.out + (options.strided ? 5 : 0);
  x = Input(number, (sizes.tokens - 1) * x_stride + sizes.in);
  grad = Input(number, (sizes.tokens - 1) * grad_stride + sizes.out);
  for (int64_t i = 0; i < (sizes.tokens - 1) * x_stride + sizes.in; ++i) {
    const int64_t column = i % x_stride;
    x.set(i, column < sizes.in && selected[static_cast<size_t>(column / sizes.bi)] ? random.uniform() : kNan);
  }
  for (int64_t i = 0; i < (sizes.tokens - 1) * grad_stride + sizes.out; ++i)
    grad.set(i, i % grad_stride < sizes.out ? random.uniform() : kNan);
  if (options.bias) {
    bias = Input(number, sizes.out);
    for (int64_t i = 0; i < sizes.out; ++i) bias.set(i, random.uniform());
  }
  if (options.activation != Activation::none) {
    saved = Input(number, sizes.tokens * sizes.out);
    for (int64_t i = 0; i < sizes.tokens * sizes.out; ++i) {
      const double z = 4 * random.uniform();
      saved.set(i, options.activation == Activation::relu ? std::fmax(z, 0) : z);
    }
  }
}

double TicketCall::act_derivative(int64_t n, int64_t o) const {
  if (options.activation == Activation::none) return 1;
  const double s = saved[n * sizes.out + o];
  if (options.activation == Activation::relu) return s > 0;
  return normal_cdf(s) + s * std::exp(-s * s / 2) / std::sqrt(2 * std::acos(-1.0));
}

TicketTruth TicketCall::truth() const {
  TicketTruth t;
  const int64_t block = sizes.bo * sizes.bi;
  const bool gelu = options.activation == Activation::gelu;
  // Of g: a few units where it is computed, as a difference from 0 at that; and it is rounded before it is multiplied.
  auto g_of = [&](int64_t n, int64_t o, double* computed) {
    const double from = grad[n * grad_stride + o], g = from * act_derivative(n, o);
    *computed = gelu ? 8 * epsilon(compute_of(number)) * std::fabs(from) : 0;
    return g;
  };
  std::vector<Sum> sum(static_cast<size_t>(sizes.tokens * sizes.out)), dx(static_cast<size_t>(sizes.tokens * sizes.in));
  std::vector<Sum> dv(static_cast<size_t>(nnz * block));
  for (int64_t r = 0, slot = 0; r < rows; ++r)
    for (int32_t c : living_[static_cast<size_t>(r)]) {
      for (int64_t i = 0; i < sizes.bo; ++i)
        for (int64_t j = 0; j < sizes.bi; ++j) {
          if (!inside(r, c, i, j)) continue;
          const int64_t o = r * sizes.bo + i, k = c * sizes.bi + j, at = slot * block + i * sizes.bi + j;
          for (int64_t n = 0; n < sizes.tokens; ++n) {
            const double w = values[at], xs = x[n * x_stride + k];
            double wrong, g = g_of(n, o, &wrong);
            if (gelu) wrong += epsilon(number) * std::fabs(g);
            sum[n * sizes.out + o].add(w, xs, 0);
            dx[n * sizes.in + k].add(w, g, wrong);
            dv[at].add(xs, g, wrong);
          }
        }
      ++slot;
    }
  for (int64_t i = 0; i < sizes.tokens * sizes.out; ++i) {
    const double b = options.bias ? bias[i % sizes.out] : 0, z = sum[i].value + b;
    const double wrong = sum_bound(number, sizes.in + 1, sum[i].size + std::fabs(b), 0),
                 y = activated(options.activation, z);
    t.z.add(z, wrong + std::fabs(z) * epsilon(number));
    // gelu is nowhere steeper than 1.13.
    t.y.add(
        y, 1.13 * wrong + std::fabs(y) * epsilon(number) + (gelu ? 8 * epsilon(compute_of(number)) * std::fabs(z) : 0));
  }
  for (const Sum& d : dx) t.dx.add(d.value, d.bound(number, sizes.out));
  // What lies past the end of the weight is exactly zero.
  for (const Sum& d : dv) t.dvalues.add(d.value, d.bound(number, sizes.tokens));
  for (int64_t o = 0; o < sizes.out; ++o) {
    Sum db;
    for (int64_t n = 0; n < sizes.tokens; ++n) {
      double wrong, g = g_of(n, o, &wrong);
      db.add(1, g, wrong);
    }
    t.dbias.add(db.value, db.bound(number, sizes.tokens));
  }
  return t;
}

pyeff::TicketProblem TicketCall::problem() const {
  return {number, options.activation, sizes.tokens,  sizes.in, sizes.out, sizes.bo, sizes.bi,
          nnz,    index.data(),       values.data(), x.data(), x_stride};
}

std::pair<Output, Output> TicketCall::forward(int isa, const pyeff::Parallel& parallel, bool keep) const {
  Output y(number, sizes.tokens * sizes.out), z(number, keep ? sizes.tokens * sizes.out : 0);
  CHECK(PYEFF_ALL_OF(ticket_index_error).of[isa](problem()) == nullptr);
  CHECK(PYEFF_ALL_OF(ticket_forward).of[isa](problem(), {bias.maybe(), y.data(), z.maybe()}, parallel));
  return {std::move(y), std::move(z)};
}

TicketGradients TicketCall::backward(int isa, const pyeff::Parallel& parallel, int wanted) const {
  TicketGradients g{{number, wanted & dx ? sizes.tokens * sizes.in : 0},
                    {number, wanted & dvalues ? nnz * sizes.bo * sizes.bi : 0},
                    {number, wanted & dbias ? sizes.out : 0}};
  const pyeff::TicketBackward b{grad.data(),  grad_stride,       saved.maybe(),
                                g.dx.maybe(), g.dvalues.maybe(), g.dbias.maybe()};
  CHECK(PYEFF_ALL_OF(ticket_backward).of[isa](problem(), b, parallel));
  for (const Output* output : {&g.dx, &g.dvalues, &g.dbias}) CHECK(output->guarded());
  return g;
}

std::string TicketCall::name() const {
  char text[160];
  std::snprintf(text, sizeof text, "%s [%ld, %ld] to %ld in blocks %ldx%ld, density %g, activation %d", name_of(number),
                long(sizes.tokens), long(sizes.in), long(sizes.out), long(sizes.bo), long(sizes.bi), options.density,
                static_cast<int>(options.activation));
  return text;
}

}  // namespace check
