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
  static constexpr int kWidth = Part::kWidth, kVectors = Part::kVectorCount, kLanes = Part::kLanes;

  // So many layers are added at once, while they are in the first cache.
  static constexpr int kGroup = 2;

 public:
  // One thread's memory: some layers' rows, and their sum or gradient.
  struct Room {
    T* copy;
    C* sum;
    void place(Arena& arena, int64_t tokens) {
      copy = arena.take<T>(kGroup * tokens * kWidth);
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
      for (int64_t k = 0; k < call_.count && n > 0;) {
        const int group = call_.count - k >= kGroup ? kGroup : 1;
        Norm norms[kGroup];
        for (int g = 0; g < group; ++g)
          norms[g] = read(i, k + g, items.end, room.copy + g * call_.tokens * kWidth, kGroup);
        const bool last = k + group == call_.count;
        Sum sum{room.sum, kWidth, room.sum, kWidth, false};
        if (k == 0) sum.before = accumulate ? to : nullptr, sum.before_stride = call_.width;
        if (last) sum.to = to, sum.stride = call_.width, sum.streamed = streamed;
        group == 1 ? add_layers<1>(room.copy, n, norms, sum, left) : add_layers<kGroup>(room.copy, n, norms, sum, left);
        k += group;
      }
      if (!accumulate) zero_padding(to, n, left, streamed);
    }
    if (streamed) end_of_stream();
  }

  void backward(const Room& room, PartOf items, const MaskTensor<const C>& grad, T* const* dlayers,
                bool streamed) const {
    for (int64_t i = items.begin; i < items.end; ++i) {
      const int64_t b = i / slabs_, from = i % slabs_ * kWidth, left = call_.width - from, n = call_.lengths[b];
      typename Slab<C, kVectors>::Moments of_grad;
      if (n > 0) Slab<C, kVectors>::read(grad.row(b, 0) + from, grad.token, n, left, room.sum, of_grad);
      for (int64_t k = 0; k < call_.count; ++k) {
        T* to = dlayers[k] + b * call_.tokens * call_.width + from;
        if (n > 0) back(room, n, read(i, k, items.end, room.copy, 1), of_grad.mean, to, left, streamed);
        zero_padding(to, n, left, streamed);
      }
    }
    if (streamed) end_of_stream();
  }

 private:
  using Norm = typename Part::Norm;

  // Copies layer k's slab i, and asks for the one that comes `ahead` reads later.
  Norm read(int64_t i, int64_t k, int64_t end, T* copy, int64_t ahead) const {
    const int64_t b = i / slabs_, from = i % slabs_ * kWidth, left = call_.width - from;
    int64_t next = i, layer = k + ahead;
    if (layer >= call_.count) next = i + 1 < end ? i + 1 : i, layer = smaller(layer - call_.count, call_.count - 1);
    const MaskTensor<const T>& x = call_.layers[layer];
    const Ahead later{reinterpret_cast<const char*>(x.row(next / slabs_, 0) + next % slabs_ * kWidth),
                      x.token * int64_t(sizeof(T))};
    typename Part::Moments moments;
    Part::read(call_.layers[k].row(b, 0) + from, call_.layers[k].token, call_.lengths[b], left, copy, moments, later);
    return Norm(moments, call_.eps, call_.weight);
  }

  template <class U>
  void zero_padding(U* to, int64_t n, int64_t left, bool streamed) const {
    for (int64_t t = n; t < call_.tokens; ++t)
      for (int64_t c = 0; c < smaller(left, kWidth); c += kLanes)
        put(streamed, to + t * call_.width + c, V{}, left - c);
  }

  struct Sum {
    const C* before;  // or null
    int64_t before_stride;
    C* to;
    int64_t stride;
    bool streamed;
  };

  // to = before + what is normalised of G layers.
  template <int G>
  void add_layers(const T* copy, int64_t n, const Norm* norms, const Sum& sum, int64_t left) const {
    if (left < kWidth) return add_rows<G, false, true, false>(copy, n, norms, sum, left);
    if (sum.streamed) {
      sum.before ? add_rows<G, true, true, true>(copy, n, norms, sum, left)
                 : add_rows<G, true, false, true>(copy, n, norms, sum, left);
    } else {
      sum.before ? add_rows<G, true, true, false>(copy, n, norms, sum, left)
                 : add_rows<G, true, false, false>(copy, n, norms, sum, left);
    }
  }

  template <int G, bool kWhole, bool kBefore, bool kStream>
  void add_rows(const T* copy, int64_t n, const Norm* norms, const Sum sum, int64_t left) const {
    V mean[G][kVectors], scale[G][kVectors], bias[kVectors] = {};
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < kVectors; ++v) {
        mean[g][v] = load(norms[g].mean + v * kLanes);
        scale[g][v] = load(norms[g].scale + v * kLanes);
        bias[v] += load(norms[g].bias + v * kLanes);
      }
    const int64_t layer = call_.tokens * kWidth;
    const C* before = sum.before;
    C* to = sum.to;
    for (int64_t t = 0; t < n; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = v * kLanes, count = kWhole ? kLanes : left - c;
        if (count <= 0) break;
        V total = bias[v];
        if (kBefore && (kWhole || before)) total += load_first(before + c, count);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) total += (load(copy + g * layer + c) - mean[g][v]) * scale[g][v];
        kStream ? stream(to + c, total) : store_first(to + c, total, count);
      }
      copy += kWidth, to += sum.stride;
      if (kBefore && (kWhole || before)) before += sum.before_stride;
    }
  }

  void back(const Room& room, int64_t n, const Norm& norm, const C* mean_grad, T* to, int64_t left,
            bool streamed) const {
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
    for (int64_t t = 0; t < n; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = v * kLanes;
        if (left <= c) break;
        const V scale = load(norm.scale + c), normalised = centred(t, v) * scale + load(norm.bias + c);
        put(streamed, to + t * call_.width + c, gradient(t, v) * scale - normalised * product[v], left - c);
      }
    }
  }

  const NormCall<T>& call_;
  const int64_t slabs_;
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
