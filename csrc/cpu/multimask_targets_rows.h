// Norms whose statistics are those of a row, or are known: token by token.
#pragma once

#include "multimask_targets_norm.h"

namespace pyeff {
namespace PYEFF_ISA {

// What (x - mean) * scale + bias takes for each channel of each layer, and the projections that go back.
template <class C>
struct ChannelNorms {
  const C *mean = nullptr, *scale = nullptr, *bias = nullptr;  // [count, stride]
  const C *grad = nullptr, *back = nullptr;                    // [stride], [count, stride]
  int64_t stride = 0;
};

template <class T>
struct RowNorm {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int kLanes = PYEFF_ISA::kLanes<C>, kChains = 4;
  C mean = 0, scale = 0, bias = 0, pull = 0;

  // Adds what f(i, count) gives, in several chains.
  template <class F>
  static PYEFF_INLINE C sum(int64_t width, const F& f) {
    V sums[kChains] = {};
    int64_t i = 0;
    for (; i + kChains * kLanes <= width; i += kChains * kLanes) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) sums[c] += f(i + c * kLanes, int64_t(kLanes));
    }
    for (; i < width; i += kLanes) sums[0] += f(i, width - i);
    return sum_lanes<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  // Of all channels of one token.
  void measure(const T* x, int64_t width, double eps, double weight) {
    const C over_count = C(1) / C(width);
    mean = sum(width, [&](int64_t i, int64_t count) { return load_first(x + i, count); }) * over_count;
    const C off = over_count * sum(width, [&](int64_t i, int64_t count) {
                    return only_first<C>(load_first(x + i, count) - mean, count);
                  });
    const C squares = sum(width, [&](int64_t i, int64_t count) {
      const V c = only_first<C>(load_first(x + i, count) - mean, count);
      return c * c;
    });
    norm_of(off, squares * over_count - off * off, eps, weight, &scale, &bias, &pull);
  }
};

// A part of the rows; `post` normalises the sum over its channels, too. `sum` has room for a row.
template <class T>
void norm_rows(const NormCall<T>& call, const ChannelNorms<Compute<T>>& channels, bool post, bool accumulate,
               Compute<T>* out, bool streamed, Compute<T>* sum, PartOf rows) {
  using C = Compute<T>;
  using V = Vec<C>;
  const int64_t width = call.width;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t b = i / call.tokens, t = i % call.tokens;
    C* to = out + i * width;
    if (t >= call.lengths[b]) {
      if (!accumulate) for_vectors<C>(width, [&](int64_t at, int64_t count) { put(streamed, to + at, V{}, count); });
      continue;
    }
    for (int64_t k = 0; k < call.count; ++k) {
      const T* x = call.layers[k].row(b, t);
      const T* ahead =
          k + 1 < call.count ? call.layers[k + 1].row(b, t) : call.layers[0].row(b, t) + call.layers[0].token;
      const C* before = k ? sum : accumulate ? to : nullptr;
      auto each = [&](const auto& normalised) {
        for_vectors<C>(width, [&](int64_t at, int64_t count) {
          __builtin_prefetch(ahead + at);
          const V v = normalised(at, load_first(x + at, count), count);
          store_first(sum + at, before ? load_first(before + at, count) + v : v, count);
        });
      };
      if (call.norm == MaskNorm::layer) {
        RowNorm<T> norm;
        norm.measure(x, width, call.eps, call.weight);
        each([&](int64_t, V v, int64_t) { return (v - norm.mean) * norm.scale + norm.bias; });
      } else if (channels.mean) {
        const int64_t from = k * channels.stride;
        each([&](int64_t at, V v, int64_t count) {
          return (v - load_first(channels.mean + from + at, count)) * load_first(channels.scale + from + at, count) +
                 load_first(channels.bias + from + at, count);
        });
      } else {
        each([&](int64_t, V v, int64_t) { return v * C(call.weight); });
      }
    }
    RowNorm<C> norm;
    if (post) norm.measure(sum, width, call.eps, 1);
    for_vectors<C>(width, [&](int64_t at, int64_t count) {
      const V v = load_first(sum + at, count);
      put(streamed, to + at, post ? (v - norm.mean) * norm.scale + norm.bias : v, count);
    });
  }
  if (streamed) end_of_stream();
}

// The gradient of a part of the rows. A layer may be its own gradient.
template <class T>
void norm_rows_backward(const NormCall<T>& call, const ChannelNorms<Compute<T>>& channels,
                        const MaskTensor<const Compute<T>>& grad, T* const* dlayers, bool streamed, PartOf rows) {
  using C = Compute<T>;
  using V = Vec<C>;
  const int64_t width = call.width;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t b = i / call.tokens, t = i % call.tokens;
    const bool valid = t < call.lengths[b];
    const C* g = grad.row(b, t);
    C mean_grad = 0;
    if (valid && call.norm == MaskNorm::layer)
      mean_grad =
          RowNorm<C>::sum(width, [&](int64_t at, int64_t count) { return load_first(g + at, count); }) / C(width);
    for (int64_t k = 0; k < call.count; ++k) {
      const T* x = call.layers[k].row(b, t);
      T* to = dlayers[k] + i * width;
      auto each = [&](const auto& gradient) {
        for_vectors<C>(width, [&](int64_t at, int64_t count) { put(streamed, to + at, gradient(at, count), count); });
      };
      if (!valid) {
        each([](int64_t, int64_t) { return V{}; });
      } else if (call.norm == MaskNorm::layer) {
        RowNorm<T> norm;
        norm.measure(x, width, call.eps, call.weight);
        const C product = RowNorm<C>::sum(width, [&](int64_t at, int64_t count) {
          return only_first<C>((load_first(g + at, count) - mean_grad) * (load_first(x + at, count) - norm.mean),
                               count);
        });
        const C back = product / C(width) * norm.pull;
        each([&](int64_t at, int64_t count) {
          const V normalised = (load_first(x + at, count) - norm.mean) * norm.scale + norm.bias;
          return (load_first(g + at, count) - mean_grad) * norm.scale - normalised * back;
        });
      } else if (channels.mean) {
        const int64_t from = k * channels.stride;
        each([&](int64_t at, int64_t count) {
          const V scale = load_first(channels.scale + from + at, count);
          const V normalised = (load_first(x + at, count) - load_first(channels.mean + from + at, count)) * scale +
                               load_first(channels.bias + from + at, count);
          return (load_first(g + at, count) - load_first(channels.grad + at, count)) * scale -
                 normalised * load_first(channels.back + from + at, count);
        });
      } else {
        each([&](int64_t at, int64_t count) { return load_first(g + at, count) * C(call.weight); });
      }
    }
  }
  if (streamed) end_of_stream();
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
