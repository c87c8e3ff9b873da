// The bias of distances and the moving average: every thread has several neighbouring numbers, all of its loads are on
// their way before the first is used. The kernel that draws masks is in multimask_draw.cuh.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/multimask_plan.h"

namespace pyeff::gpu {

constexpr int kPlanNumbers = 8;  // of a thread, side by side
constexpr int kBiasBlock = kThreads * kPlanNumbers;

// Eight numbers of T side by side, of which `count` exist; `vector`: they begin at a multiple of 16 bytes.
template <class T>
PYEFF_DEVICE void load_eight(float (&x)[kPlanNumbers], const T* p, int count, bool vector) {
  if (vector && count >= kPlanNumbers) {
    PYEFF_UNROLL
    for (int i = 0; i < kPlanNumbers; i += 16 / static_cast<int>(sizeof(T))) {
      const Vec16 four = load16(p + i);
      PYEFF_UNROLL
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          x[i + j] = float_of(four.x[j]);
        } else {
          x[i + 2 * j] = low_of<T>(four.x[j]), x[i + 2 * j + 1] = high_of<T>(four.x[j]);
        }
      }
    }
    return;
  }
  PYEFF_UNROLL
  for (int i = 0; i < kPlanNumbers; ++i) x[i] = i < count ? to_float(load(p + i)) : 0.0f;
}

template <class T>
PYEFF_DEVICE void store_eight(T* p, const float (&x)[kPlanNumbers], int count, bool vector) {
  if (vector && count >= kPlanNumbers) {
    PYEFF_UNROLL
    for (int i = 0; i < kPlanNumbers; i += 16 / static_cast<int>(sizeof(T))) {
      Vec16 four;
      PYEFF_UNROLL
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          four.x[j] = bits_of(x[i + j]);
        } else {
          four.x[j] = pack2<T>(x[i + 2 * j], x[i + 2 * j + 1]);
        }
      }
      store16(p + i, four);
    }
    return;
  }
  PYEFF_UNROLL
  for (int i = 0; i < kPlanNumbers; ++i)
    if (i < count) store(p + i, from_float<T>(x[i]));
}

struct MultimaskBiasParams {
  const int32_t *ids_keep, *keep_len;
  const float* slopes;
  const void* grad;
  void* out;
  float* partial;  // [heads, blocks]
  int64_t rows;
  int slots, heads, prefix, across, each;  // blocks of a row, heads of a block
  bool vector;
};

// The places of a thread in the [K, K] of a row, and what their distances are.
struct BiasPlaces {
  int64_t row;
  int first, count;
  float distance[kPlanNumbers];
  uint32_t forbidden = 0;

  PYEFF_DEVICE explicit BiasPlaces(const MultimaskBiasParams& p) {
    row = block_index_x() / p.across;
    const int area = p.slots * p.slots;
    const int64_t begin = int64_t{block_index_x() % p.across} * kBiasBlock + thread_index() * kPlanNumbers;
    count = static_cast<int>(begin < area ? area - begin : 0);
    count = count < kPlanNumbers ? count : kPlanNumbers;
    first = count > 0 ? static_cast<int>(begin) : 0;
    const int kept = load(p.keep_len + row);
    const int32_t* ids = p.ids_keep + row * p.slots;
    int i = static_cast<int>(static_cast<unsigned>(first) / static_cast<unsigned>(p.slots)), j = first - i * p.slots;
    PYEFF_UNROLL
    for (int n = 0; n < kPlanNumbers; ++n) {
      distance[n] = 0.0f;
      if (n < count) {
        if (i >= p.prefix && j >= p.prefix && i < kept && j < kept) {
          // Of any two numbers of 32 bits.
          const int64_t gap = int64_t{load(ids + i)} - load(ids + j);
          distance[n] = static_cast<float>(gap < 0 ? -gap : gap);
        }
        if (kept > 0 && j >= kept) forbidden |= 1u << n;
      }
      if (++j == p.slots) j = 0, ++i;
    }
  }
};

template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 4)
    multimask_bias_kernel(const PYEFF_GRID_CONSTANT MultimaskBiasParams p) {
  const BiasPlaces at(p);
  if (at.count == 0) return;
  const int begin = block_index_y() * p.each, stop = begin + p.each < p.heads ? begin + p.each : p.heads;
  const int64_t area = int64_t{p.slots} * p.slots;
  for (int h = begin; h < stop; ++h) {
    const float slope = -load(p.slopes + h);
    float bias[kPlanNumbers];
    PYEFF_UNROLL
    for (int n = 0; n < kPlanNumbers; ++n)
      bias[n] = at.forbidden >> n & 1 ? float_of(0xff800000u) : slope * at.distance[n];
    store_eight(static_cast<T*>(p.out) + (at.row * p.heads + h) * area + at.first, bias, at.count, p.vector);
  }
}

template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 4)
    multimask_bias_backward_kernel(const PYEFF_GRID_CONSTANT MultimaskBiasParams p) {
  const BiasPlaces at(p);
  const int begin = block_index_y() * p.each, stop = begin + p.each < p.heads ? begin + p.each : p.heads;
  const int64_t area = int64_t{p.slots} * p.slots;
  float* sums = reinterpret_cast<float*>(shared_memory());  // [each, warps]
  constexpr int kWarps = kThreads / kWarp;
  for (int h = begin; h < stop; ++h) {
    float g[kPlanNumbers] = {}, sum = 0.0f;
    if (at.count > 0)
      load_eight(g, static_cast<const T*>(p.grad) + (at.row * p.heads + h) * area + at.first, at.count, p.vector);
    // What has no distance has no gradient, whatever came there.
    PYEFF_UNROLL
    for (int n = 0; n < kPlanNumbers; ++n)
      if (at.distance[n] > 0.0f) sum -= g[n] * at.distance[n];
    sum = warp_sum(sum);
    if (lane() == 0) store_shared(sums + (h - begin) * kWarps + warp(), sum);
  }
  barrier();
  for (int h = thread_index(); h < stop - begin; h += kThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += load_shared(sums + h * kWarps + w);
    store(p.partial + int64_t{begin + h} * grid_size_x() + block_index_x(), sum);
  }
}

struct MultimaskBiasSumParams {
  const float* partial;
  float* to;
  int64_t parts;
};

// The parts of one head a block.
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_bias_sum_kernel(const PYEFF_GRID_CONSTANT MultimaskBiasSumParams p) {
  const float* from = p.partial + block_index_x() * p.parts;
  float sum = 0.0f;
  for (int64_t i = thread_index(); i < p.parts; i += kThreads) sum += load(from + i);
  sum = block_sum(sum, reinterpret_cast<float*>(shared_memory()));
  if (thread_index() == 0) store(p.to + block_index_x(), sum);
}

// As many tensors as the parameters of one launch hold, which are 4 KB; each has blocks of its own.
constexpr int kEmaTensors = 100, kEmaSeveral = 2, kEmaBlock = kThreads * kPlanNumbers * kEmaSeveral;

struct MultimaskEmaParams {
  struct Entry {
    void* ema;
    const void* param;
    void* copy;
    int64_t count;
  };
  Entry entries[kEmaTensors];
  int first[kEmaTensors + 1];  // block of each
  uint8_t kinds[kEmaTensors];  // Number of ema, param and copy, two bits each, and whether all are aligned
  int tensors;
  const double* decay;
};
static_assert(sizeof(MultimaskEmaParams) <= 4096, "the parameters of a launch are at most 4 KB");

PYEFF_DEVICE void load_eight_of(int number, float (&x)[kPlanNumbers], const void* p, int64_t at, int count,
                                bool vector) {
  if (number == static_cast<int>(Number::f32)) {
    load_eight(x, static_cast<const float*>(p) + at, count, vector);
  } else if (number == static_cast<int>(Number::bf16)) {
    load_eight(x, static_cast<const bf16*>(p) + at, count, vector);
  } else {
    load_eight(x, static_cast<const f16*>(p) + at, count, vector);
  }
}
PYEFF_DEVICE void store_eight_of(int number, void* p, int64_t at, const float (&x)[kPlanNumbers], int count,
                                 bool vector) {
  if (number == static_cast<int>(Number::f32)) {
    store_eight(static_cast<float*>(p) + at, x, count, vector);
  } else if (number == static_cast<int>(Number::bf16)) {
    store_eight(static_cast<bf16*>(p) + at, x, count, vector);
  } else {
    store_eight(static_cast<f16*>(p) + at, x, count, vector);
  }
}

// Number types are told as the kernel runs: a block has one tensor, so that no warp goes two ways.
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_ema_kernel(const PYEFF_GRID_CONSTANT MultimaskEmaParams p) {
  int tensor = 0;
  for (int step = 64; step > 0; step /= 2)
    if (tensor + step < p.tensors && p.first[tensor + step] <= block_index_x()) tensor += step;
  const MultimaskEmaParams::Entry& entry = p.entries[tensor];
  const int kinds = p.kinds[tensor], ema = kinds & 3, param = kinds >> 2 & 3, copy = kinds >> 4 & 3;
  const bool vector = (kinds >> 6 & 1) != 0;
  const double decay = load(p.decay);
  const float keep = static_cast<float>(decay), rest = static_cast<float>(1.0 - decay);
  const int64_t begin = int64_t{block_index_x() - p.first[tensor]} * kEmaBlock + thread_index() * kPlanNumbers;
  float x[kEmaSeveral][kPlanNumbers], y[kEmaSeveral][kPlanNumbers];
  PYEFF_UNROLL
  for (int i = 0; i < kEmaSeveral; ++i) {
    const int64_t at = begin + i * kThreads * kPlanNumbers, left = entry.count - at;
    if (left <= 0) continue;
    const int count = left < kPlanNumbers ? static_cast<int>(left) : kPlanNumbers;
    load_eight_of(ema, x[i], entry.ema, at, count, vector);
    load_eight_of(param, y[i], entry.param, at, count, vector);
  }
  PYEFF_UNROLL
  for (int i = 0; i < kEmaSeveral; ++i) {
    const int64_t at = begin + i * kThreads * kPlanNumbers, left = entry.count - at;
    if (left <= 0) continue;
    const int count = left < kPlanNumbers ? static_cast<int>(left) : kPlanNumbers;
    PYEFF_UNROLL
    for (int n = 0; n < kPlanNumbers; ++n) x[i][n] = keep * x[i][n] + rest * y[i][n];
    store_eight_of(ema, entry.ema, at, x[i], count, vector);
    if (entry.copy) store_eight_of(copy, entry.copy, at, x[i], count, vector);
  }
}

}  // namespace pyeff::gpu
