// READ's forward for few tokens, where packing the weights would cost more than the products. The input products of all
// layers are one product, so that w_ih is read once; then the recurrence walks through the layers, its units shared
// out.
#pragma once

#include "dot.h"
#include "read_pack.h"

namespace pyeff {
namespace PYEFF_ISA {

template <class T, class CellT>
struct ReadSmall {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int kUnits = kLanes<C>, kGates = CellT::kGates;
  static constexpr int64_t kRowBlock = 24;  // rows of w_ih of a task

  const ReadProblem& p;
  const ReadForward& out;
  int64_t rank_pad, gate_row, x_stride, h_stride;
  T* x;           // [layers x tokens][x_stride]: gamma (phi - mean) rstd, + beta
  T* h[2];        // [tokens][h_stride], the state as an operand: before and now
  C* state;       // [tokens][rank_pad]
  C *cell, *sum;  // [tokens][rank_pad]
  C* from_x;      // [layers x tokens][kGates][rank_pad]
  C* from_h;      // [tokens][kGates][rank_pad]
  const T** x_rows;
  const T** h_rows[2];
  C **out_rows, **moving;  // [tasks of a phase][rows]

  static int64_t padded(int64_t k) { return ceil_div(k, DotStep<T>::kLength) * DotStep<T>::kLength; }

  ReadSmall(const ReadProblem& problem, const ReadForward& result) : p(problem), out(result) {
    rank_pad = ceil_div(p.rank, kUnits) * kUnits;
    gate_row = kGates * rank_pad;
    x_stride = padded(p.width);
    h_stride = padded(rank_pad);
  }
  int64_t rows() const { return p.layers * p.tokens; }
  int64_t x_tasks() const { return kGates * ceil_div(p.rank, kRowBlock); }
  int64_t h_tasks() const { return ceil_div(p.rank, kUnits); }

  void place(Arena& arena) {
    x = arena.take<T>(rows() * x_stride);
    from_x = arena.take<C>(rows() * gate_row);
    from_h = arena.take<C>(p.tokens * gate_row);
    state = arena.take<C>(p.tokens * rank_pad);
    cell = arena.take<C>(CellT::kCell == Cell::lstm ? p.tokens * rank_pad : 0);
    sum = arena.take<C>(p.tokens * rank_pad);
    for (int i = 0; i < 2; ++i) {
      h[i] = arena.take<T>(p.tokens * h_stride);
      h_rows[i] = arena.take<const T*>(p.tokens);
    }
    x_rows = arena.take<const T*>(rows());
    const int64_t pointers = larger(x_tasks() * rows(), h_tasks() * p.tokens);
    out_rows = arena.take<C*>(pointers);
    moving = arena.take<C*>(pointers);
  }

  void start() {
    const T* h0 = static_cast<const T*>(p.h0);
    const T* c0 = static_cast<const T*>(p.c0);
    for (int64_t n = 0; n < p.tokens; ++n) {
      for (int i = 0; i < 2; ++i) {
        __builtin_memset(h[i] + n * h_stride, 0, size_t(h_stride) * sizeof(T));
        h_rows[i][n] = h[i] + n * h_stride;
      }
      for (int64_t u = 0; u < rank_pad; u += kUnits) {
        const int64_t at = n * p.rank + u, to = n * rank_pad + u;
        const V first = h0 ? load_first(h0 + at, p.rank - u) : V{};
        store(state + to, first);
        store(h[0] + n * h_stride + u, first);
        if (cell) store(cell + to, c0 ? load_first(c0 + at, p.rank - u) : V{});
        store(sum + to, V{});
      }
    }
  }

  // Normalises the tokens of one layer into left operands.
  void normalize(int64_t layer) {
    with_phi<T>(p, [&](auto type) { normalize_from<decltype(type)>(layer); });
  }

  template <class P>
  void normalize_from(int64_t layer) {
    const ReadRows& rows = p.phi[layer];
    const T* gamma = static_cast<const T*>(p.norm_weight);
    const T* beta = static_cast<const T*>(p.norm_bias);
    for (int64_t n = 0; n < p.tokens; ++n) {
      const P* row = static_cast<const P*>(rows.data) + row_offset(rows, n);
      T* to = x + (layer * p.tokens + n) * x_stride;
      C mean, rstd;
      row_statistics(row, rows.inner, p.width, p.norm, p.eps, mean, rstd);
      if (out.stats && p.norm != Norm::none) {
        C* stats = static_cast<C*>(out.stats) + layer * p.tokens + n;
        stats[0] = rstd;
        if (p.norm == Norm::layer) stats[p.layers * p.tokens] = mean;
      }
      for (int64_t k = 0; k < x_stride; k += kUnits) {
        const int64_t left = p.width - k;
        V v = {};
        if (left > 0) {
          v = (load_strided(row + k * rows.inner, rows.inner, left) - mean) * rstd;
          if (gamma) v *= load_first(gamma + k, left);
          if (beta) v += load_first(beta + k, left);
        }
        store(to + k, v);
        for (int64_t l = larger(left, 0); l < kUnits; ++l) to[k + l] = T{};  // (0 - mean) must not remain
      }
      x_rows[layer * p.tokens + n] = to;
    }
  }

  // A block of rows of w_ih with the tokens of all layers.
  void input_product(int64_t task) {
    const int64_t blocks = ceil_div(p.rank, kRowBlock), gate = task / blocks, first = task % blocks * kRowBlock;
    C** to = out_rows + task * rows();
    for (int64_t i = 0; i < rows(); ++i) to[i] = from_x + i * gate_row + gate * rank_pad + first;
    dot_rows<T>(x_rows, rows(), static_cast<const T*>(p.w_ih) + (gate * p.rank + first) * p.width, p.width,
                smaller(kRowBlock, p.rank - first), p.width, to, moving + task * rows());
  }

  // One layer for one vector of units, all tokens.
  void step(int64_t layer, int64_t task) {
    const int64_t u = task * kUnits, count = smaller(kUnits, p.rank - u), before = layer & 1;
    const bool has_state = layer > 0 || p.h0;
    for (int gate = 0; has_state && gate < kGates; ++gate) {
      C** to = out_rows + task * p.tokens;
      for (int64_t n = 0; n < p.tokens; ++n) to[n] = from_h + n * gate_row + gate * rank_pad + u;
      dot_rows<T>(h_rows[before], p.tokens, static_cast<const T*>(p.w_hh) + (gate * p.rank + u) * p.rank, p.rank, count,
                  p.rank, to, moving + task * p.tokens);
    }
    V bias_x[kGates] = {}, bias_h[kGates] = {};
    for (int gate = 0; gate < kGates; ++gate) {
      if (p.b_ih) bias_x[gate] = load_first(static_cast<const T*>(p.b_ih) + gate * p.rank + u, count);
      if (p.b_hh) bias_h[gate] = load_first(static_cast<const T*>(p.b_hh) + gate * p.rank + u, count);
    }
    for (int64_t n = 0; n < p.tokens; ++n) {
      V x_sum[kGates], h_sum[kGates];
      for (int gate = 0; gate < kGates; ++gate) {
        x_sum[gate] =
            load_first(from_x + (layer * p.tokens + n) * gate_row + gate * rank_pad + u, count) + bias_x[gate];
        h_sum[gate] = bias_h[gate];
        if (has_state) h_sum[gate] += load_first(from_h + n * gate_row + gate * rank_pad + u, count);
      }
      const int64_t row = layer * p.tokens + n, saved = row * p.rank + u;
      C* at = state + n * rank_pad + u;
      V now;
      if constexpr (CellT::kCell == Cell::rnn) {
        now = tanh<C>(x_sum[0] + h_sum[0]);
      } else if constexpr (CellT::kCell == Cell::gru) {
        GruStep<C> step(x_sum[0] + h_sum[0], x_sum[1] + h_sum[1], x_sum[2], h_sum[2], load(at));
        now = step.h;
        save_gates(row, u, count, step.r, step.z, step.n, step.hn);
      } else {
        C* c = cell + n * rank_pad + u;
        LstmStep<C> step(x_sum[0] + h_sum[0], x_sum[1] + h_sum[1], x_sum[2] + h_sum[2], x_sum[3] + h_sum[3], load(c));
        now = step.h;
        store(c, step.c);
        if (out.c) store_first(static_cast<T*>(out.c) + saved, step.c, count);
        save_gates(row, u, count, step.i, step.f, step.g, step.o);
      }
      store(at, now);
      store_first(h[before ^ 1] + n * h_stride + u, now, count);
      C* total = sum + n * rank_pad + u;
      store(total, p.reduce == Reduce::mean ? load(total) + now : now);
      if (out.h) store_first(static_cast<T*>(out.h) + saved, now, count);
    }
  }

  void save_gates(int64_t row, int64_t u, int64_t count, V a, V b, V c, V d) {
    if (!out.gates) return;
    T* gates = static_cast<T*>(out.gates) + row * CellT::kSaved * p.rank + u;
    store_first(gates, a, count);
    store_first(gates + p.rank, b, count);
    store_first(gates + 2 * p.rank, c, count);
    store_first(gates + 3 * p.rank, d, count);
  }

  void finish() {
    const C scale = p.reduce == Reduce::mean ? C(1) / C(p.layers) : C(1);
    for (int64_t n = 0; n < p.tokens; ++n)
      for (int64_t u = 0; u < p.rank; u += kUnits) {
        const int64_t at = n * p.rank + u, from = n * rank_pad + u;
        store_first(static_cast<T*>(out.out) + at, load(sum + from) * scale, p.rank - u);
        if (out.c_last) store_first(static_cast<T*>(out.c_last) + at, load(cell + from), p.rank - u);
      }
  }
};

template <class T, class CellT>
bool run_read_small(const ReadProblem& p, const ReadForward& out, const Parallel& parallel) {
  ReadSmall<T, CellT> small(p, out);
  Arena counter(nullptr);
  small.place(counter);
  Scratch scratch(counter.used + 64);
  if (!scratch.block) return false;
  Arena arena(scratch.block);
  small.place(arena);
  small.start();
  for_each_task(parallel, p.layers, [&](int64_t layer) { small.normalize(layer); });
  for_each_task(parallel, small.x_tasks(), [&](int64_t task) { small.input_product(task); });
  // A step that is over before the threads have met is not worth sharing out.
  Parallel alone = parallel;
  alone.threads = 1;
  const bool share = p.tokens * CellT::kGates * p.rank * p.rank >= 1 << 17;
  for (int64_t layer = 0; layer < p.layers; ++layer)
    for_each_task(share ? parallel : alone, small.h_tasks(), [&](int64_t task) { small.step(layer, task); });
  small.finish();
  return true;
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
