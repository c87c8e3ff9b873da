// The masked loss against a scalar definition in double, and its promises: the same bits on any number of threads and
// however gradients are stored; nothing is read where nothing is hidden.
#include "multimask_near.h"

using namespace check;
using pyeff::MaskLossKind;

namespace {

auto table_forward() { return PYEFF_ALL_OF(multimask_loss); }
auto table_backward() { return PYEFF_ALL_OF(multimask_loss_backward); }

struct Sizes {
  int64_t batch, masks, tokens, width;
};

struct LossCall {
  Number number;
  MaskLossKind kind;
  double beta, scale = 0.3;
  Sizes sizes;
  bool mean;
  std::vector<int32_t> inverse, lengths;
  int64_t count = 0;
  Numbers x, y;
  Strided pred, target;

  LossCall(Number number, MaskLossKind kind, double beta, const Sizes& s, bool mean, bool gaps, uint64_t seed)
      : number(number), kind(kind), beta(beta), sizes(s), mean(mean) {
    Random random(seed);
    const int64_t rows = s.batch * s.masks;
    x.assign(size_t(rows * s.tokens * s.width), kNan), y.assign(size_t(s.batch * s.tokens * s.width), kNan);
    for (int64_t b = 0; b < s.batch; ++b) lengths.push_back(int32_t(b == 1 ? s.tokens / 2 : b == 2 ? 0 : s.tokens));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < s.tokens; ++t) inverse.push_back(random.below(4) ? -1 : int32_t(t));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < s.tokens; ++t) {
        if (!hidden(r, t)) continue;
        ++count;
        const int64_t at = (r * s.tokens + t) * s.width, target_at = (r / s.masks * s.tokens + t) * s.width;
        for (int64_t d = 0; d < s.width; ++d) {
          double& target = y[size_t(target_at + d)];
          if (std::isnan(target)) target = rounded(compute_of(number), random.uniform());
          // Some are what they should be.
          x[size_t(at + d)] = rounded(number, random.below(8) ? random.uniform() : target);
        }
      }
    this->mean &= count > 0;
    pred = Strided(number, rows, s.tokens, s.width, gaps, x);
    target = Strided(compute_of(number), s.batch, s.tokens, s.width, gaps, y);
  }

  bool hidden(int64_t r, int64_t t) const {
    return inverse[size_t(r * sizes.tokens + t)] < 0 && t < lengths[size_t(r / sizes.masks)];
  }
  pyeff::MaskLossProblem problem() const {
    return {number,
            kind,
            beta,
            scale,
            sizes.batch,
            sizes.masks,
            sizes.tokens,
            sizes.width,
            pred.rows,
            target.rows,
            inverse.data(),
            lengths.data(),
            mean ? &count : nullptr};
  }

  struct Truth {
    Near each, total, moments, dpred, dtarget;
  };

  // For the derivatives `up`, one for each row's token.
  Truth truth(const Numbers& up) const {
    const auto [batch, masks, tokens, width] = sizes;
    const double epsilon = check::epsilon(compute_of(number)), root = epsilon * (8 + std::sqrt(double(width)));
    const double factor = mean ? scale / double(count) : scale;
    Truth is{Near(batch * masks * tokens), Near(1), Near(1 + 4 * width), Near(int64_t(x.size())),
             Near(int64_t(y.size()))};
    is.moments.value[0] = double(count);
    for (int64_t r = 0; r < batch * masks; ++r)
      for (int64_t t = 0; t < tokens; ++t) {
        if (!hidden(r, t)) continue;
        const double* a = x.data() + (r * tokens + t) * width;
        const double* b = y.data() + (r / masks * tokens + t) * width;
        double value = 0, size = 0, aa = 0, bb = 0, ab = 0;
        for (int64_t d = 0; d < width; ++d) {
          aa += a[d] * a[d], bb += b[d] * b[d], ab += a[d] * b[d];
          const double gap = std::fabs(a[d] - b[d]);
          value += kind == MaskLossKind::l2                  ? gap * gap
                   : kind == MaskLossKind::l1 || gap >= beta ? gap - (kind == MaskLossKind::l1 ? 0 : beta / 2)
                                                             : gap * gap / (2 * beta);
        }
        size = value + beta * double(width);
        const double lengths_ = std::sqrt(aa * bb);
        if (kind == MaskLossKind::cosine) value = lengths_ > 1e-16 ? 1 - ab / lengths_ : 1, size = 2;
        const size_t row = size_t(r * tokens + t);
        is.each.value[row] = value * scale, is.each.bound[row] = root * size * scale;
        is.total.value[0] += value * factor, is.total.bound[0] += root * size * factor;
        for (int64_t d = 0; d < width; ++d) {
          const double gap = a[d] - b[d], sign = gap > 0 ? 1 : gap < 0 ? -1 : 0;
          double slope = kind == MaskLossKind::l2                             ? 2 * gap
                         : kind == MaskLossKind::l1 || std::fabs(gap) >= beta ? sign
                                                                              : gap / beta;
          double back = -slope, most = 1 + std::fabs(slope);
          if (kind == MaskLossKind::cosine) {
            slope = lengths_ > 1e-16 ? (a[d] * ab / aa - b[d]) / lengths_ : 0;
            back = lengths_ > 1e-16 ? (b[d] * ab / bb - a[d]) / lengths_ : 0;
            most = 4 / std::sqrt(std::min(aa, bb));
          }
          const size_t at = row * size_t(width) + size_t(d);
          const size_t to = size_t((r / masks * tokens + t) * width + d);
          const double weight = factor * up[row], wrong = std::fabs(weight) * most * root;
          is.dpred.value[at] = weight * slope;
          is.dpred.bound[at] = wrong + check::epsilon(number) * std::fabs(weight * slope);
          is.dtarget.value[to] += weight * back, is.dtarget.bound[to] += 2 * wrong;
          const double terms[] = {b[d], b[d] * b[d], a[d], a[d] * a[d]};
          for (int64_t i = 0; i < 4; ++i) {
            is.moments.value[size_t(1 + i * width + d)] += terms[i];
            is.moments.bound[size_t(1 + i * width + d)] += 1e-15 * (1 + double(count)) * std::fabs(terms[i]);
          }
        }
      }
    is.total.bound[0] += epsilon * std::fabs(is.total.value[0]);
    return is;
  }

  void check(const std::string& name, uint64_t seed) const {
    Random random(seed);
    const Number wide = compute_of(number);
    const int64_t rows = sizes.batch * sizes.masks * sizes.tokens, numel = rows * sizes.width;
    Numbers up(static_cast<size_t>(rows), kNan), ones(static_cast<size_t>(rows), 1);
    for (int64_t i = 0; i < rows; ++i)
      if (hidden(i / sizes.tokens, i % sizes.tokens)) up[size_t(i)] = rounded(wide, random.uniform());
    const Truth is = truth(ones), with_up = truth(up);
    const Input upstream(wide, up);
    for_each_usable_isa([&](int isa) {
      const std::string where = std::string(pyeff::isa_name(isa)) + " " + name;
      Output first[6];
      for (int i = 0; i < 3; ++i) {
        pyeff::poison_scratch(i > 0);
        const int64_t streamed = i == 1 ? 0 : INT64_MAX;
        Output found[6] = {{wide, 1},    {number, numel, 64}, {Number::f64, 1 + 4 * sizes.width},
                           {wide, rows}, {number, numel, 64}, {wide, sizes.batch * sizes.tokens * sizes.width, 64}};
        auto* moments = static_cast<double*>(found[2].data());
        CHECK(table_forward().of[isa](problem(), {found[0].data(), false, found[1].data(), moments, streamed},
                                      threads(i)));
        // Without a mean, as that of each has none.
        pyeff::MaskLossProblem plain = problem();
        plain.count = nullptr;
        CHECK(table_forward().of[isa](plain, {found[3].data(), true, nullptr, nullptr}, threads(i)));
        CHECK(table_backward().of[isa](problem(), {upstream.data(), true, found[4].data(), found[5].data(), streamed},
                                       threads(i)));
        if (i == 0) {
          is.total.check(where + " loss", found[0]);
          is.dpred.check(where + " dpred at once", found[1]);
          is.moments.check(where + " moments", found[2]);
          is.each.check(where + " each", found[3]);
          with_up.dpred.check(where + " dpred", found[4]);
          with_up.dtarget.check(where + " dtarget", found[5]);
          // What is asked for alone is the same.
          Output loss(wide, 1), dpred(number, numel, 64), dtarget(wide, found[5].count());
          CHECK(table_forward().of[isa](problem(), {loss.data(), false, nullptr, nullptr}, threads(1)));
          CHECK(table_backward().of[isa](problem(), {upstream.data(), true, dpred.data(), nullptr}, threads(1)));
          CHECK(table_backward().of[isa](problem(), {upstream.data(), true, nullptr, dtarget.data()}, threads(1)));
          CHECK(loss.guarded() && loss.same(found[0]) && dpred.guarded() && dpred.same(found[4]) && dtarget.guarded() &&
                dtarget.same(found[5]));
        }
        for (int j = 0; j < 6; ++j) {
          if (i == 0)
            first[j] = std::move(found[j]);
          else
            CHECK(found[j].guarded() && found[j].same(first[j]));
        }
      }
      pyeff::poison_scratch(false);
    });
  }
};

}  // namespace

TEST(masked_losses_of_all_kinds_are_right) {
  struct {
    MaskLossKind kind;
    double beta;
  } kinds[] = {{MaskLossKind::l2, 0},
               {MaskLossKind::smooth_l1, 0.4},
               {MaskLossKind::smooth_l1, 0},
               {MaskLossKind::l1, 0},
               {MaskLossKind::cosine, 0}};
  const Sizes sizes[] = {{3, 5, 31, 63}, {2, 9, 20, 64}, {1, 1, 1, 500}, {2, 1, 300, 3}};
  uint64_t seed = 0;
  for (const Sizes& s : sizes)
    for (Number number : kNumbers)
      for (const auto& k : kinds) {
        ++seed;
        if (kSanitized && (seed % 2 || s.tokens > 200)) continue;
        const LossCall call(number, k.kind, k.beta, s, seed % 3 == 0, seed % 2, seed);
        call.check(std::string(name_of(number)) + " kind " + std::to_string(int(k.kind)) + " of width " +
                       std::to_string(s.width),
                   seed);
      }
}

TEST(a_masked_mean_of_nothing_is_no_number) {
  for (Number number : kNumbers) {
    LossCall call(number, MaskLossKind::l2, 0, {1, 2, 3, 5}, true, false, 1);
    std::fill(call.inverse.begin(), call.inverse.end(), 0);
    call.count = 0;
    for_each_usable_isa([&](int isa) {
      Output loss(compute_of(number), 1), dpred(number, 30);
      CHECK(table_forward().of[isa](call.problem(), {loss.data(), false, dpred.data(), nullptr}, threads(1)));
      CHECK(std::isnan(loss[0]) && loss.guarded() && dpred.guarded());
      for (int64_t i = 0; i < 30; ++i) CHECK(dpred[i] == 0);
    });
  }
}
