// READ's backward, first phase: the recurrence in reverse for a block of tokens. It leaves the gradients of the gates'
// sums for the weight products (read_outer.h) and, where asked, the gradients of phi, h0 and c0.
#pragma once

#include <type_traits>

#include "read_forward.h"

namespace pyeff {
namespace PYEFF_ISA {

// The gradient of the gates' sums is stored as segments of one rank each. The GRU's candidate has two: what reaches it
// from x is da_n, what reaches it from h is r da_n. In the order (n, r, z, r n) either set is contiguous.
template <class CellT>
struct Segments {
  static constexpr bool kGru = CellT::kCell == Cell::gru;
  static constexpr int kCount = kGru ? 4 : CellT::kGates, kFirstH = kGru ? 1 : 0, kEach = CellT::kGates;
  static constexpr int gate_x(int segment) { return kGru ? (segment + 2) % 3 : segment; }
  static constexpr int gate_h(int segment) { return segment; }
};

// Types and sizes of the backward.
template <class T, class CellT>
struct ReverseShape : ReadShape<T, CellT> {
  using Base = ReadShape<T, CellT>;
  using Op = typename Base::Op;
  using C = typename Base::C;
  using Seg = Segments<CellT>;
  // Numbers as a left operand holds them.
  using D = std::conditional_t<Op::kPack == 2, T, C>;
  static constexpr int kVectors = 4, kRows = kTileRows<kVectors>, kColumns = kVectors * Base::kUnits;
  int64_t rank_pad, da_stride, rank_panels, width_panels;

  explicit ReverseShape(const ReadProblem& p)
      : Base(p),
        rank_pad(ceil_div(p.rank, Base::kUnits) * Base::kUnits),
        // The extra line keeps rows from sharing the same cache sets.
        da_stride(Seg::kCount * rank_pad + 64 / int64_t(sizeof(D))),
        rank_panels(ceil_div(p.rank, kColumns)),
        width_panels(ceil_div(p.width, kColumns)) {}
  int64_t steps_da() const { return Seg::kEach * rank_pad / Op::kPack; }
};

// w_hh and w_ih as right operands of da W: panels [rank or width][K = segments x rank_pad].
template <class T, class CellT>
struct ReverseWeights {
  using Shape = ReverseShape<T, CellT>;
  using Seg = Segments<CellT>;
  using Element = typename Shape::Op::Element;
  Element *h, *x;
  T* zeros;

  void place(Arena& arena, const Shape& s, bool with_x) {
    const int64_t panel = s.steps_da() * Shape::kColumns;
    h = arena.take<Element>(s.rank_panels * panel);
    x = arena.take<Element>(with_x ? s.width_panels * panel : 0);
    zeros = arena.take<T>(Shape::kColumns);
  }
  void pack(const ReadProblem& p, const Shape& s, int64_t panel) {
    if (panel < s.rank_panels)
      pack_one(h + panel * s.steps_da() * Shape::kColumns, s, static_cast<const T*>(p.w_hh), s.rank, panel,
               Seg::gate_h);
    else
      pack_one(x + (panel - s.rank_panels) * s.steps_da() * Shape::kColumns, s, static_cast<const T*>(p.w_ih), s.width,
               panel - s.rank_panels, Seg::gate_x);
  }
  void pack_one(Element* out, const Shape& s, const T* weight, int64_t columns, int64_t panel, int (*gate)(int)) {
    for (int v = 0; v < Shape::kVectors; ++v) {
      const int64_t column = panel * Shape::kColumns + v * Shape::kUnits, count = columns - column;
      auto row = [&](int64_t k) -> const T* {
        const int64_t unit = k % s.rank_pad;
        if (unit >= s.rank || count <= 0) return zeros;
        return weight + (gate(int(k / s.rank_pad)) * s.rank + unit) * columns + column;
      };
      pack_columns_kn<T, T>(out + v * Shape::kUnits, Shape::kColumns, row, 1, count > 0 ? count : Shape::kUnits,
                            Seg::kEach * s.rank_pad, nullptr, nullptr);
    }
  }
};

template <class T, class CellT>
struct ReverseBlock {
  using Shape = ReverseShape<T, CellT>;
  using Op = typename Shape::Op;
  using Element = typename Op::Element;
  using C = typename Shape::C;
  using D = typename Shape::D;
  using V = Vec<C>;
  using Seg = Segments<CellT>;
  static constexpr int kUnits = Shape::kUnits, kRows = Shape::kRows, kColumns = Shape::kColumns;

  // Scratch of one thread.
  struct Workspace {
    C *dh, *dc;       // [kReadBlock][rank_pad]
    C* dx;            // [kReadBlock][width_panels * kColumns]
    T* gates;         // [kReadBlock][saved gates * rank], when they are computed again
    Element* packed;  // [kReadBlock][packed_stride] and the states' rows behind it, likewise
    Element* packed_h;
    const Element **x, **h;
    C *mean, *rstd;
    int64_t packed_stride, packed_h_stride;

    void place(Arena& arena, const Shape& s, bool with_x, bool recompute) {
      dh = arena.take<C>(kReadBlock * s.rank_pad);
      dc = arena.take<C>(CellT::kCell == Cell::lstm ? kReadBlock * s.rank_pad : 0);
      dx = arena.take<C>(with_x ? kReadBlock * s.width_panels * kColumns : 0);
      gates = arena.take<T>(recompute ? kReadBlock * CellT::kSaved * s.rank : 0);
      packed_stride = s.steps_x + 64 / int64_t(sizeof(Element));
      packed_h_stride = s.steps_h + 64 / int64_t(sizeof(Element));
      packed = arena.take<Element>(recompute ? kReadBlock * packed_stride : 0);
      packed_h = arena.take<Element>(recompute ? kReadBlock * packed_h_stride : 0);
      x = arena.take<const Element*>(kReadBlock);
      h = arena.take<const Element*>(kReadBlock);
      mean = arena.take<C>(kReadBlock);
      rstd = arena.take<C>(kReadBlock);
    }
  };

  const ReadProblem& p;
  const ReadBackward& out;
  const Shape& s;
  const ReverseWeights<T, CellT>& weights;
  const ReadWeights<T, CellT>* forward;  // only to compute the gates again
  Workspace& w;
  D* da;    // [layers][chunk][da_stride], of the tokens from chunk_first on
  C* bias;  // [chunk / 8][segments x rank_pad], sums over layers and 8 tokens
  int64_t chunk_first, chunk;

  PYEFF_INLINE D* da_row(int64_t layer, int64_t token) const {
    return da + (layer * chunk + token - chunk_first) * s.da_stride;
  }

  void run(int64_t first, int64_t count) {
    start(first, count);
    for (int64_t layer = s.layers - 1; layer >= 0; --layer) {
      if (CellT::kSaved && !out.gates) recompute_gates(layer, first, count);
      for (int64_t n = 0; n < count; ++n) reverse_row(layer, first, n);
      if (layer > 0 || out.dh0) multiply(layer, first, count, Seg::kFirstH, weights.h, s.rank_panels, s.rank_pad, w.dh);
      if (out.dphi[layer]) {
        for (int64_t i = 0; i < count * s.width_panels * kColumns; i += kUnits) store(w.dx + i, V{});
        multiply(layer, first, count, 0, weights.x, s.width_panels, s.width_panels * kColumns, w.dx);
        with_phi<T>(p, [&](auto type) {
          for (int64_t n = 0; n < count; ++n)
            reverse_norm<decltype(type)>(layer, first + n, w.dx + n * s.width_panels * kColumns);
        });
      }
    }
    for (int64_t n = 0; n < count; ++n)
      for (int64_t u = 0; u < s.rank; u += kUnits) {
        const int64_t at = (first + n) * s.rank + u, from = n * s.rank_pad + u;
        if (out.dh0) store_first(static_cast<T*>(out.dh0) + at, load(w.dh + from), s.rank - u);
        if (out.dc0) store_first(static_cast<T*>(out.dc0) + at, load(w.dc + from), s.rank - u);
      }
  }

  void start(int64_t first, int64_t count) {
    const T* grad_c = static_cast<const T*>(out.grad_c);
    for (int64_t n = 0; n < count; ++n)
      for (int64_t u = 0; u < s.rank_pad; u += kUnits) {
        store(w.dh + n * s.rank_pad + u, V{});
        if (w.dc)
          store(w.dc + n * s.rank_pad + u, grad_c ? load_first(grad_c + (first + n) * s.rank + u, s.rank - u) : V{});
      }
    const int64_t row = Seg::kCount * s.rank_pad, groups = ceil_div(count, 8);
    C* sums = bias + (first - chunk_first) / 8 * row;
    for (int64_t i = 0; i < groups * row; i += kUnits) store(sums + i, V{});
  }

  // One token of one layer: from the gradient of h (and c) to those of the gates' sums and of the previous state.
  void reverse_row(int64_t layer, int64_t first, int64_t n) {
    const int64_t token = first + n, row = layer * s.tokens + token;
    const T* grad = static_cast<const T*>(out.grad_out);
    const bool mean = p.reduce == Reduce::mean;
    const C share = mean ? C(1) / C(s.layers) : C(1);
    if (!mean && layer + 1 < s.layers) grad = nullptr;
    const T* gates = out.gates ? static_cast<const T*>(out.gates) + row * CellT::kSaved * s.rank
                               : w.gates + n * CellT::kSaved * s.rank;
    const T* previous = previous_state(out.h, p.h0, layer, token);
    D* sums = da_row(layer, token);
    C* bias_row = bias + (token - chunk_first) / 8 * Seg::kCount * s.rank_pad;
    for (int64_t u = 0; u < s.rank_pad; u += kUnits) {
      const int64_t left = s.rank - u;
      C* carry = w.dh + n * s.rank_pad + u;
      V dh = load(carry);
      if (grad) dh += load_first(grad + token * s.rank + u, left) * share;
      auto gate = [&](int i) { return load_first(gates + i * s.rank + u, left); };
      auto emit = [&](int segment, V value) {
        store(sums + segment * s.rank_pad + u, value);
        C* at = bias_row + segment * s.rank_pad + u;
        store(at, load(at) + value);
      };
      if constexpr (CellT::kCell == Cell::rnn) {
        V h = load_first(static_cast<const T*>(out.h) + row * s.rank + u, left);
        emit(0, dh * (C(1) - h * h));
        store(carry, V{});
      } else if constexpr (CellT::kCell == Cell::gru) {
        V r = gate(0), z = gate(1), c = gate(2), hn = gate(3);
        V before = previous ? load_first(previous + u, left) : V{};
        V dn = dh * (C(1) - z) * (C(1) - c * c);
        emit(0, dn);
        emit(1, dn * hn * r * (C(1) - r));
        emit(2, dh * (before - c) * z * (C(1) - z));
        emit(3, dn * r);
        store(carry, dh * z);
      } else {
        V i = gate(0), f = gate(1), g = gate(2), o = gate(3);
        const T* c_before = previous_state(out.c, p.c0, layer, token);
        V before = c_before ? load_first(c_before + u, left) : V{};
        V tanh_c = tanh<C>(load_first(static_cast<const T*>(out.c) + row * s.rank + u, left));
        C* dc_carry = w.dc + n * s.rank_pad + u;
        V dc = load(dc_carry) + dh * o * (C(1) - tanh_c * tanh_c);
        emit(0, dc * g * i * (C(1) - i));
        emit(1, dc * before * f * (C(1) - f));
        emit(2, dc * i * (C(1) - g * g));
        emit(3, dh * tanh_c * o * (C(1) - o));
        store(dc_carry, dc * f);
        store(carry, V{});
      }
    }
  }

  // The state before a layer: saved, given, or zero (null).
  const T* previous_state(const void* saved, const void* given, int64_t layer, int64_t token) const {
    if (layer > 0) return static_cast<const T*>(saved) + ((layer - 1) * s.tokens + token) * s.rank;
    return given ? static_cast<const T*>(given) + token * s.rank : nullptr;
  }

  // sums[n] += da[n] W, tile by tile; `stride` is that of the sums.
  void multiply(int64_t layer, int64_t first, int64_t count, int segment, const Element* right, int64_t panels,
                int64_t stride, C* sums) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = panel * kColumns;
      for (int64_t n = 0; n < count; n += kRows) {
        const int64_t rows = smaller(kRows, count - n);
        LeftRows<Element, kRows> left;
        Tile<Op, kRows, Shape::kVectors> tile;
        for (int i = 0; i < kRows; ++i) {
          const int64_t row = n + smaller(i, rows - 1);
          left.row[i] = reinterpret_cast<const Element*>(da_row(layer, first + row) + segment * s.rank_pad);
          for (int v = 0; v < Shape::kVectors; ++v)
            tile.acc[i][v] = column + v * kUnits < stride ? load(sums + row * stride + column + v * kUnits) : V{};
        }
        tile.multiply(left, right + panel * s.steps_da() * kColumns, s.steps_da());
        for (int i = 0; i < rows; ++i)
          for (int v = 0; v < Shape::kVectors; ++v)
            if (column + v * kUnits < stride) store(sums + (n + i) * stride + column + v * kUnits, tile.acc[i][v]);
      }
    }
  }

  // With xhat = (phi - mean) rstd and g the gradient of gamma xhat:
  // dphi = rstd (g gamma - [mean(g gamma)] - xhat mean(g gamma xhat)), the bracket for the layer norm only.
  template <class P>
  void reverse_norm(int64_t layer, int64_t token, C* g) {
    const ReadRows& rows = p.phi[layer];
    const P* row = static_cast<const P*>(rows.data) + row_offset(rows, token);
    const T* gamma = static_cast<const T*>(p.norm_weight);
    T* dphi = static_cast<T*>(out.dphi[layer]) + token * s.width;
    if (p.norm == Norm::none) {
      for (int64_t k = 0; k < s.width; k += kUnits) store_first(dphi + k, load(g + k), s.width - k);
      return;
    }
    const C* stats = static_cast<const C*>(out.stats);
    const C rstd = stats[layer * s.tokens + token];
    const C mean = p.norm == Norm::layer ? stats[(s.layers + layer) * s.tokens + token] : C(0);
    V sum_g = {}, sum_gx = {};
    for (int64_t k = 0; k < s.width; k += kUnits) {
      const int64_t left = s.width - k;
      V value = load(g + k);
      if (gamma) value *= load_first(gamma + k, left);
      V x = (load_strided(row + k * rows.inner, rows.inner, left) - mean) * rstd;
      store(g + k, value);
      sum_g += value;  // lanes past the width hold zero gradients
      sum_gx += value * x;
    }
    const C mean_g = p.norm == Norm::layer ? sum_lanes<C>(sum_g) / C(s.width) : C(0);
    const C mean_gx = sum_lanes<C>(sum_gx) / C(s.width);
    for (int64_t k = 0; k < s.width; k += kUnits) {
      const int64_t left = s.width - k;
      V x = (load_strided(row + k * rows.inner, rows.inner, left) - mean) * rstd;
      store_first(dphi + k, (load(g + k) - mean_g - x * mean_gx) * rstd, left);
    }
  }

  // The gates of one layer from phi and the saved states: the forward's tile without its state.
  void recompute_gates(int64_t layer, int64_t first, int64_t count) {
    if constexpr (CellT::kSaved == 0) return;
    ReadInput<T>::prepare(p, layer, first, count, forward->zeros, w.packed_stride, w.packed, w.x, w.mean, w.rstd);
    const bool has_state = layer > 0 || p.h0;
    for (int64_t n = 0; has_state && n < count; ++n) {
      const T* row = previous_state(out.h, p.h0, layer, first + n);
      pack_row<T>(w.packed_h + n * w.packed_h_stride, row, 1, s.rank, C(0), C(1));
      w.h[n] = w.packed_h + n * w.packed_h_stride;
    }
    constexpr int rows = kTileRows<CellT::kVectors>;
    for (int64_t panel = 0; panel < s.panels; ++panel)
      for (int64_t n = 0; n < count; n += rows) recompute_tile<rows>(panel, n, smaller(rows, count - n), has_state);
  }

  template <int MR>
  void recompute_tile(int64_t panel, int64_t n, int64_t count, bool has_state) {
    LeftRows<Element, MR> x, h;
    for (int i = 0; i < MR; ++i) {
      const int64_t row = n + smaller(i, count - 1);
      x.row[i] = w.x[row];
      h.row[i] = w.h[row];
    }
    GateSums<T, CellT, MR> sums;
    for (int i = 0; i < MR; ++i) sums.rstd[i] = w.rstd[n + smaller(i, count - 1)];
    sums.compute(s, *forward, panel, x, h, has_state);
    const int64_t u = panel * kUnits, left = s.rank - u;
    for (int i = 0; i < MR; ++i) {
      if (i == count) break;
      auto keep = [&](V a, V b, V c, V d) {
        T* gates = w.gates + (n + i) * CellT::kSaved * s.rank + u;
        store_first(gates, a, left);
        store_first(gates + s.rank, b, left);
        store_first(gates + 2 * s.rank, c, left);
        store_first(gates + 3 * s.rank, d, left);
      };
      if constexpr (CellT::kCell == Cell::gru) {
        auto step = sums.gru(i, V{});
        keep(step.r, step.z, step.n, step.hn);
      } else if constexpr (CellT::kCell == Cell::lstm) {
        auto step = sums.lstm(i, V{});
        keep(step.i, step.f, step.g, step.o);
      }
    }
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
