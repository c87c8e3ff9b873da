// The multimask family's kernels that move tokens, and that of biases, against their definitions; and their promises:
// nothing depends on the number of threads or on how outputs are stored, no slot past what a row keeps and no padding
// is read.
#include <algorithm>
#include <string>

#include "dev/probe.h"
#include "multimask_call.h"

using namespace check;

namespace {

// One result of all sets, on 1, 2 and 5 threads, aligned or not, past the caches or not: run(isa, threads, streamed,
// place) fills it, right(place, isa) says whether it is right. Within a set all are the same.
template <class Run, class Right>
void check_all(Number number, int64_t count, const Run& run, const Right& right) {
  for_each_usable_isa([&](int isa) {
    Place first(number, count, false);
    run(isa, threads(0), kNever, first.data());
    CHECK(first.guarded());
    right(first);
    for (int i = 1; i < 3; ++i)
      for (bool aligned : {false, true}) {
        Place other(number, count, aligned);
        run(isa, threads(i), aligned || i == 1 ? 0 : kNever, other.data());
        CHECK(other.guarded() && other.same(first));
      }
  });
}

void check_gather(const Plan& plan, Number number, bool strided, Random* random) {
  const Sizes& s = plan.sizes;
  const int64_t width = s.width;
  Rows x(number, s.batch, s.tokens, width, strided, random);
  Rows grad(number, plan.rows, plan.slots, width, strided, random);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t t = 0; t < s.tokens; ++t) {
      bool read = false;
      for (int64_t m = 0; m < s.masks; ++m) read = read || plan.slot(b * s.masks + m, t) >= 0;
      if (!read) x.forget(b, t);
    }
  for (int64_t r = 0; r < plan.rows; ++r)
    for (int64_t k = plan.kept(r); k < plan.slots; ++k) grad.forget(r, k);
  check_all(
      number, plan.rows * plan.slots * width,
      [&](int isa, const pyeff::Parallel& parallel, int64_t streamed, void* out) {
        PYEFF_ALL_OF(multimask_gather).of[isa](plan.problem(number, streamed), x.at, out, parallel);
      },
      [&](const Place& out) {
        for (int64_t r = 0; r < plan.rows; ++r)
          for (int64_t k = 0; k < plan.slots; ++k)
            for (int64_t d = 0; d < width; ++d) {
              const double truth = k < plan.kept(r) ? x(r / s.masks, plan.id(r, k), d) : 0;
              CHECK(out[(r * plan.slots + k) * width + d] == truth);
            }
      });
  check_all(
      number, s.batch * s.tokens * width,
      [&](int isa, const pyeff::Parallel& parallel, int64_t streamed, void* dx) {
        PYEFF_ALL_OF(multimask_gather_backward).of[isa](plan.problem(number, streamed), grad.at, dx, parallel);
      },
      [&](const Place& dx) {
        for (int64_t b = 0; b < s.batch; ++b)
          for (int64_t t = 0; t < s.tokens; ++t)
            for (int64_t d = 0; d < width; ++d) {
              double sum = 0, size = 0;
              for (int64_t r = b * s.masks; r < (b + 1) * s.masks; ++r)
                if (plan.slot(r, t) >= 0) {
                  const double g = grad(r, plan.slot(r, t), d);
                  sum += g, size += std::fabs(g);
                }
              const double bound =
                  size * std::sqrt(double(s.masks)) * epsilon(compute_of(number)) + std::fabs(sum) * epsilon(number);
              CHECK(near(dx[(b * s.tokens + t) * width + d], sum, bound));
            }
      });
}

enum class Fill { none, one, each };

void check_scatter(const Plan& plan, Number number, bool strided, Fill fills, double std, Random* random) {
  const Sizes& s = plan.sizes;
  const int64_t width = s.width, groups = (width + 3) / 4, fill_count = fills == Fill::each ? s.batch : 1;
  Rows x(number, plan.rows, plan.slots, width, strided, random);
  Rows fill(number, fill_count, s.tokens, width, strided, random);
  Rows grad(number, plan.rows, s.tokens, width, strided, random);
  std::vector<int64_t> names;
  for (int64_t b = 0; b < s.batch; ++b) names.push_back(static_cast<int64_t>(random->bits()));
  const MultimaskNoise noise{random->bits(), strided ? names.data() : nullptr, std};
  StridedRows under = fill.at;
  if (fills != Fill::each) under.outer = 0;
  if (fills == Fill::none) under.data = nullptr;
  for (int64_t r = 0; r < plan.rows; ++r) {
    for (int64_t k = plan.kept(r); k < plan.slots; ++k) x.forget(r, k);
    for (int64_t t = plan.length(r / s.masks); t < s.tokens; ++t) grad.forget(r, t);
  }
  const auto filled = [&](int64_t b, int64_t t, int64_t d) {
    return fills == Fill::none ? 0.0 : fill(fills == Fill::one ? 0 : b, t, d);
  };
  check_all(
      number, plan.rows * s.tokens * width,
      [&](int isa, const pyeff::Parallel& parallel, int64_t streamed, void* out) {
        PYEFF_ALL_OF(multimask_scatter).of[isa](plan.problem(number, streamed), x.at, under, noise, out, parallel);
      },
      [&](const Place& out) {
        for (int64_t r = 0; r < plan.rows; ++r)
          for (int64_t t = 0; t < s.tokens; ++t)
            for (int64_t d = 0; d < width; ++d) {
              const int64_t b = r / s.masks;
              const double found = out[(r * s.tokens + t) * width + d];
              if (plan.slot(r, t) >= 0) {
                CHECK(found == x(r, plan.slot(r, t), d));
              } else if (!plan.hidden(r, t)) {
                CHECK(found == 0);
              } else if (std == 0) {
                CHECK(found == filled(b, t, d));
              } else if (d % 3 == 0 || !kSanitized) {
                const uint64_t sample = static_cast<uint64_t>(strided ? names[static_cast<size_t>(b)] : b);
                const int64_t at = t * 4 * groups + d / 2 * 2;
                const uint32_t mask = static_cast<uint32_t>(r % s.masks);
                const double z =
                    box_muller(word(noise.seed, at, mask, sample), word(noise.seed, at + 1, mask, sample), d % 2);
                const double truth = filled(b, t, d) + std * z, unit = epsilon(compute_of(number));
                const double rounding = unit * (std::fabs(truth) + std::fabs(filled(b, t, d)));
                CHECK(near(found, truth, std * 8 * 0x1p-23 + rounding + epsilon(number) * std::fabs(truth)));
              }
            }
      });
  check_all(
      number, plan.rows * plan.slots * width,
      [&](int isa, const pyeff::Parallel& parallel, int64_t streamed, void* dx) {
        const auto backward = PYEFF_ALL_OF(multimask_scatter_backward).of[isa];
        backward(plan.problem(number, streamed), grad.at, dx, nullptr, 1, parallel);
      },
      [&](const Place& dx) {
        for (int64_t r = 0; r < plan.rows; ++r)
          for (int64_t k = 0; k < plan.slots; ++k)
            for (int64_t d = 0; d < width; ++d)
              CHECK(dx[(r * plan.slots + k) * width + d] == (k < plan.kept(r) ? grad(r, plan.id(r, k), d) : 0));
      });
  if (fills == Fill::none) return;
  check_all(
      number, fill_count * s.tokens * width,
      [&](int isa, const pyeff::Parallel& parallel, int64_t streamed, void* dfill) {
        const auto backward = PYEFF_ALL_OF(multimask_scatter_backward).of[isa];
        backward(plan.problem(number, streamed), grad.at, nullptr, dfill, fill_count, parallel);
      },
      [&](const Place& dfill) {
        const int64_t summed = plan.rows / fill_count;
        for (int64_t f = 0; f < fill_count; ++f)
          for (int64_t t = 0; t < s.tokens; ++t)
            for (int64_t d = 0; d < width; ++d) {
              double sum = 0, size = 0;
              for (int64_t r = f * summed; r < (f + 1) * summed; ++r)
                if (plan.hidden(r, t)) sum += grad(r, t, d), size += std::fabs(grad(r, t, d));
              const double bound =
                  size * std::sqrt(double(summed)) * epsilon(compute_of(number)) + std::fabs(sum) * epsilon(number);
              CHECK(near(dfill[(f * s.tokens + t) * width + d], sum, bound));
            }
      });
}

}  // namespace

// Random123, kat_vectors.
TEST(philox_gives_the_published_words) {
  struct Known {
    int rounds;
    Words counter;
    uint64_t key;
    Words words;
  };
  const Words zero = {{0, 0, 0, 0}}, ones = {{~0u, ~0u, ~0u, ~0u}};
  const Words pi = {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}};
  const Known known[] = {
      {10, zero, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {10, ones, ~uint64_t{0}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {10, pi, 0x299f31d0a4093822, {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
      {7, zero, 0, {{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}}},
      {7, ones, ~uint64_t{0}, {{0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}}},
      {7, pi, 0x299f31d0a4093822, {{0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}}},
  };
  for (const Known& k : known)
    for_each_usable_isa([&](int isa) {
      std::vector<uint32_t> found(192);
      const uint64_t last = k.counter.of[2] | uint64_t{k.counter.of[3]} << 32;
      PYEFF_ALL_OF(philox_words).of[isa](k.rounds, k.key, k.counter.of[0], k.counter.of[1], last, 192, found.data());
      CHECK(std::equal(found.begin(), found.begin() + 4, k.words.of));
      for (uint32_t i = 0; i < 192; ++i) {
        Words counter = k.counter;
        counter.of[0] += i / 4;
        CHECK(found[i] == philox(k.rounds, k.key, counter).of[i % 4]);
      }
    });
}

TEST(tokens_are_moved_where_they_belong) {
  constexpr Sizes kSizes[] = {{1, 1, 1, 1},   {1, 1, 16, 8},  {2, 3, 17, 63},  {3, 2, 20, 130},
                              {1, 4, 9, 257}, {2, 8, 30, 96}, {1, 300, 3, 20}, {2, 2, 5, 800}};
  uint64_t seed = 0;
  for (const Sizes& sizes : kSizes)
    for (Number number : kNumbers) {
      Random random(++seed);
      const Plan plan(sizes, seed % 2 ? 0.3 : 0.8, &random);
      const bool strided = random.coin();
      check_gather(plan, number, strided, &random);
      const Fill fill = seed % 3 == 0 ? Fill::none : seed % 3 == 1 ? Fill::one : Fill::each;
      check_scatter(plan, number, strided, fill, seed % 4 == 0 ? 0 : 0.7, &random);
    }
}

TEST(no_index_leads_out_of_the_tensors) {
  Random random(7);
  const Plan right({2, 2, 6, 4}, 0.6, &random);
  const auto fine = [](const Plan& plan) {
    bool all = true, any = false;
    for_each_usable_isa([&](int isa) {
      const bool ok = PYEFF_ALL_OF(multimask_index_ok).of[isa](plan.problem(Number::f32, 0));
      all = all && ok, any = any || ok;
    });
    CHECK(all == any);
    return all;
  };
  CHECK(fine(right));
  for (int64_t wrong : {int64_t{-1}, int64_t{1} << 30}) {
    Plan plan = right;
    const int32_t number = static_cast<int32_t>(wrong);
    plan.lengths[1] = number;
    CHECK(!fine(plan));
    plan = right, plan.keep_len[3] = number;
    CHECK(!fine(plan));
    plan = right, plan.ids_keep[0] = number;
    CHECK(plan.kept(0) == 0 || !fine(plan));
    plan = right, plan.inverse[9] = number;
    CHECK(fine(plan) == (number < 0));
  }
}

TEST(biases_are_distances_in_the_whole_sequence) {
  struct Shape {
    Sizes sizes;
    int64_t heads, prefix;
  };
  constexpr Shape kShapes[] = {
      {{1, 1, 1, 1}, 1, 0}, {{2, 2, 60, 1}, 3, 1}, {{1, 3, 90, 1}, 2, 0}, {{2, 1, 33, 1}, 5, 7}};
  uint64_t seed = 100;
  for (const Shape& shape : kShapes)
    for (Number number : kNumbers) {
      Random random(++seed);
      const Plan plan(shape.sizes, 0.7, &random);
      const int64_t slots = plan.slots, heads = shape.heads, prefix = shape.prefix;
      const Number wide = compute_of(number);
      Input slopes(wide, heads), grad(number, plan.rows * heads * slots * slots);
      for (int64_t h = 0; h < heads; ++h) slopes.set(h, random.uniform());
      const auto counts = [&](int64_t r, int64_t i) { return prefix <= i && i < plan.kept(r); };
      std::vector<double> sums(static_cast<size_t>(heads)), sizes(static_cast<size_t>(heads));
      // body(r, h, i, j, index, distance or -1 where there is none)
      const auto for_each_pair = [&](const auto& body) {
        int64_t at = 0;
        for (int64_t r = 0; r < plan.rows; ++r)
          for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < slots; ++i)
              for (int64_t j = 0; j < slots; ++j, ++at)
                body(r, h, j, at, counts(r, i) && counts(r, j) ? std::abs(plan.id(r, i) - plan.id(r, j)) : -1);
      };
      for_each_pair([&](int64_t, int64_t h, int64_t, int64_t at, double distance) {
        grad.set(at, distance < 0 ? std::nan("") : random.uniform());
        if (distance < 0) return;
        sums[static_cast<size_t>(h)] -= grad[at] * distance;
        sizes[static_cast<size_t>(h)] += std::fabs(grad[at] * distance);
      });
      check_all(
          number, plan.rows * heads * slots * slots,
          [&](int isa, const pyeff::Parallel& parallel, int64_t streamed, void* out) {
            const auto forward = PYEFF_ALL_OF(multimask_relative_bias).of[isa];
            CHECK(forward(plan.problem(number, streamed), slopes.data(), heads, prefix, out, parallel));
          },
          [&](const Place& out) {
            for_each_pair([&](int64_t r, int64_t h, int64_t j, int64_t at, double distance) {
              if (plan.kept(r) > 0 && j >= plan.kept(r))
                CHECK(out[at] == -INFINITY);
              else
                CHECK(out[at] == rounded(number, rounded(wide, -slopes[h] * std::max(distance, 0.0))));
            });
          });
      check_all(
          wide, heads,
          [&](int isa, const pyeff::Parallel& parallel, int64_t streamed, void* dslopes) {
            const auto backward = PYEFF_ALL_OF(multimask_relative_bias_backward).of[isa];
            CHECK(backward(plan.problem(number, streamed), grad.data(), heads, prefix, dslopes, parallel));
          },
          [&](const Place& dslopes) {
            for (size_t h = 0; h < sums.size(); ++h)
              CHECK(near(dslopes[static_cast<int64_t>(h)], sums[h], 16 * epsilon(wide) * sizes[h]));
          });
    }
}
