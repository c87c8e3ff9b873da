// READ's weights in the order in which its tiles read them, and its input rows with their statistics.
#pragma once

#include "gemm.h"
#include "read_cells.h"

namespace pyeff {
namespace PYEFF_ISA {

// Calls run(P{}) with the type that phi is stored in.
template <class T, class Function>
PYEFF_INLINE void with_phi(const ReadProblem& p, const Function& run) {
  if constexpr (sizeof(T) == sizeof(bf16)) {
    if (p.phi_number == Number::f32) return run(float{});
  }
  run(T{});
}

// Where row `row` of a layer output starts.
PYEFF_INLINE int64_t row_offset(const ReadRows& rows, int64_t row) {
  if (rows.dims == 1) return row * rows.stride[0];
  int64_t sum = 0;
  for (int i = rows.dims - 1; i >= 0; --i) {
    sum += row % rows.size[i] * rows.stride[i];
    row /= rows.size[i];
  }
  return sum;
}

// Sizes that follow from the problem, in one place.
template <class T, class CellT>
struct ReadShape {
  using Op = Operand<T>;
  using C = Compute<T>;
  static constexpr int kUnits = kLanes<C>;
  static constexpr int kWidth = CellT::kVectors * kUnits;  // columns of a panel
  int64_t layers, tokens, width, rank, panels, units, steps_x, steps_h;

  explicit ReadShape(const ReadProblem& p)
      : layers(p.layers),
        tokens(p.tokens),
        width(p.width),
        rank(p.rank),
        panels(ceil_div(p.rank, int64_t(CellT::kUnitVectors) * kUnits)),
        units(panels * CellT::kUnitVectors * kUnits),
        steps_x(steps<Op>(p.width)),
        steps_h(steps<Op>(p.rank)) {}

  // First unit of a panel's vector, and the gate that it belongs to.
  int64_t unit(int64_t panel, int v) const {
    return CellT::kUnitVectors == 1 ? panel * kUnits : (panel * CellT::kUnitVectors + v) * kUnits;
  }
  static int gate(int v) { return CellT::kUnitVectors == 1 ? v : 0; }
};

template <class T, class CellT>
struct ReadWeights {
  using Shape = ReadShape<T, CellT>;
  using Op = typename Shape::Op;
  using C = typename Shape::C;
  using Element = typename Op::Element;
  Element *x, *h;    // [panels][steps][kWidth]
  Element* zeros;    // [steps_x]
  C *bias, *bias_n;  // [panels][kWidth]; the GRU's b_hn apart, [units]

  void place(Arena& arena, const Shape& s) {
    x = arena.take<Element>(s.panels * s.steps_x * Shape::kWidth);
    h = arena.take<Element>(s.panels * s.steps_h * Shape::kWidth);
    zeros = arena.take<Element>(s.steps_x);
    bias = arena.take<C>(s.panels * Shape::kWidth);
    bias_n = arena.take<C>(s.units);
  }

  // Folds the norm into the input weights: W norm(phi) + b = rstd (W gamma)(phi - mean) + (W beta + b).
  void pack(const ReadProblem& p, const Shape& s, int64_t panel) {
    if (panel == 0) __builtin_memset(zeros, 0, size_t(s.steps_x) * sizeof(Element));
    const T* w_ih = static_cast<const T*>(p.w_ih);
    const T* w_hh = static_cast<const T*>(p.w_hh);
    const T* gamma = static_cast<const T*>(p.norm_weight);
    for (int v = 0; v < CellT::kVectors; ++v) {
      const int64_t unit = s.unit(panel, v), row = Shape::gate(v) * s.rank + unit;
      const int64_t count = larger(0, smaller(s.rank - unit, Shape::kUnits));
      const int64_t column = panel * Shape::kWidth + v * Shape::kUnits;
      const int64_t offset = int64_t(v) * Shape::kUnits;
      pack_columns_nk<T>(x + panel * s.steps_x * Shape::kWidth + offset, Shape::kWidth, w_ih + row * s.width, s.width,
                         count, s.width, gamma);
      pack_columns_nk<T>(h + panel * s.steps_h * Shape::kWidth + offset, Shape::kWidth, w_hh + row * s.rank, s.rank,
                         count, s.rank, static_cast<const T*>(nullptr));
      for (int64_t l = 0; l < Shape::kUnits; ++l) {
        const bool apart = CellT::kCell == Cell::gru && v == 2;
        C from_x = 0, from_h = 0;
        if (l < count) biases(p, row + l, from_x, from_h);
        bias[column + l] = apart ? from_x : from_x + from_h;
        if (apart) bias_n[unit + l] = from_h;
      }
    }
  }

  static void biases(const ReadProblem& p, int64_t row, C& from_x, C& from_h) {
    if (p.b_ih) from_x = widen(static_cast<const T*>(p.b_ih)[row]);
    if (p.b_hh) from_h = widen(static_cast<const T*>(p.b_hh)[row]);
    if (!p.norm_bias) return;
    const T* w = static_cast<const T*>(p.w_ih) + row * p.width;
    const T* beta = static_cast<const T*>(p.norm_bias);
    C sum = 0;
    for (int64_t k = 0; k < p.width; ++k) sum += widen(w[k]) * widen(beta[k]);
    from_x += sum;
  }
};

// Mean (layer norm only, else 0) and 1 / sqrt(mean square + eps) of one row.
template <class T>
PYEFF_INLINE void row_statistics(const T* row, int64_t stride, int64_t width, Norm norm, double eps, Compute<T>& mean,
                                 Compute<T>& rstd) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int lanes = kLanes<C>;
  mean = 0;
  rstd = 1;
  if (norm == Norm::none) return;
  if (norm == Norm::layer) {
    V sum = {};
    for (int64_t k = 0; k < width; k += lanes) sum += load_strided(row + k * stride, stride, width - k);
    mean = sum_lanes<C>(sum) / C(width);
  }
  V square = {};
  int64_t k = 0;
  for (; k + lanes <= width; k += lanes) {
    V x = load_strided(row + k * stride, stride, lanes) - mean;
    square += x * x;
  }
  C sum = sum_lanes<C>(square);
  for (; k < width; ++k) {
    C x = widen(row[k * stride]) - mean;
    sum += x * x;
  }
  rstd = C(1) / C(__builtin_sqrt(double(sum / C(width)) + eps));
}

template <class P>
bool is_finite(const P* row, int64_t stride, int64_t width) {
  for (int64_t k = 0; k < width; ++k) {
    const auto x = widen(row[k * stride]);
    if (x - x != 0) return false;
  }
  return true;
}

// The rows of a block of tokens of one layer as left operands: in place where memory already has the right form, packed
// (and centred, for the layer norm) otherwise. rstd is left to the caller: it multiplies the finished sums.
template <class T>
struct ReadInput {
  using Op = Operand<T>;
  using Element = typename Op::Element;
  using C = Compute<T>;

  static bool in_place(const ReadProblem& p, const ReadRows& rows) {
    return p.phi_number == p.number && sizeof(Element) == sizeof(T) * Op::kPack && rows.inner == 1 &&
           p.norm != Norm::layer && p.width % Op::kPack == 0;
  }

  // `zeros` is a row of them: finite numbers whose squares overflow are normalised to nothing, and must not overflow in
  // the product before rstd = 0 could say so.
  static void prepare(const ReadProblem& p, int64_t layer, int64_t first, int64_t count, const Element* zeros,
                      int64_t packed_stride, Element* packed, const Element** pointers, C* mean, C* rstd) {
    with_phi<T>(p, [&](auto type) {
      prepare_from<decltype(type)>(p, layer, first, count, zeros, packed_stride, packed, pointers, mean, rstd);
    });
  }

  template <class P>
  static void prepare_from(const ReadProblem& p, int64_t layer, int64_t first, int64_t count, const Element* zeros,
                           int64_t packed_stride, Element* packed, const Element** pointers, C* mean, C* rstd) {
    const ReadRows& rows = p.phi[layer];
    const P* data = static_cast<const P*>(rows.data);
    const bool direct = in_place(p, rows);
    for (int64_t n = 0; n < count; ++n) {
      const P* row = data + row_offset(rows, first + n);
      row_statistics(row, rows.inner, p.width, p.norm, p.eps, mean[n], rstd[n]);
      if (rstd[n] == C(0) && mean[n] - mean[n] == C(0) && is_finite(row, rows.inner, p.width)) {
        pointers[n] = zeros;
      } else if (direct) {
        pointers[n] = reinterpret_cast<const Element*>(row);
      } else {
        pack_row<T>(packed + n * packed_stride, row, rows.inner, p.width, mean[n], C(1));
        pointers[n] = packed + n * packed_stride;
      }
    }
  }
};

// The sums that enter the gates of MR tokens and one panel of units: both products in one register tile.
template <class T, class CellT, int MR>
struct GateSums {
  using Shape = ReadShape<T, CellT>;
  using Op = typename Shape::Op;
  using C = typename Shape::C;
  using V = Vec<C>;
  using Rows = LeftRows<typename Op::Element, MR>;

  Tile<Op, MR, CellT::kVectors> tile;
  V x_n[MR];  // the GRU's x part of the candidate
  C rstd[MR];

  PYEFF_INLINE void compute(const Shape& s, const ReadWeights<T, CellT>& weights, int64_t panel, const Rows& x,
                            const Rows& h, bool has_state) {
    tile.zero();
    tile.multiply(x, weights.x + panel * s.steps_x * Shape::kWidth, s.steps_x);
    const C* bias = weights.bias + panel * Shape::kWidth;
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < CellT::kVectors; ++v)
        tile.acc[i][v] = tile.acc[i][v] * rstd[i] + load(bias + v * Shape::kUnits);
    if constexpr (CellT::kCell == Cell::gru) {
      const V bias_n = load(weights.bias_n + panel * Shape::kUnits);
      for (int i = 0; i < MR; ++i) {
        x_n[i] = tile.acc[i][2];
        tile.acc[i][2] = bias_n;
      }
    }
    if (has_state) tile.multiply(h, weights.h + panel * s.steps_h * Shape::kWidth, s.steps_h);
  }

  PYEFF_INLINE GruStep<C> gru(int i, V previous) const {
    return GruStep<C>(tile.acc[i][0], tile.acc[i][1], x_n[i], tile.acc[i][2], previous);
  }
  PYEFF_INLINE LstmStep<C> lstm(int i, V previous) const {
    return LstmStep<C>(tile.acc[i][0], tile.acc[i][1], tile.acc[i][2], tile.acc[i][3], previous);
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
