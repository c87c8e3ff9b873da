// The norm in READ: folded into the weights, its statistics, and its derivative.
//   W x = rstd (W * gamma)(phi - mean) + W beta
#pragma once

#include "cuda/read_common.cuh"

namespace pyeff::gpu {

// 1 / sqrt(variance + eps) as the definition's product with phi sees it: a row whose squares overflow is scaled to 0,
// and is NaN where one of its numbers is infinite. A product with rstd = 0 is left out, so that it cannot be inf * 0.
PYEFF_DEVICE float rstd_of(float variance, float eps, bool finite) {
  if (!finite || variance != variance) return float_of(0x7fc00000u);
  if (variance > 3.4e38f) return 0.0f;
  return 1.0f / sqrtf(variance + eps);
}

struct FoldParams {
  const void *w_ih, *gamma, *beta, *b_ih;
  void* folded;  // [rows, ld] of T, zero from `width` on
  float* bias;   // [rows]: b_ih + W beta
  float* sums;   // [rows]: of each folded row
  int64_t width, ld;
};

// A block for each row of W.
template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(128, 1) read_fold(const PYEFF_GRID_CONSTANT FoldParams p) {
  const int row = block_index_x();
  const T* w = static_cast<const T*>(p.w_ih) + row * p.width;
  const T *gamma = static_cast<const T*>(p.gamma), *beta = static_cast<const T*>(p.beta);
  T* folded = static_cast<T*>(p.folded) + row * p.ld;
  float sum = 0.0f, bias = 0.0f;
  for (int64_t k = thread_index(); k < p.ld; k += 128) {
    const bool there = k < p.width;
    const float x = there ? to_float(load(w + k)) : 0.0f;
    const T y = from_float<T>(gamma && there ? x * to_float(load(gamma + k)) : x);
    store(folded + k, y);
    sum += to_float(y);
    if (beta && there) bias = fmaf(x, to_float(load(beta + k)), bias);
  }
  float* shared = reinterpret_cast<float*>(shared_memory());
  sum = block_sum(sum, shared);
  bias = block_sum(bias, shared);
  if (thread_index() == 0) {
    store(p.sums + row, sum);
    store(p.bias + row, bias + (p.b_ih ? to_float(load(static_cast<const T*>(p.b_ih) + row)) : 0.0f));
  }
}

struct StatsParams {
  Layers phi;
  float *rstd, *mean;  // [layers, tokens] with `stride` numbers from layer to layer; mean null without a layer norm
  int64_t stride, first, tokens, width;
  float eps;
};

// Statistics of float rows ahead of the product, which then is of centred rows. A warp for each row.
template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_stats(const PYEFF_GRID_CONSTANT StatsParams p) {
  const int64_t n = int64_t{block_index_x()} * (kThreads / kWarp) + warp();
  if (n >= p.tokens) return;
  const ReadLayer& layer = p.phi.layer[block_index_y()];
  const T* x = static_cast<const T*>(layer.data) + row_offset(layer, p.first + n);
  const float width = static_cast<float>(p.width);
  float mean = 0.0f, square = 0.0f, poison = 0.0f;
  if (p.mean) {
    for (int64_t k = lane(); k < p.width; k += kWarp) mean += to_float(load(x + k));
    mean = warp_sum(mean) / width;
  }
  for (int64_t k = lane(); k < p.width; k += kWarp) {
    const float y = to_float(load(x + k)), centred = y - mean;
    square = fmaf(centred, centred, square);
    poison = fmaf(y, 0.0f, poison);
  }
  square = warp_sum(square) / width, poison = warp_sum(poison);
  if (lane() == 0) {
    const int64_t at = block_index_y() * p.stride + n;
    store(p.rstd + at, rstd_of(square, p.eps, poison == 0.0f && mean - mean == 0.0f));
    if (p.mean) store(p.mean + at, mean);
  }
}

// Sums over a row while its stages pass through shared memory: two threads a row, each with half of the chunks. The
// first number of the row is subtracted from all, so that the variance is no difference of large numbers.
template <class T>
struct RunningStats {
  float shift = 0.0f, sum = 0.0f, square = 0.0f, poison = 0.0f;

  PYEFF_DEVICE void add(const char* panel, int64_t k, int64_t width, bool centre) {
    const int row = thread_index() / 2, half = thread_index() % 2 * 4;
    if (k == 0 && centre) shift = to_float(load_shared(reinterpret_cast<const T*>(panel + chunk_at(row, 0))));
    PYEFF_UNROLL
    for (int chunk = half; chunk < half + 4; ++chunk) {
      const Vec16 v = load_shared16(panel + chunk_at(row, chunk));
      const int64_t left = width - k - chunk * 8;
      PYEFF_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (i >= left) break;
        const float x = i % 2 ? high_of<T>(v.x[i / 2]) : low_of<T>(v.x[i / 2]), y = x - shift;
        sum += y;
        square = fmaf(y, y, square);
        poison = fmaf(x, 0.0f, poison);
      }
    }
  }

  PYEFF_DEVICE void finish(float& rstd, float& mean, int64_t width, float eps, bool centre) {
    sum += shuffle_xor(sum, 1), square += shuffle_xor(square, 1), poison += shuffle_xor(poison, 1);
    const float step = sum / static_cast<float>(width);
    float variance = square / static_cast<float>(width);
    if (centre && variance < 3.4e38f) variance = fmaxf(variance - step * step, 0.0f);
    mean = shift + step;
    rstd = rstd_of(variance, eps, poison == 0.0f && (!centre || mean - mean == 0.0f));
  }
};

struct NormBackwardParams {
  Layers phi;
  void* dphi[kMaxLayers];  // [tokens, width]: da (W * gamma) on entry; null where not wanted
  const float *rstd, *mean;
  int64_t stride, first, tokens, width;
  Norm norm;
};

// dphi in place, a warp for each row:
//   rms    rstd u - phi rstd^3 mean(u phi)
//   layer  rstd (u - mean(u) - x mean(u x)),  x = rstd (phi - mean)
template <class T, class From>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_norm_backward(const PYEFF_GRID_CONSTANT NormBackwardParams p) {
  const int64_t n = int64_t{block_index_x()} * (kThreads / kWarp) + warp();
  T* u = static_cast<T*>(p.dphi[block_index_y()]);
  if (n >= p.tokens || !u) return;
  u += (p.first + n) * p.width;
  const ReadLayer& layer = p.phi.layer[block_index_y()];
  const From* phi = static_cast<const From*>(layer.data) + row_offset(layer, p.first + n);
  const float rstd = load(p.rstd + block_index_y() * p.stride + n);
  const float mean = p.mean ? load(p.mean + block_index_y() * p.stride + n) : 0.0f;
  const float width = static_cast<float>(p.width);
  float mean_u = 0.0f, mean_ux = 0.0f;
  for (int64_t k = lane(); k < p.width; k += kWarp) {
    const float y = to_float(load(u + k));
    mean_u += y;
    mean_ux = fmaf(y, (number_as<T>(phi + k) - mean) * rstd, mean_ux);
  }
  mean_u = p.norm == Norm::layer ? warp_sum(mean_u) / width : 0.0f;
  mean_ux = warp_sum(mean_ux) / width;
  for (int64_t k = lane(); k < p.width; k += kWarp) {
    const float x = (number_as<T>(phi + k) - mean) * rstd;
    const float d = rstd * (to_float(load(u + k)) - mean_u - x * mean_ux);
    store(u + k, from_float<T>(rstd == 0.0f ? 0.0f : d));
  }
}

}  // namespace pyeff::gpu
