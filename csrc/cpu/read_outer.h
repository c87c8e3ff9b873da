// READ's backward, second phase: the weights' gradients, sums over all tokens and layers of outer products,
//   S = sum (da_x rstd)^T (phi - mean)     and     dR = sum da_h^T h_{i-1},
// and what follows from S by the folded norm: dW = S gamma + db beta^T, dgamma = colsum(W S), dbeta = W^T db.
//
// The sums run in one fixed order, whatever the number of threads: the columns are shared out, never the tokens.
#pragma once

#include "read_reverse.h"

namespace pyeff {
namespace PYEFF_ISA {

// Tokens whose outer products are accumulated in registers before the sums in memory are touched.
template <class Op>
constexpr int64_t kReadUnit = 256 * Op::kPack;

template <class T, class CellT>
struct ReadOuter {
  using Shape = ReverseShape<T, CellT>;
  using Op = typename Shape::Op;
  using Element = typename Op::Element;
  using C = typename Shape::C;
  using D = typename Shape::D;
  using V = Vec<C>;
  using Seg = Segments<CellT>;
  static constexpr int kUnits = Shape::kUnits, kRows = Shape::kRows, kColumns = Shape::kColumns;
  static constexpr int64_t kUnit = kReadUnit<Op>;
  static constexpr int kGroup = 6;  // column panels that are packed together and stay in the second-level cache
  static constexpr int kTile = kRows * kColumns;
  static constexpr int64_t kPanel = kColumns * (kUnit / Op::kPack);

  const ReadProblem& p;
  const ReadBackward& out;
  const Shape& s;
  const D* da;
  C* sums;        // [width panels + rank panels][row panels][kRows][kColumns]
  C* bias_total;  // [segments x rank_pad]
  int64_t row_panels, x_panels, h_panels;

  static int64_t count_row_panels(const Shape& s) { return ceil_div(Seg::kEach * s.rank_pad, kRows); }
  bool wants_x() const { return out.dw_ih || out.dnorm_weight; }

  // Scratch of one thread.
  struct Workspace {
    Element *right, *left;
    const D** left_rows;      // [kUnit], as are the others: what belongs to each step of K
    const void** right_rows;  // of phi or the states
    C *mean, *rstd;

    void place(Arena& arena) {
      right = arena.take<Element>(kGroup * kPanel);
      left = arena.take<Element>(kRows * (kUnit / Op::kPack));
      left_rows = arena.take<const D*>(kUnit);
      right_rows = arena.take<const void*>(kUnit);
      mean = arena.take<C>(kUnit);
      rstd = arena.take<C>(kUnit);
    }
  };

  // Adds the tokens [first, first + count), at most a unit, of all layers to the column panels [begin, end). Where the
  // tokens are few, one run along K takes several layers, so that the sums are not read and written for each.
  void accumulate(const Workspace& w, int64_t chunk_first, int64_t chunk, int64_t first, int64_t count, int64_t begin,
                  int64_t end) const {
    for (int pass = 0; pass < 2; ++pass) {
      const bool from_x = pass == 0;
      const int64_t together = from_x && !equal_inner_strides() ? 1 : larger(1, kUnit / count);
      const int64_t from = from_x ? begin : larger(begin, x_panels), to = from_x ? smaller(end, x_panels) : end;
      if (from >= to || (from_x && !wants_x())) continue;
      const int64_t start = from_x ? 0 : first_state_layer();
      for (int64_t layer = start; layer < s.layers; layer += together) {
        const int64_t stop = smaller(layer + together, s.layers);
        gather(w, from_x, layer, stop, chunk_first, chunk, first, count);
        const bool fresh = first == 0 && layer == start;
        for (int64_t panel = from; panel < to; panel += kGroup)
          run(w, from_x, p.phi[layer].inner, (stop - layer) * count, panel, smaller(panel + kGroup, to), fresh);
      }
    }
  }

  bool equal_inner_strides() const {
    for (int64_t layer = 1; layer < s.layers; ++layer)
      if (p.phi[layer].inner != p.phi[0].inner) return false;
    return true;
  }

  // The first layer whose previous state is not zero.
  int64_t first_state_layer() const { return p.h0 ? 0 : 1; }

  void gather(const Workspace& w, bool from_x, int64_t begin, int64_t end, int64_t chunk_first, int64_t chunk,
              int64_t first, int64_t count) const {
    int64_t k = 0;
    for (int64_t layer = begin; layer < end; ++layer) {
      const D* left =
          da + (layer * chunk + first - chunk_first) * s.da_stride + (from_x ? 0 : Seg::kFirstH * s.rank_pad);
      const ReadRows& phi = p.phi[layer];
      const int64_t phi_bytes = p.phi_number == p.number ? int64_t(sizeof(T)) : int64_t(sizeof(float));
      const T* states =
          layer > 0 ? static_cast<const T*>(out.h) + (layer - 1) * s.tokens * s.rank : static_cast<const T*>(p.h0);
      const C* stats = static_cast<const C*>(out.stats);
      for (int64_t n = 0; n < count; ++n, ++k) {
        w.left_rows[k] = left + n * s.da_stride;
        if (from_x)
          w.right_rows[k] = static_cast<const char*>(phi.data) + row_offset(phi, first + n) * phi_bytes;
        else
          w.right_rows[k] = states + (first + n) * s.rank;
        if (p.norm == Norm::none) continue;
        w.rstd[k] = stats[layer * s.tokens + first + n];
        if (p.norm == Norm::layer) w.mean[k] = stats[(s.layers + layer) * s.tokens + first + n];
      }
    }
  }

  // One run of k steps over the panels [begin, end), at most kGroup.
  void run(const Workspace& w, bool from_x, int64_t phi_inner, int64_t k, int64_t begin, int64_t end,
           bool fresh) const {
    for (int64_t panel = begin; panel < end; ++panel) {
      Element* right = w.right + (panel - begin) * kPanel;
      if (from_x)
        with_phi<T>(p, [&](auto type) { pack_right<decltype(type)>(w, true, phi_inner, k, panel, right); });
      else
        pack_right<T>(w, false, 1, k, panel, right);
    }
    for (int64_t row = 0; row < row_panels; ++row) {
      const int64_t left_columns = smaller(kRows, Seg::kEach * s.rank_pad - row * kRows);
      pack_left_kn<T, kRows>(w.left, [&](int64_t i) { return w.left_rows[i] + row * kRows; }, left_columns, k);
      for (int64_t panel = begin; panel < end; ++panel) {
        C* tile_sums = sums + (panel * row_panels + row) * kTile;
        // The sums come from the third-level cache while the tile is computed. They are added to at the end: a run of
        // its own for each unit of K keeps the rounding error at that of pairs of shorter sums.
        if (!fresh)
          for (int64_t i = 0; i < kTile; i += 64 / int64_t(sizeof(C))) __builtin_prefetch(tile_sums + i);
        Tile<Op, kRows, Shape::kVectors> tile;
        tile.zero();
        tile.multiply(LeftPanel<Element, kRows>{w.left}, w.right + (panel - begin) * kPanel, steps<Op>(k));
        for (int i = 0; i < kRows; ++i)
          for (int v = 0; v < Shape::kVectors; ++v) {
            C* at = tile_sums + i * kColumns + v * kUnits;
            store(at, fresh ? tile.acc[i][v] : load(at) + tile.acc[i][v]);
          }
      }
    }
  }

  template <class P>
  void pack_right(const Workspace& w, bool from_x, int64_t inner, int64_t k, int64_t panel, Element* right) const {
    const int64_t columns = from_x ? s.width : s.rank, column = (from_x ? panel : panel - x_panels) * kColumns;
    const C* mean = from_x && p.norm == Norm::layer ? w.mean : nullptr;
    const C* rstd = from_x && p.norm != Norm::none ? w.rstd : nullptr;
    for (int v = 0; v < Shape::kVectors; ++v) {
      const int64_t at = column + v * kUnits;
      if (at >= columns) break;  // these lanes' sums are never read
      pack_columns_kn<T, P>(
          right + v * kUnits, kColumns, [&](int64_t i) { return static_cast<const P*>(w.right_rows[i]) + at * inner; },
          inner, columns - at, k, mean, rstd);
    }
  }

  // Row `m` of the sums in column panel `panel`.
  const C* sums_row(int64_t panel, int64_t m) const {
    return sums + (panel * row_panels + m / kRows) * kTile + m % kRows * kColumns;
  }

  void finish(int64_t panel) const {
    if (panel < x_panels)
      finish_x(panel);
    else
      finish_h(panel - x_panels);
  }

  void finish_x(int64_t panel) const {
    constexpr int vectors = Shape::kVectors;
    const T* w_ih = static_cast<const T*>(p.w_ih);
    const T* gamma = static_cast<const T*>(p.norm_weight);
    const T* beta = static_cast<const T*>(p.norm_bias);
    const int64_t column = panel * kColumns, left = s.width - column;
    V dgamma[vectors] = {}, dbeta[vectors] = {};
    for (int segment = 0; segment < Seg::kEach; ++segment)
      for (int64_t unit = 0; unit < s.rank; ++unit) {
        const int64_t m = segment * s.rank_pad + unit, at = (Seg::gate_x(segment) * s.rank + unit) * s.width + column;
        const C db = bias_total[m];
        for (int v = 0; v < vectors; ++v) {
          const int64_t i = v * kUnits;
          if (i >= left) break;
          const V sum = wants_x() ? load(sums_row(panel, m) + i) : V{};
          const V weight = load_first(w_ih + at + i, left - i);
          dgamma[v] += weight * sum;
          dbeta[v] += weight * db;
          if (!out.dw_ih) continue;
          V dw = gamma ? sum * load_first(gamma + column + i, left - i) : sum;
          if (beta) dw += load_first(beta + column + i, left - i) * db;
          store_first(static_cast<T*>(out.dw_ih) + at + i, dw, left - i);
        }
      }
    for (int v = 0; v < vectors && v * kUnits < left; ++v) {
      const int64_t i = column + v * kUnits;
      if (out.dnorm_weight) store_first(static_cast<T*>(out.dnorm_weight) + i, dgamma[v], s.width - i);
      if (out.dnorm_bias) store_first(static_cast<T*>(out.dnorm_bias) + i, dbeta[v], s.width - i);
    }
  }

  void finish_h(int64_t panel) const {
    const bool any = first_state_layer() < s.layers;
    for (int v = 0; v < Shape::kVectors; ++v) {
      const int64_t column = panel * kColumns + v * kUnits, left = s.rank - column;
      if (left <= 0) return;
      for (int segment = 0; segment < Seg::kEach; ++segment)
        for (int64_t unit = 0; unit < s.rank; ++unit) {
          const int64_t row = Seg::gate_h(segment) * s.rank + unit;
          const C* sum = sums_row(x_panels + panel, segment * s.rank_pad + unit) + v * kUnits;
          store_first(static_cast<T*>(out.dw_hh) + row * s.rank + column, any ? load(sum) : V{}, left);
        }
    }
  }

  void finish_bias() const {
    for (int segment = 0; segment < Seg::kEach; ++segment)
      for (int64_t unit = 0; unit < s.rank; ++unit) {
        const C* total = bias_total + segment * s.rank_pad + unit;
        if (out.db_ih) static_cast<T*>(out.db_ih)[Seg::gate_x(segment) * s.rank + unit] = narrow<T>(total[0]);
        if (out.db_hh)
          static_cast<T*>(out.db_hh)[Seg::gate_h(segment) * s.rank + unit] =
              narrow<T>(total[Seg::kFirstH * s.rank_pad]);
      }
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
