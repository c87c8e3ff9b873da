// The shared matrix product, with its prologues and epilogues, against a plain loop in double precision.
#include "cpu/linear.h"
#include "cpu/memory.h"
#include "dev/probe.h"
#include "dev/threads.h"
#include "support.h"

using namespace check;
using pyeff::Product;
using pyeff::ProductTerm;
using pyeff::dev::Threads;

namespace {

enum class Gather { none, index, pointers };

struct Options {
  Number number, stored;
  int vectors;
  Gather gather = Gather::none;
  bool strided = false, scaled = false, by_k = false;  // by_k: the right operand lies [k, n], not [n, k]
  bool bias = false, relu = false;
  double alpha = 1, beta = 0;
};

// One term: what memory holds, and the numbers that this stands for.
struct TestTerm {
  int64_t m, n, k;
  std::vector<double> a, b;  // [m, k], [n, k]
  Input left, right, scale;
  std::vector<int64_t> index;
  std::vector<const void*> pointers, right_rows;
  int64_t row_stride, inner_stride;

  TestTerm(Random& random, const Options& o, int64_t m, int64_t n, int64_t k) : m(m), n(n), k(k) {
    inner_stride = o.strided ? 3 : 1;
    row_stride = (k - 1) * inner_stride + 1 + (o.strided ? 5 : 0);
    const int64_t rows = o.gather == Gather::none ? m : m + 3;  // more rows than are taken, in another order
    left = Input(o.stored, (rows - 1) * row_stride + (k - 1) * inner_stride + 1);
    for (int64_t i = 0; i < (rows - 1) * row_stride + (k - 1) * inner_stride + 1; ++i) left.set(i, random.uniform());
    if (o.scaled) scale = Input(compute_of(o.number), m);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = o.gather == Gather::none ? i : (i * 7 + 2) % rows;
      index.push_back(row);
      pointers.push_back(static_cast<const char*>(left.data()) + row * row_stride * size_of(o.stored));
      if (o.scaled) scale.set(i, random.uniform());
      for (int64_t p = 0; p < k; ++p)
        a.push_back(left[row * row_stride + p * inner_stride] * (o.scaled ? scale[i] : 1));
    }
    right = Input(o.number, n * k);
    for (int64_t i = 0; i < n * k; ++i) right.set(i, random.uniform());
    for (int64_t j = 0; j < n; ++j)
      for (int64_t p = 0; p < k; ++p) b.push_back(right[o.by_k ? p * n + j : j * k + p]);
    for (int64_t p = 0; p < k; ++p)
      right_rows.push_back(static_cast<const char*>(right.data()) + p * n * size_of(o.number));
  }
};

struct Truth {
  std::vector<double> value, bound;
};

// The bound: every sum may round each of its terms (a vector's lanes share the sum, so sqrt(K) of them is generous), an
// operand that is scaled or converted is rounded once, and so is the result.
Truth multiply(const Options& o, const std::vector<TestTerm>& terms, int64_t m, int64_t n, const Input& bias,
               const std::vector<double>& before) {
  Truth t{std::vector<double>(m * n), std::vector<double>(m * n)};
  int64_t total = 1;
  for (const TestTerm& term : terms) total += term.k;
  const double sum_error = epsilon(compute_of(o.number)) * (2 + std::sqrt(double(total)));
  const double operand_error = o.scaled || o.stored != o.number ? epsilon(o.number) : 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, magnitude = 0;
      for (const TestTerm& term : terms) {
        const double *a = term.a.data() + i * term.k, *b = term.b.data() + j * term.k;
        for (int64_t p = 0; p < term.k; ++p) {
          sum += a[p] * b[p];
          magnitude += std::fabs(a[p] * b[p]);
        }
      }
      double value = o.alpha * sum + (o.bias ? bias[j] : 0) + o.beta * before[i * n + j];
      const double rest = (o.bias ? std::fabs(bias[j]) : 0) + std::fabs(o.beta * before[i * n + j]);
      t.bound[i * n + j] =
          std::fabs(o.alpha) * magnitude * (sum_error + operand_error) + (std::fabs(value) + rest) * epsilon(o.number);
      t.value[i * n + j] = o.relu && value < 0 ? 0 : value;
    }
  return t;
}

void check_product(const Options& o, int64_t m, int64_t n, const std::vector<int64_t>& lengths, uint64_t seed) {
  static Threads pools[] = {Threads(1), Threads(2), Threads(5)};
  Random random(seed);
  std::vector<TestTerm> terms;
  for (int64_t k : lengths) terms.emplace_back(random, o, m, n, k);
  Input bias(o.number, n);
  for (int64_t j = 0; j < n; ++j) bias.set(j, random.uniform());
  std::vector<double> before(m * n);
  for (double& x : before) x = rounded(o.number, random.uniform());
  const Truth truth = multiply(o, terms, m, n, bias, before);
  const int64_t row_stride = n + (o.strided ? 9 : 0);

  for_each_usable_isa([&](int isa) {
    std::vector<Output> panels;
    std::vector<ProductTerm> given;
    for (const TestTerm& term : terms) {
      panels.push_back(Output::packed(PYEFF_ALL_OF(panels_bytes).of[isa](o.number, o.vectors, n, term.k)));
      void* to = panels.back().data();
      if (o.by_k)
        PYEFF_ALL_OF(pack_panels_kn)
            .of[isa](o.number, o.vectors, n, term.k, term.right_rows.data(), 1, nullptr, nullptr, to);
      else
        PYEFF_ALL_OF(pack_panels_nk).of[isa](o.number, o.vectors, n, term.k, term.right.data(), term.k, nullptr, to);
      CHECK(panels.back().guarded());
      given.push_back({o.gather == Gather::pointers ? nullptr : term.left.data(), term.row_stride, term.inner_stride,
                       term.k, o.gather == Gather::index ? term.index.data() : nullptr,
                       o.gather == Gather::pointers ? term.pointers.data() : nullptr, term.scale.maybe(), to});
    }
    std::vector<Output> results;
    for (int pool = 0; pool < 3; ++pool) {
      Output& out = results.emplace_back(o.number, (m - 1) * row_stride + n);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n && o.beta != 0; ++j) put(o.number, out.data(), i * row_stride + j, before[i * n + j]);
      const Product problem{o.number,
                            o.stored,
                            o.vectors,
                            m,
                            n,
                            given.data(),
                            static_cast<int>(given.size()),
                            out.data(),
                            row_stride,
                            o.bias ? bias.data() : nullptr,
                            o.alpha,
                            o.beta,
                            o.relu};
      pyeff::poison_scratch(pool == 1);
      CHECK(PYEFF_ALL_OF(product).of[isa](problem, pools[pool].parallel()));
      CHECK(out.guarded());
      CHECK(out.same(results[0]));  // neither the threads nor what lies in the scratch may show
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const double error = std::fabs(results[0][i * row_stride + j] - truth.value[i * n + j]);
        if (error <= truth.bound[i * n + j]) continue;
        std::fprintf(stderr, "%s %s %ldx%ld, k %ld (%zu terms): [%ld, %ld] is %g, not %g (+- %g)\n",
                     pyeff::isa_name(isa), name_of(o.number), long(m), long(n), long(lengths.empty() ? 0 : lengths[0]),
                     lengths.size(), long(i), long(j), results[0][i * row_stride + j], truth.value[i * n + j],
                     truth.bound[i * n + j]);
        std::exit(1);
      }
      for (int64_t j = n; j < row_stride && i + 1 < m; ++j) CHECK(std::isnan(results[0][i * row_stride + j]));
    }
  });
  pyeff::poison_scratch(false);
}

Number other_than(Number number) { return number == Number::f32 ? Number::bf16 : Number::f32; }

}  // namespace

TEST(products_of_all_sizes) {
  const int64_t sizes[] = {1, 7, 63, 96, 97, 500};
  Random random(2);
  for (Number number : kNumbers)
    for (int i = 0; i < (kSanitized ? 12 : 60); ++i) {
      int64_t m = random.pick(sizes), n = random.pick(sizes), k = random.pick(sizes);
      while (m * n * k > (kSanitized ? 1 << 20 : 1 << 24))
        m = random.pick(sizes), n = random.pick(sizes), k = random.pick(sizes);
      Options o{number, number, i % 2 ? 4 : 1};
      o.by_k = i % 3 == 0;
      o.bias = i % 5 == 0;
      check_product(o, m, n, {k}, random.bits());
    }
}

TEST(products_with_every_prologue_and_epilogue) {
  uint64_t seed = 3;
  for (Number number : kNumbers)
    for (Gather gather : {Gather::none, Gather::index, Gather::pointers})
      for (bool convert : {false, true})
        for (bool strided : {false, true})
          for (bool scaled : {false, true}) {
            Options o{number, convert ? other_than(number) : number, 4, gather, strided, scaled};
            Random random(++seed);
            o.by_k = random.coin(), o.bias = random.coin(), o.relu = random.coin();
            if (random.coin()) o.alpha = -0.75;
            if (random.coin()) o.beta = 0.5;
            check_product(o, 29, 71, {37}, seed);
            check_product(o, 13, 66, {24, 1, 7}, seed);  // batch-reduced; even and odd, in place and packed
          }
}

TEST(products_beyond_one_chunk_of_k) {
  uint64_t seed = 1000;
  for (Number number : kNumbers)
    for (bool scaled : {false, true}) {
      Options o{number, number, 4};
      o.scaled = scaled;
      check_product(o, 11, 65, {2500}, ++seed);  // a chunk is 1024 steps, of one number or of two
      check_product(o, 100, 5, {4097}, ++seed);
      check_product(o, 7, 33, {1024, 3, 2048, 5000}, ++seed);
    }
}

TEST(products_of_nothing) {
  static Threads two(2);
  for (Number number : kNumbers)
    for (const std::vector<int64_t>& lengths :
         {std::vector<int64_t>{}, std::vector<int64_t>{0}, std::vector<int64_t>{0, 0}}) {
      for_each_usable_isa([&](int isa) {
        std::vector<ProductTerm> terms;
        for (int64_t k : lengths) terms.push_back({nullptr, 1, 1, k, nullptr, nullptr, nullptr, nullptr});
        Input bias(number, 70);
        Output out(number, 3 * 70);
        for (int64_t i = 0; i < 210; ++i) put(number, out.data(), i, 4);
        for (int64_t i = 0; i < 70; ++i) bias.set(i, double(i));
        Product problem{number,     number, 4,           3, 70,  terms.data(), static_cast<int>(terms.size()),
                        out.data(), 70,     bias.data(), 1, 0.5, false};
        CHECK(PYEFF_ALL_OF(product).of[isa](problem, two.parallel()));
        CHECK(out.guarded());
        for (int64_t i = 0; i < 210; ++i) CHECK(out[i] == double(i % 70) + 2);
        for (auto size : {&Product::m, &Product::n}) {
          Product none = problem;
          none.*size = 0;
          none.out = nullptr;
          CHECK(PYEFF_ALL_OF(product).of[isa](none, two.parallel()));
        }
      });
    }
}

TEST(relu_keeps_a_nan_and_nothing_negative) {
  static Threads one(1);
  for_each_usable_isa([&](int isa) {
    for (Number number : kNumbers) {
      Input left(number, std::vector<double>{NAN, -1, 1, 0}), right(number, std::vector<double>{1});
      Output panels = Output::packed(PYEFF_ALL_OF(panels_bytes).of[isa](number, 4, 1, 1)), out(number, 4);
      PYEFF_ALL_OF(pack_panels_nk).of[isa](number, 4, 1, 1, right.data(), 1, nullptr, panels.data());
      const ProductTerm term{left.data(), 1, 1, 1, nullptr, nullptr, nullptr, panels.data()};
      const Product problem{number, number, 4, 4, 1, &term, 1, out.data(), 1, nullptr, 1, 0, true};
      CHECK(PYEFF_ALL_OF(product).of[isa](problem, one.parallel()));
      CHECK(std::isnan(out[0]) && out[1] == 0 && out[2] == 1 && out[3] == 0);
    }
  });
}

TEST(packing_scales_the_right_operand) {
  for (Number number : kNumbers)
    for_each_usable_isa([&](int isa) {
      const int64_t n = 21, k = 9;
      Random random(5);
      Input right(number, n * k), scale(number, k), left(number, k);
      Output panels = Output::packed(PYEFF_ALL_OF(panels_bytes).of[isa](number, 4, n, k)), out(number, n);
      for (int64_t i = 0; i < n * k; ++i) right.set(i, random.uniform());
      for (int64_t i = 0; i < k; ++i) scale.set(i, random.uniform()), left.set(i, random.uniform());
      PYEFF_ALL_OF(pack_panels_nk).of[isa](number, 4, n, k, right.data(), k, scale.data(), panels.data());
      const ProductTerm term{left.data(), k, 1, k, nullptr, nullptr, nullptr, panels.data()};
      const Product problem{number, number, 4, 1, n, &term, 1, out.data(), n, nullptr, 1, 0, false};
      static Threads one(1);
      CHECK(PYEFF_ALL_OF(product).of[isa](problem, one.parallel()));
      CHECK(out.guarded() && panels.guarded());
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0, magnitude = 0;
        for (int64_t p = 0; p < k; ++p) {
          const double term = left[p] * scale[p] * right[j * k + p];
          sum += term, magnitude += std::fabs(term);
        }
        CHECK(std::fabs(out[j] - sum) <= 2 * epsilon(number) * magnitude);
      }
    });
}

TEST(linear_is_a_product_with_a_bias) {
  static Threads pools[] = {Threads(1), Threads(5)};
  for (Number number : kNumbers) {
    const int64_t rows = 33, in = 50, out = 77, stride = 53;
    Random random(6);
    Input x(number, (rows - 1) * stride + in), weight(number, out * in), bias(number, out);
    for (int64_t i = 0; i < (rows - 1) * stride + in; ++i) x.set(i, random.uniform());
    for (int64_t i = 0; i < out * in; ++i) weight.set(i, random.uniform());
    for (int64_t i = 0; i < out; ++i) bias.set(i, random.uniform());
    for_each_usable_isa([&](int isa) {
      Output first(number, rows * out);
      for (Threads& pool : pools) {
        Output packed = Output::packed(PYEFF_ALL_OF(linear_packed_bytes).of[isa](number, out, in)),
               y(number, rows * out);
        PYEFF_ALL_OF(linear_pack).of[isa](number, out, in, weight.data(), packed.data(), pool.parallel());
        const pyeff::LinearProblem p{number, rows, in, out, x.data(), stride, packed.data(), bias.data(), y.data()};
        CHECK(PYEFF_ALL_OF(linear).of[isa](p, pool.parallel()));
        CHECK(packed.guarded() && y.guarded());
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < out; ++j) {
            double sum = bias[j];
            for (int64_t p = 0; p < in; ++p) sum += x[i * stride + p] * weight[j * in + p];
            CHECK(std::fabs(y[i * out + j] - sum) <=
                  epsilon(number) * (1 + std::fabs(sum)) + 50 * epsilon(compute_of(number)));
          }
        if (&pool == pools)
          first = std::move(y);
        else
          CHECK(y.same(first));
      }
    });
  }
}
