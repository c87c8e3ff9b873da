// What both ways through the norms share: the tensors, what a normalised number is made of, rows and slabs of channels.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "multimask_loss.h"
#include "stream.h"

namespace pyeff {
namespace PYEFF_ISA {

template <class T>
struct MaskTensor {
  T* data;
  int64_t sample, token;
  PYEFF_INLINE T* row(int64_t b, int64_t t) const { return data + b * sample + t * token; }
};

// One norm of some layers of one type: forward, the weighted sum of what comes out; backward, each layer's gradient.
template <class T>
struct NormCall {
  using C = Compute<T>;
  MaskNorm norm;
  double eps, weight;
  int64_t batch, tokens, width, count;
  const int32_t* lengths;
  const MaskTensor<const T>* layers;

  // The tokens that a mean over samples counts.
  int64_t valid() const {
    int64_t sum = 0;
    for (int64_t b = 0; b < batch; ++b) sum += lengths[b];
    return larger(sum, 1);
  }
};

// weight * normalised(x) = (x - mean) * scale + bias. The bias is what the mean, rounded, is wrong by. `pull` is
// 1 / (variance + eps).
template <class C>
PYEFF_INLINE void norm_of(C sum, C squares, C over_count, double eps, double weight, C* scale, C* bias, C* pull) {
  const C off = sum * over_count, variance = squares * over_count - off * off;
  *pull = C(1) / ((variance < C(0) ? C(0) : variance) + C(eps));
  *scale = (sizeof(C) == 8 ? C(__builtin_sqrt(double(*pull))) : C(__builtin_sqrtf(float(*pull)))) * C(weight);
  *bias = -off * *scale;
}

// Calls body(i, count) for whole vectors and then for what is left.
template <class C, class F>
PYEFF_INLINE void for_vectors(int64_t width, const F& body) {
  constexpr int lanes = kLanes<C>;
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) body(i, int64_t(lanes));
  if (i < width) body(i, width - i);
}

// The first `count` lanes, zero in the others.
template <class C>
PYEFF_INLINE Vec<C> only_first(Vec<C> v, int64_t count) {
  constexpr int lanes = kLanes<C>;
  if (count >= lanes) return v;
  for (int l = 0; l < lanes; ++l) v[l] = l < count ? v[l] : C(0);
  return v;
}

template <class T>
PYEFF_INLINE void put(bool streamed, T* to, Vec<Compute<T>> v, int64_t count) {
  if (streamed && count >= kLanes<Compute<T>>) return stream(to, v);
  store_first(to, v, count);
}

// The range of part `part` of `parts`.
struct PartOf {
  int64_t begin, end;
  PartOf(int64_t count, int64_t part, int64_t parts) : begin(count * part / parts), end(count * (part + 1) / parts) {}
};

// Rows that are asked for while others are worked on.
struct Ahead {
  const char* at = nullptr;
  int64_t stride = 0, bytes = 0, left = 0;
  PYEFF_INLINE void step() {
    if (left <= 0) return;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += stride, --left;
  }
};

// Some channels of one sample's tokens. They are copied, row behind row: tokens that lie a power of two apart share few
// lines of a cache. Lanes past the last channel are zero in the copy and are worked on like the others.
template <class T>
struct Slab {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int kLanes = PYEFF_ISA::kLanes<C>;
  static constexpr int kVectors = kVectorBytes == 64 ? 2 : 4, kWidth = kVectors * kLanes;
  // Chains of sums, so that their latency hides; and the share of rows that a pass asks for ahead.
  static constexpr int kChains = 2, kPasses = 3;

  // `mean` is rounded; see norm_of. `over_count` of the tokens.
  struct Norm {
    C mean[kWidth], scale[kWidth], bias[kWidth], pull[kWidth];
  };

  template <class F>
  static PYEFF_INLINE void for_rows(int64_t n, Ahead& ahead, const F& body) {
    int64_t t = 0;
    for (; t + kPasses <= n; t += kPasses) {
      ahead.step();
#pragma GCC unroll 3
      for (int i = 0; i < kPasses; ++i) body(t + i);
    }
    for (; t < n; ++t) {
      ahead.step();
      body(t);
    }
  }

  // Copies n rows; `mean` becomes theirs.
  static void read(const T* from, int64_t stride, int64_t n, int64_t left, T* copy, C* mean, Ahead& ahead) {
    left >= kWidth ? read_rows<true>(from, stride, n, left, copy, mean, ahead)
                   : read_rows<false>(from, stride, n, left, copy, mean, ahead);
  }

  template <bool kWhole>
  static void read_rows(const T* from, int64_t stride, int64_t n, int64_t left, T* copy, C* mean, Ahead& ahead) {
    V sum[kVectors] = {};
    for_rows(n, ahead, [&](int64_t t) {
      const T* row = from + t * stride;
      T* to = copy + t * kWidth;
      if (kWhole) {
        __builtin_memcpy(to, row, sizeof(T) * kWidth);
      } else {
        for (int c = 0; c < kWidth; ++c) to[c] = c < left ? row[c] : T{};
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += load(to + v * kLanes);
    });
    const C over_count = C(1) / C(larger(n, 1));
    for (int v = 0; v < kVectors; ++v) store(mean + v * kLanes, sum[v] * over_count);
  }

  // The sums of x - mean and of its squares.
  static void centre(const T* copy, int64_t n, const C* mean, C* sums, C* squares, Ahead& ahead) {
    V sum[kVectors] = {}, square[kVectors] = {}, middle[kVectors];
    for (int v = 0; v < kVectors; ++v) middle[v] = load(mean + v * kLanes);
    for_rows(n, ahead, [&](int64_t t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const V c = load(copy + t * kWidth + v * kLanes) - middle[v];
        sum[v] += c;
        square[v] += c * c;
      }
    });
    for (int v = 0; v < kVectors; ++v) {
      store(sums + v * kLanes, sum[v]);
      store(squares + v * kLanes, square[v]);
    }
  }

  static void measure(const T* copy, int64_t n, double eps, double weight, Norm& norm, Ahead& ahead) {
    C sums[kWidth], squares[kWidth];
    centre(copy, n, norm.mean, sums, squares, ahead);
    const C over_count = C(1) / C(larger(n, 1));
    for (int c = 0; c < kWidth; ++c)
      norm_of(sums[c], squares[c], over_count, eps, weight, norm.scale + c, norm.bias + c, norm.pull + c);
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
