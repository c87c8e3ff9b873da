// The loss of a few rows against one target row: read once, with everything that is to be known of them.
#pragma once

#include <utility>

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

// What is to be known of a group of rows. `any` is decided where it runs; the others leave out what they need not ask.
enum class LossWork { value, gradient, value_moments, gradient_moments, any };

// body(0) ... body(N - 1), whose argument is a constant: what it indexes can stay in registers.
template <class F, int... I>
PYEFF_INLINE void each_of(std::integer_sequence<int, I...>, const F& body) {
  (body(std::integral_constant<int, I>{}), ...);
}

template <class T, MaskLossKind K>
struct LossRows {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr bool kCosine = K == MaskLossKind::cosine;
  static constexpr int kLanes = PYEFF_ISA::kLanes<C>;
  // What fills a cache line, so that rows that are stored side by side leave no line half written.
  static constexpr int kStep = 64 / int(sizeof(T));
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
    // What pre-training asks for has loops of its own; as many for every loss would take minutes to compile.
    if constexpr (K == MaskLossKind::l2 && sizeof(C) == sizeof(float)) {
      const bool gradient = g.dx[0];
      if (!dy && moments.y)
        return gradient ? work<G, LossWork::gradient_moments>(g, repeats)
                        : work<G, LossWork::value_moments>(g, repeats);
      if (!dy) return gradient ? work<G, LossWork::gradient>(g, repeats) : work<G, LossWork::value>(g, repeats);
    }
    work<G, LossWork::any>(g, repeats);
  }

  template <int G, LossWork W>
  void work(Group& g, double repeats) const {
    Pass<G, W> pass(*this, g, repeats);
    int64_t i = 0;
    for (; i + kStep <= width; i += kStep) pass.template chunk<true>(i);
    if (i < width) pass.template chunk<false>(i);
    for (int r = 0; r < G; ++r) {
      g.loss[r] = sum_lanes<C>(pass.loss[r]);
      if constexpr (kCosine) g.square[r] = sum_lanes<C>(pass.square[r]);
    }
  }

  // One way through a group's rows, with copies of everything: nothing that is stored can change where it reads.
  template <int G, LossWork W>
  struct Pass {
    static constexpr bool kAny = W == LossWork::any;
    static constexpr int kParts = Doubles<C>::kParts, kHalf = kLanes / kParts;
    static constexpr auto kGroup = std::make_integer_sequence<int, G>{};
    static constexpr auto kHalves = std::make_integer_sequence<int, kParts>{};

    const int64_t width;
    const Distance<C, K> distance;
    const C* const y;
    C* const dy;
    const bool stream, with_dx, with_moments;
    const RowMoments moments;
    const double repeats;
    const T *x[G], *ahead[G];
    T* dx[G];
    C factor[G];
    V loss[G] = {}, square[G] = {};

    PYEFF_INLINE Pass(const LossRows& of, const Group& g, double repeats)
        : width(of.width),
          distance(of.distance),
          y(of.y),
          dy(of.dy),
          stream(of.stream),
          with_dx(kAny ? g.dx[0] && !kCosine : W == LossWork::gradient || W == LossWork::gradient_moments),
          with_moments(kAny ? bool(of.moments.y) : W == LossWork::value_moments || W == LossWork::gradient_moments),
          moments(of.moments),
          repeats(repeats) {
      each_of(kGroup, [&](auto r) __attribute__((always_inline)) {
        x[r] = g.x[r], ahead[r] = g.ahead[r], dx[r] = g.dx[r], factor[r] = g.factor[r];
      });
    }

    template <bool kWhole>
    PYEFF_INLINE void chunk(int64_t i) {
      if (kWhole) each_of(kGroup, [&](auto r) __attribute__((always_inline)) { __builtin_prefetch(ahead[r] + i); });
      for (int64_t at = i; at < (kWhole ? i + kStep : width); at += kLanes)
        vector<kWhole>(at, kWhole ? kLanes : width - at);
    }

    template <bool kWhole>
    PYEFF_INLINE void vector(int64_t at, int64_t left) {
      const V target = load_first(y + at, left);
      V slopes{};
      DoubleV sum[kParts] = {}, squares[kParts] = {};
      each_of(kGroup, [&](auto r) __attribute__((always_inline)) {
        const V from = load_first(x[r] + at, left);
        if constexpr (kCosine) {
          loss[r] += from * target;
          square[r] += from * from;
        } else {
          const V d = from - target;
          loss[r] += distance.value(d);
          if (with_dx || (kAny && dy)) {
            const V slope = factor[r] * distance.slope(d);
            if (kAny && dy) slopes += negative(slope);
            if (with_dx) put<kWhole>(stream, dx[r] + at, slope, left);
          }
        }
        if (with_moments) {
          const Doubles<C> wide(from);
          each_of(kHalves, [&](auto h) __attribute__((always_inline)) {
            sum[h] += wide.part[h];
            squares[h] += wide.part[h] * wide.part[h];
          });
        }
      });
      if (kAny && dy && !kCosine) store_first(dy + at, load_first(dy + at, left) + slopes, left);
      if (!with_moments) return;
      each_of(kHalves, [&](auto h) __attribute__((always_inline)) {
        add(moments.x + at + h * kHalf, sum[h]);
        add(moments.xx + at + h * kHalf, squares[h]);
      });
      if (repeats == 0) return;
      const Doubles<C> wide(target);
      each_of(kHalves, [&](auto h) __attribute__((always_inline)) {
        add(moments.y + at + h * kHalf, wide.part[h] * repeats);
        add(moments.yy + at + h * kHalf, wide.part[h] * wide.part[h] * repeats);
      });
    }

    static PYEFF_INLINE void add(double* to, DoubleV v) { store(to, load(to) + v); }
  };

  // By its bits: a difference would be fused with the product, but only where nobody asks for the product itself.
  static PYEFF_INLINE V negative(V v) {
    using Int = typename VectorOf<C>::Int;
    return bit_cast<V>(Int(bit_cast<Int>(v) ^ bit_cast<Int>(splat<V>(C(-0.0)))));
  }

  template <bool kWhole>
  static PYEFF_INLINE void put(bool stream, T* to, V v, int64_t left) {
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
        left >= kLanes ? put<true>(stream, dx + i, sum, left) : put<false>(stream, dx + i, sum, left);
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
      left >= kLanes ? put<true>(stream, to + i, V{}, left) : put<false>(stream, to + i, V{}, left);
    }
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
