// Teacher targets against a scalar definition in double, and their promises: the same bits on any number of threads and
// however outputs are stored; nothing is read that does not count.
#include <functional>

#include "multimask_near.h"

using namespace check;
using pyeff::MaskNorm;

namespace {

constexpr MaskNorm kNorms[] = {MaskNorm::none, MaskNorm::instance, MaskNorm::layer, MaskNorm::batch};

auto table_targets() { return PYEFF_ALL_OF(multimask_targets); }
auto table_targets_backward() { return PYEFF_ALL_OF(multimask_targets_backward); }

struct Sizes {
  int64_t batch, tokens, width, count;
};

// Every group over which a norm takes statistics, as the places of its numbers.
void for_groups(const Sizes& s, MaskNorm norm, const std::vector<int32_t>& lengths,
                const std::function<void(const std::vector<size_t>&)>& body) {
  auto at = [&](int64_t b, int64_t t, int64_t d) { return size_t((b * s.tokens + t) * s.width + d); };
  std::vector<size_t> group;
  auto flush = [&] {
    if (!group.empty()) body(group);
    group.clear();
  };
  if (norm == MaskNorm::layer) {
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t t = 0; t < lengths[size_t(b)]; ++t, flush())
        for (int64_t d = 0; d < s.width; ++d) group.push_back(at(b, t, d));
    return;
  }
  for (int64_t d = 0; d < s.width; ++d, flush())
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t t = 0; t < lengths[size_t(b)]; ++t) group.push_back(at(b, t, d));
      if (norm == MaskNorm::instance) flush();
    }
}

struct Statistics {
  double mean = 0, rstd = 0, size = 0, wrong = 0, largest = 0;
  Statistics(const Near& x, const std::vector<size_t>& group, double eps, double epsilon) {
    for (size_t i : group) mean += x.value[i] / double(group.size());
    double variance = 0;
    for (size_t i : group) {
      variance += (x.value[i] - mean) * (x.value[i] - mean) / double(group.size());
      size = std::max(size, std::fabs(x.value[i])), wrong = std::max(wrong, x.bound[i]);
      largest = std::max(largest, std::fabs(x.value[i] - mean));
    }
    rstd = 1 / std::sqrt(variance + eps), largest *= rstd;
    // Of a normalised number: what it was wrong by, the roundings of the mean, and those of the deviation's sum.
    const double rounding = epsilon * (4 + std::sqrt(double(group.size())));
    wrong = (2 * wrong + epsilon * 2 * size) * rstd * (1 + largest) + rounding * (1 + largest);
  }
};

Near normalised(const Sizes& s, MaskNorm norm, const Near& x, const std::vector<int32_t>& lengths, double eps,
                double epsilon) {
  Near y(int64_t(x.value.size()));
  for_groups(s, norm, lengths, [&](const std::vector<size_t>& group) {
    const Statistics of(x, group, eps, epsilon);
    for (size_t i : group) {
      y.value[i] = norm == MaskNorm::none ? x.value[i] : (x.value[i] - of.mean) * of.rstd;
      y.bound[i] = norm == MaskNorm::none ? x.bound[i] + epsilon * std::fabs(x.value[i]) : of.wrong;
    }
  });
  return y;
}

// The gradient of what a norm was taken of.
Near gradient(const Sizes& s, MaskNorm norm, const Near& x, const Near& g, const std::vector<int32_t>& lengths,
              double eps, double weight, double epsilon) {
  Near dx(int64_t(x.value.size()));
  for_groups(s, norm, lengths, [&](const std::vector<size_t>& group) {
    const Statistics of(x, group, eps, epsilon);
    double mean = 0, product = 0, size = 0, wrong = 0;
    for (size_t i : group) {
      const double n = (x.value[i] - of.mean) * of.rstd;
      mean += g.value[i] / double(group.size()), product += g.value[i] * n / double(group.size());
      size = std::max(size, std::fabs(g.value[i])), wrong = std::max(wrong, g.bound[i]);
    }
    const double spread = 1 + of.largest * of.largest;
    for (size_t i : group) {
      if (norm == MaskNorm::none) {
        dx.value[i] = g.value[i] * weight, dx.bound[i] = (g.bound[i] + epsilon * std::fabs(g.value[i])) * weight;
        continue;
      }
      const double n = (x.value[i] - of.mean) * of.rstd;
      dx.value[i] = (g.value[i] - mean - n * product) * of.rstd * weight;
      dx.bound[i] = of.rstd * weight * spread *
                    (3 * wrong + 4 * size * (of.wrong + epsilon * (4 + std::sqrt(double(group.size())))));
    }
  });
  return dx;
}

struct TargetsCall {
  Number number;
  Sizes sizes;
  MaskNorm norm, post;
  double eps = 1e-5;
  std::vector<int32_t> lengths;
  std::vector<Near> x;
  std::vector<Strided> layers;
  std::vector<MaskRows> rows;
  Near g;
  Strided grad;

  TargetsCall(Number number, const Sizes& s, MaskNorm norm, MaskNorm post, double mean, double deviation, bool gaps,
              uint64_t seed)
      : number(number), sizes(s), norm(norm), post(post), g(s.batch * s.tokens * s.width) {
    Random random(seed);
    const int64_t numel = s.batch * s.tokens * s.width;
    // The first is whole; one is empty, and one has a single token, where there are enough.
    for (int64_t b = 0; b < s.batch; ++b)
      lengths.push_back(int32_t(b == 0 ? s.tokens : b == 1 ? s.tokens * 2 / 3 : b == 2 ? 0 : 1));
    auto fill = [&](Near& to, Number of, double at, double by) {
      Numbers padded(size_t(numel), kNan);
      for (int64_t i = 0; i < numel; ++i) {
        if (i / s.width % s.tokens >= lengths[size_t(i / s.width / s.tokens)]) continue;
        padded[size_t(i)] = to.value[size_t(i)] = rounded(of, at + by * random.uniform());
      }
      return padded;
    };
    for (int64_t k = 0; k < s.count; ++k) {
      x.emplace_back(numel);
      layers.emplace_back(number, s.batch, s.tokens, s.width, gaps, fill(x.back(), number, mean, deviation));
      rows.push_back(layers.back().rows);
    }
    grad = Strided(compute_of(number), s.batch, s.tokens, s.width, gaps, fill(g, compute_of(number), 0, 1));
  }

  pyeff::TargetsProblem problem() const {
    return {number, norm, post, eps, sizes.batch, sizes.tokens, sizes.width, sizes.count, rows.data(), lengths.data()};
  }

  Near sum(double epsilon) const {
    Near total(int64_t(x[0].value.size()));
    for (const Near& layer : x) {
      const Near y = normalised(sizes, norm, layer, lengths, eps, epsilon);
      for (size_t i = 0; i < y.value.size(); ++i) {
        total.value[i] += y.value[i] / double(x.size());
        total.bound[i] += (y.bound[i] + epsilon * double(x.size()) * std::fabs(y.value[i])) / double(x.size());
      }
    }
    return total;
  }

  void check(const std::string& name) const {
    const double epsilon = check::epsilon(compute_of(number));
    const Near total = sum(epsilon);
    const Near truth = post == MaskNorm::none ? total : normalised(sizes, post, total, lengths, eps, epsilon);
    const Near back = post == MaskNorm::none ? g : gradient(sizes, post, total, g, lengths, eps, 1, epsilon);
    std::vector<Near> dx;
    for (const Near& layer : x) {
      dx.push_back(gradient(sizes, norm, layer, back, lengths, eps, 1 / double(x.size()), epsilon));
      for (size_t i = 0; i < dx.back().value.size(); ++i)
        dx.back().bound[i] += check::epsilon(number) * std::fabs(dx.back().value[i]);
    }
    const int64_t numel = int64_t(total.value.size());
    for_each_usable_isa([&](int isa) {
      const std::string where = std::string(pyeff::isa_name(isa)) + " " + name;
      Output first;
      std::vector<Output> gradients;
      for (int i = 0; i < 3; ++i) {
        pyeff::poison_scratch(i > 0);
        // Where rows may be stored past the caches, they are.
        Output out(compute_of(number), numel, 64);
        CHECK(table_targets().of[isa](problem(), {1 / double(x.size()), false, out.data(), i == 1 ? 0 : INT64_MAX},
                                      threads(i)));
        std::vector<Output> found;
        std::vector<void*> data;
        for (size_t k = 0; k < x.size(); ++k)
          found.emplace_back(number, numel, 64), data.push_back(found.back().data());
        CHECK(
            table_targets_backward().of[isa](problem(), {grad.rows, data.data(), i == 1 ? 0 : INT64_MAX}, threads(i)));
        if (i == 0) {
          truth.check(where + " out", out);
          for (size_t k = 0; k < x.size(); ++k) dx[k].check(where + " dlayer", found[k]);
          first = std::move(out), gradients = std::move(found);
          continue;
        }
        CHECK(out.guarded() && out.same(first));
        for (size_t k = 0; k < x.size(); ++k) CHECK(found[k].guarded() && found[k].same(gradients[k]));
      }
      pyeff::poison_scratch(false);
      if (post != MaskNorm::none) return;
      // Layer by layer, and padding of the sum is left alone.
      Output layered(compute_of(number), numel);
      for (int64_t i = 0; i < numel; ++i)
        put(compute_of(number), layered.data(), i,
            i / sizes.width % sizes.tokens < lengths[size_t(i / sizes.width / sizes.tokens)] ? 0 : 7);
      for (size_t k = 0; k < x.size(); ++k) {
        pyeff::TargetsProblem one = problem();
        one.layers = &rows[k], one.count = 1;
        CHECK(table_targets().of[isa](one, {1 / double(x.size()), true, layered.data()}, threads(1)));
      }
      Near padded = total;
      for (int64_t i = 0; i < numel; ++i)
        if (i / sizes.width % sizes.tokens >= lengths[size_t(i / sizes.width / sizes.tokens)])
          padded.value[size_t(i)] = 7;
      padded.check(where + " layered", layered);
    });
  }
};

std::string name_of(Number number, const Sizes& s, int a, int b) {
  return std::string(check::name_of(number)) + " " + std::to_string(s.batch) + "x" + std::to_string(s.tokens) + "x" +
         std::to_string(s.width) + " of " + std::to_string(s.count) + ": " + std::to_string(a) + " " +
         std::to_string(b);
}

}  // namespace

TEST(targets_of_all_norms_are_right) {
  const Sizes sizes[] = {{4, 21, 63, 3}, {1, 1, 5, 1}, {2, 50, 64, 7}, {2, 9, 500, 2}};
  uint64_t seed = 0;
  for (const Sizes& s : sizes)
    for (Number number : kNumbers)
      for (MaskNorm norm : kNorms)
        for (MaskNorm post : kNorms) {
          ++seed;
          if (kSanitized && seed % 3) continue;
          // No mean of a few tokens is divided by their deviation twice: that forgets all digits.
          if (s.batch == 4 && post != MaskNorm::none && post != MaskNorm::layer) continue;
          TargetsCall(number, s, norm, post, 0.3, 1, seed % 2, seed).check(name_of(number, s, int(norm), int(post)));
        }
}

TEST(targets_keep_the_digits_of_small_deviations) {
  for (MaskNorm norm : {MaskNorm::instance, MaskNorm::layer, MaskNorm::batch}) {
    const Sizes s{2, 40, 70, 2};
    TargetsCall(Number::f32, s, norm, MaskNorm::none, 30, 0.01, true, 99).check(name_of(Number::f32, s, int(norm), 0));
  }
}
