// The loss over all tokens. They are cut into pieces of fixed sizes; each sums for itself, and the pieces' sums are
// added in their order: however many threads there are, the bits are the same.
#pragma once

#include "arena.h"
#include "multimask_loss_rows.h"

namespace pyeff {
namespace PYEFF_ISA {

// Below this length a vector has no direction.
constexpr double kCosineEps = 1e-8;

template <class T, MaskLossKind K>
class LossSweep {
  using C = Compute<T>;
  using Rows = LossRows<T, K>;
  using Group = typename Rows::Group;

 public:
  // Null for what is not wanted; `each` says whether loss and upstream are of each row's token, or one number.
  struct Outputs {
    C* loss;
    const C* upstream;
    bool each;
    T* dpred;
    C* dtarget;
    double* moments;
    int64_t streamed;
  };

  LossSweep(const MaskLossProblem& p, const Outputs& out) : p_(p), out_(out) {
    const int64_t rows = p.batch * p.masks * p.tokens, bytes = rows * p.width * int64_t(sizeof(T));
    stream_ = out.dpred && bytes >= out.streamed && can_stream(out.dpred, p.width);
    if (out.dpred) expect_writes(out.dpred, bytes);
    factor_ = p.count ? p.scale / double(*p.count) : p.scale;
    padded_ = ceil_div(p.width, Rows::kStep) * Rows::kStep;
    // Few enough that their sums are small beside the tensors, and enough for the threads of a large machine.
    const int64_t tokens = p.batch * p.tokens;
    piece_ = larger(ceil_div(tokens, 96), ceil_div(128, p.masks));
    pieces_ = ceil_div(tokens, piece_);
  }

  bool operator()(const Parallel& parallel) {
    Arena counter(nullptr);
    place(counter);
    Scratch scratch(counter.used + 64);
    if (!scratch.block) return false;
    Arena arena(scratch.block);
    place(arena);
    for_each_task(parallel, pieces_, [&](int64_t piece) { run(piece); });
    double total = 0;
    int64_t hidden = 0;
    for (int64_t i = 0; i < pieces_; ++i) total += totals_[i], hidden += counts_[i];
    if (out_.loss && !out_.each) *out_.loss = C(p_.count ? total * p_.scale / double(*p_.count) : total * p_.scale);
    if (!out_.moments) return true;
    out_.moments[0] = double(hidden);
    for_each_task(parallel, 4, [&](int64_t which) {
      double* to = out_.moments + 1 + which * p_.width;
      for (int64_t i = 0; i < p_.width; ++i) to[i] = 0;
      for (int64_t piece = 0; piece < pieces_; ++piece) {
        const double* from = moments_ + (piece * 4 + which) * padded_;
        for (int64_t i = 0; i < p_.width; ++i) to[i] += from[i];
      }
    });
    return true;
  }

 private:
  void place(Arena& arena) {
    totals_ = arena.take<double>(pieces_);
    counts_ = arena.take<int64_t>(pieces_);
    moments_ = arena.take<double>(out_.moments ? pieces_ * 4 * padded_ : 0);
    hidden_ = arena.take<int64_t>(pieces_ * 2 * p_.masks);
  }

  int64_t row_of(int64_t token, int64_t mask) const { return (token / p_.tokens) * p_.masks + mask; }

  // The rows in which a token is hidden.
  int64_t find_hidden(int64_t token, int64_t* rows) const {
    const int64_t b = token / p_.tokens, t = token % p_.tokens;
    if (t >= p_.lengths[b]) return 0;
    int64_t count = 0;
    for (int64_t r = b * p_.masks; r < (b + 1) * p_.masks; ++r)
      if (p_.inverse[r * p_.tokens + t] < 0) rows[count++] = r;
    return count;
  }

  const T* pred(int64_t row, int64_t token) const {
    return static_cast<const T*>(p_.pred.data) + row * p_.pred.sample + token % p_.tokens * p_.pred.token;
  }

  void run(int64_t piece) {
    const int64_t first = piece * piece_, last = smaller(first + piece_, p_.batch * p_.tokens);
    Rows rows{p_.width, {C(p_.beta)}, nullptr, stream_, {}, nullptr};
    if (out_.moments) {
      double* sums = moments_ + piece * 4 * padded_;
      for (int64_t i = 0; i < 4 * padded_; ++i) sums[i] = 0;
      rows.moments = {sums, sums + padded_, sums + 2 * padded_, sums + 3 * padded_};
    }
    int64_t* now = hidden_ + piece * 2 * p_.masks;
    int64_t* then = now + p_.masks;
    double total = 0;
    int64_t all = 0, count = find_hidden(first, now);
    for (int64_t token = first; token < last; ++token) {
      const int64_t next = token + 1 < last ? find_hidden(token + 1, then) : 0;
      total += one_token(rows, token, now, count, then, next);
      all += count, count = next;
      int64_t* other = now;
      now = then, then = other;
    }
    totals_[piece] = total, counts_[piece] = all;
    if (stream_) end_of_stream();
  }

  // The sum over the rows in which the token is hidden.
  double one_token(Rows& rows, int64_t token, const int64_t* hidden, int64_t count, const int64_t* then, int64_t next) {
    const int64_t b = token / p_.tokens, t = token % p_.tokens;
    rows.y = static_cast<const C*>(p_.target.data) + b * p_.target.sample + t * p_.target.token;
    if (out_.dpred || (out_.loss && out_.each)) {
      for (int64_t r = b * p_.masks, i = 0; r < (b + 1) * p_.masks; ++r) {
        if (i < count && hidden[i] == r) {
          ++i;
          continue;
        }
        if (out_.dpred) rows.zero(out_.dpred + (r * p_.tokens + t) * p_.width);
        if (out_.loss && out_.each) out_.loss[r * p_.tokens + t] = 0;
      }
    }
    if (out_.dtarget) {
      rows.dy = out_.dtarget + token * p_.width;
      for (int64_t i = 0; i < p_.width; ++i) rows.dy[i] = 0;
    }
    C target_square = 0;
    if (Rows::kCosine && count) target_square = rows.square_of_target();
    double total = 0;
    for (int64_t i = 0; i < count;) {
      const int group = count - i >= Rows::kRows ? Rows::kRows : 1;
      Group g;
      for (int j = 0; j < group; ++j) {
        const int64_t at = (hidden[i + j] * p_.tokens + t);
        g.x[j] = pred(hidden[i + j], token);
        const int64_t a = i + group + j;
        g.ahead[j] = a < count ? pred(hidden[a], token) : a - count < next ? pred(then[a - count], token + 1) : g.x[j];
        g.dx[j] = out_.dpred ? out_.dpred + at * p_.width : nullptr;
        g.factor[j] = C(factor_);
        if (out_.upstream) g.factor[j] *= out_.upstream[out_.each ? at : 0];
      }
      const double repeats = i == 0 ? double(count) : 0;
      group == 1 ? rows.template run<1>(g, repeats) : rows.template run<Rows::kRows>(g, repeats);
      for (int j = 0; j < group; ++j) {
        if constexpr (Rows::kCosine) finish_cosine(rows, g, j, target_square);
        total += double(g.loss[j]);
        if (out_.loss && out_.each) out_.loss[hidden[i + j] * p_.tokens + t] = g.loss[j] * C(p_.scale);
      }
      i += group;
    }
    return total;
  }

  // 1 - x.y / (|x| |y|), and its derivatives: where a length is below the least one, it is constant.
  void finish_cosine(const Rows& rows, Group& g, int j, C target_square) const {
    const C least = C(kCosineEps * kCosineEps), dot = g.loss[j], xx = g.square[j];
    const C over_x = C(1) / root(xx < least ? least : xx);
    const C over_y = C(1) / root(target_square < least ? least : target_square);
    const C cosine = dot * over_x * over_y;
    g.loss[j] = C(1) - cosine;
    if (!g.dx[j] && !rows.dy) return;
    const C by_x = xx < least ? C(0) : g.factor[j] * cosine * over_x * over_x;
    const C on_y = target_square < least ? C(0) : g.factor[j] * cosine * over_y * over_y;
    rows.combine(g.x[j], g.dx[j], by_x, -g.factor[j] * over_x * over_y, on_y);
  }

  const MaskLossProblem& p_;
  const Outputs out_;
  bool stream_;
  double factor_;
  int64_t padded_, piece_, pieces_;
  double *totals_ = nullptr, *moments_ = nullptr;
  int64_t *counts_ = nullptr, *hidden_ = nullptr;
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
