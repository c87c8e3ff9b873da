// READ's forward. Each thread takes a range of tokens and carries a block of them through all layers: both products and
// the gates of some tokens and units (GRU on AVX-512: 8 x 16) happen in one register tile, and the state never leaves
// the cache.
#pragma once

#include "read_pack.h"

namespace pyeff {
namespace PYEFF_ISA {

// Tokens of a block: its rows of phi and its states share the second-level cache with a panel of the weights. A
// multiple of every tile's rows.
constexpr int64_t kReadBlock = 96;

// Row `row` of what is saved for the backward; null where nothing is.
template <class T>
PYEFF_INLINE T* row_of(void* base, int64_t row, int64_t stride) {
  return base ? static_cast<T*>(base) + row * stride : nullptr;
}

template <class T, class CellT>
struct ReadBlock {
  using Shape = ReadShape<T, CellT>;
  using Op = typename Shape::Op;
  using Element = typename Op::Element;
  using C = typename Shape::C;
  using V = Vec<C>;
  static constexpr int kUnits = Shape::kUnits;

  // Scratch of one thread.
  struct Workspace {
    Element* packed;    // [kReadBlock][steps_x + pad]
    const Element** x;  // [kReadBlock]
    const Element** h_rows[2];
    C *mean, *rstd;
    C* state[2];          // [kReadBlock][units], the previous step and this one
    Element* operand[2];  // the same as left operands; alias `state` where the types agree
    C *cell, *sum;        // [kReadBlock][units]

    int64_t packed_stride, operand_stride;

    void place(Arena& arena, const ReadProblem& p, const Shape& s) {
      packed_stride = s.steps_x + 64 / int64_t(sizeof(Element));  // rows a power of two apart would share cache sets
      packed = arena.take<Element>(needs_packing(p) ? kReadBlock * packed_stride : 0);
      x = arena.take<const Element*>(kReadBlock);
      mean = arena.take<C>(kReadBlock);
      rstd = arena.take<C>(kReadBlock);
      operand_stride = Op::kPack == 1 ? s.units : s.units / 2;
      for (int i = 0; i < 2; ++i) {
        h_rows[i] = arena.take<const Element*>(kReadBlock);
        state[i] = arena.take<C>(kReadBlock * s.units);
        if constexpr (Op::kPack == 1)
          operand[i] = reinterpret_cast<Element*>(state[i]);
        else
          operand[i] = arena.take<Element>(kReadBlock * operand_stride);
      }
      cell = arena.take<C>(CellT::kCell == Cell::lstm ? kReadBlock * s.units : 0);
      sum = arena.take<C>(p.reduce == Reduce::mean ? kReadBlock * s.units : 0);
    }

    static bool needs_packing(const ReadProblem& p) {
      for (int64_t i = 0; i < p.layers; ++i)
        if (!ReadInput<T>::in_place(p, p.phi[i])) return true;
      return false;
    }
  };

  const ReadProblem& p;
  const ReadForward& out;
  const Shape& s;
  const ReadWeights<T, CellT>& weights;
  Workspace& w;

  void run(int64_t first, int64_t count) {
    bool has_state = p.h0 != nullptr;
    start(first, count);
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      const int now = int(layer & 1) ^ 1, before = now ^ 1;
      ReadInput<T>::prepare(p, layer, first, count, weights.zeros, w.packed_stride, w.packed, w.x, w.mean, w.rstd);
      save_statistics(layer, first, count);
      for (int64_t panel = 0; panel < s.panels; ++panel) {
        constexpr int rows = kTileRows<CellT::kVectors>;
        for (int64_t n = 0; n < count; n += rows)
          step_tile<rows>(layer, panel, first, n, smaller(rows, count - n), has_state, before, now);
      }
      has_state = true;
    }
    finish(first, count);
  }

  // The state before the first layer. Without h0 it is zero, and its product is skipped.
  void start(int64_t first, int64_t count) {
    const T* h0 = static_cast<const T*>(p.h0);
    const T* c0 = static_cast<const T*>(p.c0);
    for (int64_t n = 0; n < count; ++n) {
      for (int i = 0; i < 2; ++i) w.h_rows[i][n] = w.operand[i] + n * w.operand_stride;
      for (int64_t u = 0; u < s.units; u += kUnits) {
        const int64_t at = (first + n) * s.rank + u;
        const V h = h0 ? load_first(h0 + at, s.rank - u) : V{};
        set_state(0, n, u, h);
        if (w.cell) store(w.cell + n * s.units + u, c0 ? load_first(c0 + at, s.rank - u) : V{});
        if (w.sum) store(w.sum + n * s.units + u, V{});
      }
    }
  }

  PYEFF_INLINE void set_state(int which, int64_t n, int64_t u, V h) {
    store(w.state[which] + n * s.units + u, h);
    if constexpr (Op::kPack == 2) {
      bf16* row = reinterpret_cast<bf16*>(w.operand[which] + n * w.operand_stride);
      store(row + u, h);
      // The last pair of an odd rank reaches one lane past the units, which may hold NaN (0 times infinity).
      if (s.rank % 2 && u < s.rank && s.rank < u + kUnits) row[s.rank] = bf16{};
    }
  }

  void save_statistics(int64_t layer, int64_t first, int64_t count) {
    if (!out.stats || p.norm == Norm::none) return;
    C* rstd = static_cast<C*>(out.stats) + layer * s.tokens + first;
    for (int64_t n = 0; n < count; ++n) {
      rstd[n] = w.rstd[n];
      if (p.norm == Norm::layer) rstd[s.layers * s.tokens + n] = w.mean[n];
    }
  }

  template <int MR>
  PYEFF_INLINE void step_tile(int64_t layer, int64_t panel, int64_t first, int64_t n, int64_t count, bool has_state,
                              int before, int now) {
    // Rows past the end repeat the last one, and are not stored.
    LeftRows<Element, MR> x, h;
    for (int i = 0; i < MR; ++i) {
      const int64_t row = n + smaller(i, count - 1);
      x.row[i] = w.x[row];
      h.row[i] = w.h_rows[before][row];
    }
    GateSums<T, CellT, MR> sums;
    for (int i = 0; i < MR; ++i) sums.rstd[i] = w.rstd[n + smaller(i, count - 1)];
    sums.compute(s, weights, panel, x, h, has_state);
    for (int i = 0; i < MR; ++i) {
      if (i == count) break;
      if constexpr (CellT::kCell == Cell::rnn) {
        for (int v = 0; v < CellT::kVectors; ++v)
          emit(layer, first, n + i, s.unit(panel, v), now, tanh<C>(sums.tile.acc[i][v]));
      } else if constexpr (CellT::kCell == Cell::gru) {
        const int64_t u = panel * kUnits;
        auto step = sums.gru(i, load(w.state[before] + (n + i) * s.units + u));
        emit(layer, first, n + i, u, now, step.h);
        save_gates(layer, first + n + i, u, step.r, step.z, step.n, step.hn);
      } else {
        const int64_t u = panel * kUnits;
        C* cell = w.cell + (n + i) * s.units + u;
        auto step = sums.lstm(i, load(cell));
        store(cell, step.c);
        emit(layer, first, n + i, u, now, step.h);
        if (T* c = row_of<T>(out.c, layer * s.tokens + first + n + i, s.rank)) store_first(c + u, step.c, s.rank - u);
        save_gates(layer, first + n + i, u, step.i, step.f, step.g, step.o);
      }
    }
  }

  PYEFF_INLINE void emit(int64_t layer, int64_t first, int64_t n, int64_t u, int now, V h) {
    set_state(now, n, u, h);
    if (w.sum) {
      C* sum = w.sum + n * s.units + u;
      store(sum, load(sum) + h);
    }
    if (T* saved = row_of<T>(out.h, layer * s.tokens + first + n, s.rank); saved) store_first(saved + u, h, s.rank - u);
  }

  PYEFF_INLINE void save_gates(int64_t layer, int64_t token, int64_t u, V a, V b, V c, V d) {
    T* gates = row_of<T>(out.gates, layer * s.tokens + token, CellT::kSaved * s.rank);
    if (!gates) return;
    gates += u;
    store_first(gates, a, s.rank - u);
    store_first(gates + s.rank, b, s.rank - u);
    store_first(gates + 2 * s.rank, c, s.rank - u);
    store_first(gates + 3 * s.rank, d, s.rank - u);
  }

  void finish(int64_t first, int64_t count) {
    const C* result = w.sum ? w.sum : w.state[s.layers & 1];
    const C scale = w.sum ? C(1) / C(s.layers) : C(1);
    for (int64_t n = 0; n < count; ++n)
      for (int64_t u = 0; u < s.rank; u += kUnits) {
        const int64_t at = (first + n) * s.rank + u, from = n * s.units + u;
        store_first(static_cast<T*>(out.out) + at, load(result + from) * scale, s.rank - u);
        if (out.c_last) store_first(static_cast<T*>(out.c_last) + at, load(w.cell + from), s.rank - u);
      }
  }
};

// Tokens [begin, end) of thread `i`: contiguous, and in whole groups of 8, over which the backward sums its biases.
PYEFF_INLINE void token_range(int64_t tokens, int64_t i, int64_t parts, int64_t& begin, int64_t& end) {
  const int64_t groups = ceil_div(tokens, 8);
  begin = smaller(tokens, groups * i / parts * 8);
  end = smaller(tokens, groups * (i + 1) / parts * 8);
}

template <class T, class CellT>
bool run_read_forward(const ReadProblem& p, const ReadForward& out, const Parallel& parallel) {
  using Shape = ReadShape<T, CellT>;
  using Block = ReadBlock<T, CellT>;
  const Shape s(p);
  const int64_t parts = smaller(larger(parallel.threads, 1), ceil_div(s.tokens, 8));
  ReadWeights<T, CellT> weights;
  typename Block::Workspace sizing;
  Arena count(nullptr);
  weights.place(count, s);
  const int64_t shared = count.used;
  Arena one(nullptr);
  sizing.place(one, p, s);
  const int64_t each = (one.used + 4095) / 4096 * 4096 + 64;
  Scratch scratch(shared + 64 + parts * each);
  if (!scratch.block) return false;
  Arena arena(scratch.block);
  weights.place(arena, s);
  for_each_task(parallel, s.panels, [&](int64_t panel) { weights.pack(p, s, panel); });
  if (out.gates) expect_writes(out.gates, s.layers * s.tokens * CellT::kSaved * s.rank * int64_t(sizeof(T)));
  if (out.h) expect_writes(out.h, s.layers * s.tokens * s.rank * int64_t(sizeof(T)));
  for_each_task(parallel, parts, [&](int64_t i) {
    Arena own(static_cast<char*>(scratch.block) + shared + 64 + i * each);
    typename Block::Workspace w;
    w.place(own, p, s);
    int64_t begin, end;
    token_range(s.tokens, i, parts, begin, end);
    Block block{p, out, s, weights, w};
    for (int64_t first = begin; first < end; first += kReadBlock) block.run(first, smaller(kReadBlock, end - first));
  });
  return true;
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
