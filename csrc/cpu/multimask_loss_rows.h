// The loss of a few rows against one target row: read once, with everything that is to be known of them.
#pragma once

#include "gemm.h"
#include "multimask_loss.h"
#include "stream.h"

namespace pyeff {
namespace PYEFF_ISA {

// A vector of the wide type as vectors of double.
template <class C>
struct Doubles;
template <>
struct Doubles<double> {
  static constexpr int kParts = 1;
  DoubleV part[1];
  PYEFF_INLINE explicit Doubles(DoubleV v) : part{v} {}
};
template <>
struct Doubles<float> {
  typedef float HalfV __attribute__((vector_size(kVectorBytes / 2)));
  static constexpr int kParts = 2;
  DoubleV part[2];
  PYEFF_INLINE explicit Doubles(FloatV v) {
    struct Halves {
      HalfV low, high;
    } halves = bit_cast<Halves>(v);
    part[0] = __builtin_convertvector(halves.low, DoubleV);
    part[1] = __builtin_convertvector(halves.high, DoubleV);
  }
};

PYEFF_INLINE float root(float x) { return __builtin_sqrtf(x); }
PYEFF_INLINE double root(double x) { return __builtin_sqrt(x); }

// What a difference d counts, and the derivative of that.
template <class C, MaskLossKind K>
struct Distance {
  C beta;
  PYEFF_INLINE Vec<C> value(Vec<C> d) const {
    if constexpr (K == MaskLossKind::l2) return d * d;
    const Vec<C> size = d < C(0) ? -d : d;
    if constexpr (K == MaskLossKind::l1) return size;
    return size < beta ? C(0.5) * d * d / beta : size - C(0.5) * beta;
  }
  PYEFF_INLINE Vec<C> slope(Vec<C> d) const {
    if constexpr (K == MaskLossKind::l2) return d + d;
    const Vec<C> one = splat<Vec<C>>(C(1)), sign = d > C(0) ? one : d < C(0) ? -one : Vec<C>{};
    if constexpr (K == MaskLossKind::l1) return sign;
    const Vec<C> size = d < C(0) ? -d : d;
    return size >= beta ? sign : d / beta;
  }
};

// Sums over the rows that one task has seen, [padded width] each.
struct RowMoments {
  double *y, *yy, *x, *xx;
};

template <class T, MaskLossKind K>
struct LossRows {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr bool kCosine = K == MaskLossKind::cosine;
  static constexpr int kLanes = PYEFF_ISA::kLanes<C>;
  // What fills a cache line, so that rows that are stored side by side leave no line half written.
  static constexpr int kStep = 64 / int(sizeof(T)), kVectors = kStep / kLanes;
  static constexpr int kRows = 4;

  int64_t width;
  Distance<C, K> distance;
  const C* y;
  bool stream;         // what is stored through dx
  RowMoments moments;  // null where not wanted
  C* dy;               // what is to be added to, or null

  // Of one group of rows. `repeats`: how often the target counts in its moments now.
  struct Group {
    const T *x[kRows], *ahead[kRows];
    T* dx[kRows];
    C factor[kRows], loss[kRows], square[kRows];  // for the cosine, loss is the product with y
  };

  template <int G>
  void run(Group& g, double repeats) const {
    V loss[G] = {}, square[G] = {};
    int64_t i = 0;
    for (; i + kStep <= width; i += kStep) chunk<G, true>(g, i, repeats, loss, square);
    if (i < width) chunk<G, false>(g, i, repeats, loss, square);
    for (int r = 0; r < G; ++r) {
      g.loss[r] = sum_lanes<C>(loss[r]);
      if constexpr (kCosine) g.square[r] = sum_lanes<C>(square[r]);
    }
  }

  template <int G, bool kWhole>
  PYEFF_INLINE void chunk(Group& g, int64_t i, double repeats, V* loss, V* square) const {
    constexpr int kParts = Doubles<C>::kParts;
    DoubleV sum[kVectors][kParts] = {}, sum_squares[kVectors][kParts] = {};
    V slopes[kVectors] = {};
#pragma GCC unroll 4
    for (int r = 0; r < G; ++r) {
      if (kWhole) __builtin_prefetch(g.ahead[r] + i);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = i + v * kLanes, left = kWhole ? kLanes : width - at;
        if (!kWhole && left <= 0) break;
        const V target = load_first(y + at, left), x = load_first(g.x[r] + at, left);
        if constexpr (kCosine) {
          loss[r] += x * target;
          square[r] += x * x;
        } else {
          const V d = x - target;
          loss[r] += distance.value(d);
          if (g.dx[r] || dy) {
            const V slope = g.factor[r] * distance.slope(d);
            if (dy) slopes[v] += negative(slope);
            if (g.dx[r]) put<kWhole>(g.dx[r] + at, slope, left);
          }
        }
        if (moments.x) {
          const Doubles<C> wide(x);
#pragma GCC unroll 2
          for (int h = 0; h < kParts; ++h) {
            sum[v][h] += wide.part[h];
            sum_squares[v][h] += wide.part[h] * wide.part[h];
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kLanes, left = kWhole ? kLanes : width - at;
      if (!kWhole && left <= 0) break;
      if (!kCosine && dy) store_first(dy + at, load_first(dy + at, left) + slopes[v], left);
      if (!moments.x) continue;
#pragma GCC unroll 2
      for (int h = 0; h < kParts; ++h) {
        const int64_t part = at + h * (kLanes / kParts);
        add(moments.x + part, sum[v][h]);
        add(moments.xx + part, sum_squares[v][h]);
      }
      if (repeats == 0) continue;
      const Doubles<C> wide(load_first(y + at, left));
#pragma GCC unroll 2
      for (int h = 0; h < kParts; ++h) {
        const int64_t part = at + h * (kLanes / kParts);
        add(moments.y + part, wide.part[h] * repeats);
        add(moments.yy + part, wide.part[h] * wide.part[h] * repeats);
      }
    }
  }

  // By its bits: a difference would be fused with the product, but only where nobody asks for the product itself.
  static PYEFF_INLINE V negative(V v) {
    using Int = typename VectorOf<C>::Int;
    return bit_cast<V>(Int(bit_cast<Int>(v) ^ bit_cast<Int>(splat<V>(C(-0.0)))));
  }
  static PYEFF_INLINE void add(double* to, DoubleV v) { store(to, load(to) + v); }

  template <bool kWhole>
  PYEFF_INLINE void put(T* to, V v, int64_t left) const {
    if (!kWhole) return store_first(to, v, left);
    stream ? PYEFF_ISA::stream(to, v) : store(to, v);
  }

  // dx = x * by_x + y * by_y, and dy += y * on_y + x * by_y.
  void combine(const T* x, T* dx, C by_x, C by_y, C on_y) const {
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t left = width - i;
      const V target = load_first(y + i, left), from = load_first(x + i, left);
      if (dx) {
        const V sum = from * by_x + target * by_y;
        left >= kLanes ? put<true>(dx + i, sum, left) : put<false>(dx + i, sum, left);
      }
      if (dy) store_first(dy + i, load_first(dy + i, left) + (target * on_y + from * by_y), left);
    }
  }

  C square_of_target() const {
    V sum = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const V v = load_first(y + i, width - i);
      sum += v * v;
    }
    return sum_lanes<C>(sum);
  }

  void zero(T* to) const {
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t left = width - i;
      left >= kLanes ? put<true>(to + i, V{}, left) : put<false>(to + i, V{}, left);
    }
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
