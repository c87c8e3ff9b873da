// Instance norms: a slab of channels of one sample is in the cache from the first layer to the last.
#pragma once

#include "multimask_targets_rows.h"

namespace pyeff {
namespace PYEFF_ISA {

template <class T>
class InstanceNorm {
  using C = Compute<T>;
  using V = Vec<C>;
  using Part = Slab<T>;
  static constexpr int kWidth = Part::kWidth, kVectors = Part::kVectors, kLanes = Part::kLanes;

 public:
  // One thread's memory: a layer's rows, and their sum or gradient.
  struct Room {
    T* copy;
    C* sum;
    void place(Arena& arena, int64_t tokens) {
      copy = arena.take<T>(tokens * kWidth);
      sum = arena.take<C>(tokens * kWidth);
    }
  };

  explicit InstanceNorm(const NormCall<T>& call) : call_(call), slabs_(ceil_div(call.width, kWidth)) {}

  int64_t slabs() const { return slabs_; }

  // The slabs [begin, end), counted through all samples. Those of an output are `sample` elements apart.
  void forward(const Room& room, PartOf items, C* out, int64_t sample, bool accumulate, bool streamed) const {
    for (int64_t i = items.begin; i < items.end; ++i) {
      const int64_t b = i / slabs_, from = i % slabs_ * kWidth, left = call_.width - from, n = call_.lengths[b];
      C* to = out + b * sample + from;
      for (int64_t k = 0; k < call_.count && n > 0; ++k) {
        const bool last = k + 1 == call_.count;
        Ahead ahead = !last ? rows_of(i, k + 1) : i + 1 < items.end ? rows_of(i + 1, 0) : Ahead{};
        typename Part::Norm norm;
        Part::read(call_.layers[k].row(b, 0) + from, call_.layers[k].token, n, left, room.copy, norm.mean, ahead);
        Part::measure(room.copy, n, call_.eps, call_.weight, norm, ahead);
        const C* before = k ? room.sum : accumulate ? to : nullptr;
        const int64_t stride = k ? kWidth : call_.width;
        if (!last) {
          add(room.copy, n, norm, k || accumulate ? before : nullptr, stride, room.sum, kWidth, k ? kWidth : left,
              false, ahead);
        } else {
          add(room.copy, n, norm, before, stride, to, call_.width, left, streamed, ahead);
        }
      }
      if (!accumulate) zero_padding(to, n, left, streamed);
    }
    if (streamed) end_of_stream();
  }

  void backward(const Room& room, PartOf items, const MaskTensor<const C>& grad, T* const* dlayers,
                bool streamed) const {
    for (int64_t i = items.begin; i < items.end; ++i) {
      const int64_t b = i / slabs_, from = i % slabs_ * kWidth, left = call_.width - from, n = call_.lengths[b];
      const int64_t at = b * call_.tokens * call_.width + from;
      C mean_grad[kWidth];
      Ahead none;
      if (n > 0) Slab<C>::read(grad.row(b, 0) + from, grad.token, n, left, room.sum, mean_grad, none);
      for (int64_t k = 0; k < call_.count; ++k) {
        T* to = dlayers[k] + at;
        if (n > 0) {
          Ahead ahead = k + 1 < call_.count ? rows_of(i, k + 1) : i + 1 < items.end ? rows_of(i + 1, 0) : Ahead{};
          typename Part::Norm norm;
          Part::read(call_.layers[k].row(b, 0) + from, call_.layers[k].token, n, left, room.copy, norm.mean, ahead);
          Part::measure(room.copy, n, call_.eps, call_.weight, norm, ahead);
          back(room, n, norm, mean_grad, to, left, streamed, ahead);
        }
        zero_padding(to, n, left, streamed);
      }
    }
    if (streamed) end_of_stream();
  }

 private:
  Ahead rows_of(int64_t i, int64_t k) const {
    const int64_t b = i / slabs_, from = i % slabs_ * kWidth;
    const int64_t width = smaller(kWidth, call_.width - from), size = sizeof(T);
    return {reinterpret_cast<const char*>(call_.layers[k].row(b, 0) + from), call_.layers[k].token * size, width * size,
            call_.lengths[b]};
  }

  template <class U>
  void zero_padding(U* to, int64_t n, int64_t left, bool streamed) const {
    for (int64_t t = n; t < call_.tokens; ++t)
      for (int64_t c = 0; c < smaller(left, kWidth); c += kLanes)
        put(streamed, to + t * call_.width + c, V{}, left - c);
  }

  // to = before + what is normalised; `left` channels are written.
  static void add(const T* copy, int64_t n, const typename Part::Norm& norm, const C* before, int64_t before_stride,
                  C* to, int64_t stride, int64_t left, bool streamed, Ahead& ahead) {
    if (left < kWidth)
      return add_rows<true, false, false>(copy, n, norm, before, before_stride, to, stride, left, ahead);
    if (streamed) {
      before ? add_rows<true, true, true>(copy, n, norm, before, before_stride, to, stride, left, ahead)
             : add_rows<false, true, true>(copy, n, norm, before, before_stride, to, stride, left, ahead);
    } else {
      before ? add_rows<true, true, false>(copy, n, norm, before, before_stride, to, stride, left, ahead)
             : add_rows<false, true, false>(copy, n, norm, before, before_stride, to, stride, left, ahead);
    }
  }

  template <bool kBefore, bool kWhole, bool kStream>
  static void add_rows(const T* copy, int64_t n, const typename Part::Norm& norm, const C* before,
                       int64_t before_stride, C* to, int64_t stride, int64_t left, Ahead& ahead) {
    V mean[kVectors], scale[kVectors], bias[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      mean[v] = load(norm.mean + v * kLanes);
      scale[v] = load(norm.scale + v * kLanes);
      bias[v] = load(norm.bias + v * kLanes);
    }
    Part::for_rows(n, ahead, [&](int64_t t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = v * kLanes;
        if (!kWhole && left <= c) break;
        V sum = (load(copy + t * kWidth + c) - mean[v]) * scale[v] + bias[v];
        if (kBefore && (kWhole || before))
          sum += kWhole ? load(before + t * before_stride + c) : load_first(before + t * before_stride + c, left - c);
        C* at = to + t * stride + c;
        if (kStream)
          stream(at, sum);
        else if (kWhole)
          store(at, sum);
        else
          store_first(at, sum, left - c);
      }
    });
  }

  void back(const Room& room, int64_t n, const typename Part::Norm& norm, const C* mean_grad, T* to, int64_t left,
            bool streamed, Ahead& ahead) const {
    const C over_count = C(1) / C(n);
    V product[kVectors] = {};
    auto gradient = [&](int64_t t, int v) {
      return load(room.sum + t * kWidth + v * kLanes) - load(mean_grad + v * kLanes);
    };
    auto centred = [&](int64_t t, int v) {
      return load(room.copy + t * kWidth + v * kLanes) - load(norm.mean + v * kLanes);
    };
    for (int64_t t = 0; t < n; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) product[v] += gradient(t, v) * centred(t, v);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) product[v] *= load(norm.pull + v * kLanes) * over_count;
    Part::for_rows(n, ahead, [&](int64_t t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = v * kLanes;
        if (left <= c) break;
        const V scale = load(norm.scale + c), normalised = centred(t, v) * scale + load(norm.bias + c);
        put(streamed, to + t * call_.width + c, gradient(t, v) * scale - normalised * product[v], left - c);
      }
    });
  }

  const NormCall<T>& call_;
  const int64_t slabs_;
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
