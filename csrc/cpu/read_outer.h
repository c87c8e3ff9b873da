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
  static constexpr int kGroup = 6;   // column panels that are packed together and stay in the second-level cache
  static constexpr int kTile = kRows * kColumns;

  const ReadProblem& p;
  const ReadBackward& out;
  const Shape& s;
  const D* da;
  C* sums;         // [width panels + rank panels][row panels][kRows][kColumns]
  C* bias_total;   // [segments x rank_pad]
  int64_t row_panels, x_panels, h_panels;

  static int64_t count_row_panels(const Shape& s) { return ceil_div(Seg::kEach * s.rank_pad, kRows); }
  bool wants_x() const { return out.dw_ih || out.dnorm_weight; }

  // Scratch of one thread.
  struct Workspace {
    Element *right, *left;
    C *mean, *rstd;
    void place(Arena& arena) {
      right = arena.take<Element>(kGroup * kColumns * (kUnit / Op::kPack));
      left = arena.take<Element>(kRows * (kUnit / Op::kPack));
    }
  };

  // Adds the tokens [first, first + count), at most a unit, of all layers to the column panels [begin, end).
  void accumulate(const Workspace& w, int64_t chunk_first, int64_t chunk, int64_t first, int64_t count, int64_t begin,
                  int64_t end) const {
    for (int64_t layer = 0; layer < s.layers; ++layer)
      for (int64_t panel = begin; panel < end;) {
        const bool from_x = panel < x_panels;
        const int64_t stop = smaller(panel + kGroup, from_x ? smaller(end, x_panels) : end);
        const D* rows = da + (layer * chunk + first - chunk_first) * s.da_stride;
        if (from_x ? wants_x() : out.dw_hh && (layer > 0 || p.h0)) {
          for (int64_t i = panel; i < stop; ++i)
            pack_right(w.right + (i - panel) * kColumns * (kUnit / Op::kPack), layer, first, count, i);
          multiply(w, rows + (from_x ? 0 : Seg::kFirstH * s.rank_pad), count, panel, stop);
        }
        panel = stop;
      }
  }

  void pack_right(Element* right, int64_t layer, int64_t first, int64_t count, int64_t panel) const {
    const bool from_x = panel < x_panels;
    const int64_t columns = from_x ? s.width : s.rank, column = (from_x ? panel : panel - x_panels) * kColumns;
    const ReadRows& phi = p.phi[layer];
    const C* stats = static_cast<const C*>(out.stats) + layer * s.tokens + first;
    const bool normed = from_x && p.norm != Norm::none;
    const C* mean = normed && p.norm == Norm::layer ? stats + s.layers * s.tokens : nullptr;
    const T* states = layer > 0 ? static_cast<const T*>(out.h) + (layer - 1) * s.tokens * s.rank
                                : static_cast<const T*>(p.h0);
    for (int v = 0; v < Shape::kVectors; ++v) {
      const int64_t at = column + v * kUnits;
      if (at >= columns) break;  // these lanes' sums are never read
      if (from_x)
        pack_columns_kn<T, T>(
            right + v * kUnits, kColumns,
            [&](int64_t k) { return static_cast<const T*>(phi.data) + row_offset(phi, first + k) + at * phi.inner; },
            phi.inner, columns - at, count, mean, normed ? stats : nullptr);
      else
        pack_columns_kn<T, T>(
            right + v * kUnits, kColumns, [&](int64_t k) { return states + (first + k) * s.rank + at; }, 1,
            columns - at, count, nullptr, nullptr);
    }
  }

  void multiply(const Workspace& w, const D* rows, int64_t count, int64_t begin, int64_t end) const {
    for (int64_t row = 0; row < row_panels; ++row) {
      const int64_t left_columns = smaller(kRows, Seg::kEach * s.rank_pad - row * kRows);
      pack_left_kn<D, kRows>(w.left, rows + row * kRows, s.da_stride, left_columns, count);
      for (int64_t panel = begin; panel < end; ++panel) {
        C* tile_sums = sums + (panel * row_panels + row) * kTile;
        Tile<Op, kRows, Shape::kVectors> tile;
        __builtin_memcpy(tile.acc, tile_sums, sizeof tile.acc);
        // The next tile of sums comes from the third-level cache while this one is computed.
        const char* next = reinterpret_cast<const char*>(panel + 1 < end ? tile_sums + row_panels * kTile : tile_sums + kTile);
        for (int64_t byte = 0; byte < int64_t(sizeof tile.acc); byte += 64) __builtin_prefetch(next + byte);
        tile.multiply(LeftPanel<Element, kRows>{w.left}, w.right + (panel - begin) * kColumns * (kUnit / Op::kPack),
                      steps<Op>(count));
        __builtin_memcpy(tile_sums, tile.acc, sizeof tile.acc);
      }
    }
  }

  // Row `m` of the sums in column panel `panel`.
  const C* sums_row(int64_t panel, int64_t m) const {
    return sums + (panel * row_panels + m / kRows) * kTile + m % kRows * kColumns;
  }

  void finish(int64_t panel) const {
    if (panel < x_panels)
      finish_x(panel);
    else if (out.dw_hh)
      finish_h(panel - x_panels);
  }

  void finish_x(int64_t panel) const {
    const T* w_ih = static_cast<const T*>(p.w_ih);
    const T* gamma = static_cast<const T*>(p.norm_weight);
    const T* beta = static_cast<const T*>(p.norm_bias);
    for (int v = 0; v < Shape::kVectors; ++v) {
      const int64_t column = panel * kColumns + v * kUnits, left = s.width - column;
      if (left <= 0) return;
      const V scale = gamma ? load_first(gamma + column, left) : splat<V>(C(1));
      const V shift = beta ? load_first(beta + column, left) : V{};
      V dgamma = {}, dbeta = {};
      for (int segment = 0; segment < Seg::kEach; ++segment)
        for (int64_t unit = 0; unit < s.rank; ++unit) {
          const int64_t m = segment * s.rank_pad + unit, row = Seg::gate_x(segment) * s.rank + unit;
          const V sum = load(sums_row(panel, m) + v * kUnits);
          const V weight = load_first(w_ih + row * s.width + column, left);
          if (out.dw_ih)
            store_first(static_cast<T*>(out.dw_ih) + row * s.width + column, sum * scale + shift * bias_total[m], left);
          dgamma += weight * sum;
          dbeta += weight * bias_total[m];
        }
      if (out.dnorm_weight) store_first(static_cast<T*>(out.dnorm_weight) + column, dgamma, left);
      if (out.dnorm_bias) store_first(static_cast<T*>(out.dnorm_bias) + column, dbeta, left);
    }
  }

  void finish_h(int64_t panel) const {
    for (int v = 0; v < Shape::kVectors; ++v) {
      const int64_t column = panel * kColumns + v * kUnits, left = s.rank - column;
      if (left <= 0) return;
      for (int segment = 0; segment < Seg::kEach; ++segment)
        for (int64_t unit = 0; unit < s.rank; ++unit) {
          const int64_t row = Seg::gate_h(segment) * s.rank + unit;
          store_first(static_cast<T*>(out.dw_hh) + row * s.rank + column,
                      load(sums_row(x_panels + panel, segment * s.rank_pad + unit) + v * kUnits), left);
        }
    }
  }

  void finish_bias() const {
    for (int segment = 0; segment < Seg::kEach; ++segment)
      for (int64_t unit = 0; unit < s.rank; ++unit) {
        const C* total = bias_total + segment * s.rank_pad + unit;
        if (out.db_ih) static_cast<T*>(out.db_ih)[Seg::gate_x(segment) * s.rank + unit] = narrow<T>(total[0]);
        if (out.db_hh)
          static_cast<T*>(out.db_hh)[Seg::gate_h(segment) * s.rank + unit] = narrow<T>(total[Seg::kFirstH * s.rank_pad]);
      }
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
