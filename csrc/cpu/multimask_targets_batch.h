// Statistics of channels over the tokens of all samples, and the projections of a gradient on them. Each sample's are
// taken about its own mean; they are put together in the samples' order, in double.
#pragma once

#include "multimask_targets_rows.h"

namespace pyeff {
namespace PYEFF_ISA {

template <class T>
class BatchStatistics {
  using C = Compute<T>;
  using Part = Slab<T>;
  static constexpr int kWidth = Part::kWidth;

 public:
  BatchStatistics(const NormCall<T>& call, const Parallel& parallel) : call_(call), parallel_(parallel) {
    slabs_ = ceil_div(call.width, kWidth), stride_ = slabs_ * kWidth;
    parts_ = smaller(larger(1, parallel.threads), call.batch * slabs_);
  }

  void place(Arena& arena, bool backward) {
    const int64_t channels = call_.count * stride_;
    mean_ = arena.take<C>(channels);
    scale_ = arena.take<C>(channels);
    bias_ = arena.take<C>(channels);
    pull_ = arena.take<C>(channels);
    first_ = arena.take<double>(call_.batch * channels);
    second_ = arena.take<double>(call_.batch * channels);
    grad_ = arena.take<C>(backward ? stride_ : 0);
    back_ = arena.take<C>(backward ? channels : 0);
    grads_ = arena.take<double>(backward ? call_.batch * stride_ : 0);
    copies_ = arena.take<T>(parts_ * call_.tokens * kWidth);
    grad_copies_ = arena.take<C>(backward ? parts_ * call_.tokens * kWidth : 0);
  }

  ChannelNorms<C> channels() const { return {mean_, scale_, bias_, grad_, back_, stride_}; }

  void measure() {
    for_slabs([&](int64_t b, int64_t slab, T* copy, C*) {
      const int64_t n = call_.lengths[b];
      for (int64_t k = 0; k < call_.count; ++k) {
        typename Part::Moments moments;
        read(b, slab, k, copy, moments);
        const int64_t at = (b * call_.count + k) * stride_ + slab * kWidth;
        for (int c = 0; c < kWidth; ++c) {
          first_[at + c] = double(moments.mean[c]) + double(moments.off[c]);
          second_[at + c] = double(moments.variance[c]) * double(n);
        }
      }
    });
    const double over_count = 1 / double(call_.valid());
    for (int64_t i = 0; i < call_.count * stride_; ++i) {
      double mean = 0, squares = 0;
      for (int64_t b = 0; b < call_.batch; ++b)
        if (call_.lengths[b]) mean += first_[of(b, i)] * double(call_.lengths[b]);
      mean *= over_count;
      for (int64_t b = 0; b < call_.batch; ++b) {
        if (!call_.lengths[b]) continue;
        const double apart = first_[of(b, i)] - mean;
        squares += second_[of(b, i)] + double(call_.lengths[b]) * apart * apart;
      }
      const double pull = 1 / ((squares < 0 ? 0 : squares) * over_count + call_.eps);
      const double scale = __builtin_sqrt(pull) * call_.weight;
      mean_[i] = C(mean), scale_[i] = C(scale), pull_[i] = C(pull), bias_[i] = C((double(mean_[i]) - mean) * scale);
    }
  }

  // After measure: the means of the gradient and of its products with the centred layers.
  void project(const MaskTensor<const C>& grad) {
    for_slabs([&](int64_t b, int64_t slab, T* copy, C* g) {
      const int64_t n = call_.lengths[b], left = call_.width - slab * kWidth;
      typename Slab<C, Part::kVectorCount>::Moments of_grad;
      typename Part::Moments unused;
      Slab<C, Part::kVectorCount>::read(grad.row(b, 0) + slab * kWidth, grad.token, n, left, g, of_grad);
      double* sums = grads_ + b * stride_ + slab * kWidth;
      for (int c = 0; c < kWidth; ++c) sums[c] = 0;
      for (int64_t t = 0; t < n; ++t)
        for (int c = 0; c < kWidth; ++c) sums[c] += double(g[t * kWidth + c]);
      for (int64_t k = 0; k < call_.count; ++k) {
        read(b, slab, k, copy, unused);
        const C* mean = mean_ + k * stride_ + slab * kWidth;
        double* products = first_ + (b * call_.count + k) * stride_ + slab * kWidth;
        for (int c = 0; c < kWidth; ++c) products[c] = 0;
        for (int64_t t = 0; t < n; ++t)
          for (int c = 0; c < kWidth; ++c)
            products[c] += double(g[t * kWidth + c]) * double(widen(copy[t * kWidth + c]) - mean[c]);
      }
    });
    const double over_count = 1 / double(call_.valid());
    for (int64_t c = 0; c < stride_; ++c) {
      double sum = 0;
      for (int64_t b = 0; b < call_.batch; ++b) sum += grads_[b * stride_ + c];
      grad_[c] = C(sum * over_count);
      for (int64_t i = c; i < call_.count * stride_; i += stride_) {
        double product = 0;
        for (int64_t b = 0; b < call_.batch; ++b) product += first_[of(b, i)];
        // The mean is rounded; the bias is its error times the scale.
        const double off = scale_[i] != 0 ? -double(bias_[i]) / double(scale_[i]) : 0;
        back_[i] = C((product - off * sum) * over_count * double(pull_[i]));
      }
    }
  }

 private:
  int64_t of(int64_t b, int64_t i) const { return b * call_.count * stride_ + i; }

  void read(int64_t b, int64_t slab, int64_t k, T* copy, typename Part::Moments& moments) const {
    Part::read(call_.layers[k].row(b, 0) + slab * kWidth, call_.layers[k].token, call_.lengths[b],
               call_.width - slab * kWidth, copy, moments);
  }

  template <class F>
  void for_slabs(const F& body) {
    for_each_task(parallel_, parts_, [&](int64_t part) {
      const PartOf items(call_.batch * slabs_, part, parts_);
      const int64_t room = part * call_.tokens * kWidth;
      for (int64_t i = items.begin; i < items.end; ++i)
        body(i / slabs_, i % slabs_, copies_ + room, grad_copies_ ? grad_copies_ + room : nullptr);
    });
  }

  const NormCall<T>& call_;
  const Parallel& parallel_;
  int64_t slabs_, stride_, parts_;
  C *mean_ = nullptr, *scale_ = nullptr, *bias_ = nullptr, *pull_ = nullptr, *grad_ = nullptr, *back_ = nullptr;
  double *first_ = nullptr, *second_ = nullptr, *grads_ = nullptr;
  T* copies_ = nullptr;
  C* grad_copies_ = nullptr;
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
