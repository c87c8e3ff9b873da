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
PYEFF_INLINE void norm_of(C off, C variance, double eps, double weight, C* scale, C* bias, C* pull) {
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

// Rows that are asked for while others are worked on: any, and past the end of the tensor, too.
struct Ahead {
  const char* at;
  int64_t stride;
  template <int kBytes>
  PYEFF_INLINE void step() {
#pragma GCC unroll 4
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += stride;
  }
};

// A vector that is copied on the way.
template <class T>
PYEFF_INLINE Vec<T> load_copy(const T* from, T* to) {
  const Vec<T> v = load(from);
  store(to, v);
  return v;
}
PYEFF_INLINE FloatV load_copy(const bf16* from, bf16* to) {
  HalfBitsV bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  __builtin_memcpy(to, &bits, sizeof bits);
  return bit_cast<FloatV>(widen_bits(bits) << 16);
}

// Some channels of one sample's tokens. They are copied, row behind row: tokens that lie a power of two apart share few
// lines of a cache. Lanes past the last channel are zero in the copy and are worked on like the others.
// `kVectors` vectors wide: two lines of memory, which come together.
template <class T, int kVectors = kVectorBytes == 64 ? (sizeof(T) == 2 ? 4 : 2) : 4>
struct Slab {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int kLanes = PYEFF_ISA::kLanes<C>, kWidth = kVectors * kLanes, kVectorCount = kVectors;
  // So many independent sums hide the latency of one; and the rows whose mean the others are taken about.
  static constexpr int kChains = kVectorRegisters >= 32 ? 2 : 1, kFirst = 16;

  // Of n tokens: the mean, rounded; what it is short of the mean; and the variance.
  struct Moments {
    C mean[kWidth], off[kWidth], variance[kWidth];
  };
  // See norm_of.
  struct Norm {
    C mean[kWidth], scale[kWidth], bias[kWidth], pull[kWidth];
    Norm() = default;
    Norm(const Moments& of, double eps, double weight) {
      __builtin_memcpy(mean, of.mean, sizeof mean);
      for (int c = 0; c < kWidth; ++c) norm_of(of.off[c], of.variance[c], eps, weight, scale + c, bias + c, pull + c);
    }
  };

  static void read(const T* from, int64_t stride, int64_t n, int64_t left, T* copy, Moments& moments) {
    read(from, stride, n, left, copy, moments, {reinterpret_cast<const char*>(copy), 0});
  }

  // Copies n rows.
  static void read(const T* from, int64_t stride, int64_t n, int64_t left, T* copy, Moments& moments, Ahead ahead) {
    left >= kWidth ? read_rows<true>(from, stride, n, left, copy, moments, ahead)
                   : read_rows<false>(from, stride, n, left, copy, moments, ahead);
  }

 private:
  template <bool kWhole>
  static PYEFF_INLINE V take(const T* row, int64_t left, T* to, int v) {
    if (kWhole) return load_copy(row + v * kLanes, to + v * kLanes);
    for (int c = v * kLanes; c < (v + 1) * kLanes; ++c) to[c] = c < left ? row[c] : T{};
    return load(to + v * kLanes);
  }

  // Sums and sums of squares about the mean of the first rows: however far those lie from the others, the variance has
  // them in it, so that their difference costs few digits.
  template <bool kWhole>
  static void read_rows(const T* from, int64_t stride, int64_t n, int64_t left, T* copy, Moments& moments,
                        Ahead ahead) {
    const int64_t first = smaller(n, kFirst);
    V middle[kVectors] = {}, sum[kChains][kVectors] = {}, square[kChains][kVectors] = {};
    for (int64_t t = 0; t < first; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) middle[v] += take<kWhole>(from + t * stride, left, copy + t * kWidth, v);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) middle[v] *= C(1) / C(larger(first, 1));
    constexpr int kBytes = kWidth * int(sizeof(T));
    int64_t t = 0;
    for (; t < first; ++t) {
      ahead.template step<kBytes>();
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const V d = load(copy + t * kWidth + v * kLanes) - middle[v];
        sum[0][v] += d;
        square[0][v] += d * d;
      }
    }
    const T* at = from + first * stride;
    T* to = copy + first * kWidth;
    auto row = [&](int chain) __attribute__((always_inline)) {
      ahead.template step<kBytes>();
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const V d = take<kWhole>(at, left, to, v) - middle[v];
        sum[chain][v] += d;
        square[chain][v] += d * d;
      }
      at += stride, to += kWidth;
    };
    for (; t + kChains <= n; t += kChains) {
#pragma GCC unroll 2
      for (int i = 0; i < kChains; ++i) row(i);
    }
    for (; t < n; ++t) row(0);
    const C over_count = C(1) / C(larger(n, 1));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      for (int i = 1; i < kChains; ++i) sum[0][v] += sum[i][v], square[0][v] += square[i][v];
      const V more = sum[0][v] * over_count, mean = middle[v] + more;
      store(moments.mean + v * kLanes, mean);
      store(moments.off + v * kLanes, more - (mean - middle[v]));
      store(moments.variance + v * kLanes, square[0][v] * over_count - more * more);
    }
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
