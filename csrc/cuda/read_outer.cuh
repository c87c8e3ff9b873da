// The weights' gradients: products over all tokens of all layers, split over the tokens into partial sums of fixed
// bounds that are added in order afterwards.
//   S = sum_{l,n} da^T ((phi - mean) rstd)      and      dR = sum_{l,n} da^T h_{l-1}
// The normalised rows are rounded to the number type, as the definition rounds them: they are of the size of 1, whereas
// da rstd may leave the range of float16.
#pragma once

#include "cuda/pipeline.cuh"
#include "cuda/read_common.cuh"

namespace pyeff::gpu {

struct OuterParams {
  Layers rows;               // phi, or the states before; data null: zeros
  const void* da;            // [layers, tokens, derivatives, padded] of T, with da_stride
  const float *rstd, *mean;  // [layers, tokens] with stats_stride, or null
  float* partial;            // [splits, gates * padded, width]
  float* bias;               // [splits, gates * padded]: sums of da
  int64_t da_stride, da_ld, stats_stride, layers, tokens, first, width, padded;
  int gates, splits;
  bool recurrent_n;  // the GRU's last block of gates is the fourth of da
  bool accumulate;
};

template <class T>
struct OuterTile {
  static constexpr int kRows = 128, kColumns = 128, kMT = 4, kNT = 4, kStages = 3;
  static constexpr int kStage = (kRows + kColumns) * kRowBytes;
  static constexpr int kScales = kStages * kDepth<T> * static_cast<int>(sizeof(float));
  static constexpr int kShared = kStages * kStage + 2 * kScales;
};

// Normalises fragments of the rows, with a stage's statistics in shared memory.
template <class T>
struct Normalize {
  const float *rstd, *mean;  // of the stage's tokens; rstd null: as they are

  PYEFF_DEVICE void operator()(uint32_t (&r)[2], int k) const {
    if (!rstd) return;
    PYEFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int at = k + 2 * (lane() % 4) + 8 * i;
      const float low = (low_of<T>(r[i]) - load_shared(mean + at)) * load_shared(rstd + at);
      const float high = (high_of<T>(r[i]) - load_shared(mean + at + 1)) * load_shared(rstd + at + 1);
      r[i] = pack2<T>(low, high);
    }
  }
  PYEFF_DEVICE void operator()(float (&x)[4], int k) const {
    if (!rstd) return;
    PYEFF_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = (x[i] - load_shared(mean + k + i)) * load_shared(rstd + k + i);
  }
};

// A step of the product: kDepth<T> tokens of one layer.
template <class T>
struct OuterStep {
  int64_t layer, token;
  PYEFF_DEVICE OuterStep(const OuterParams& p, int64_t step) {
    const int64_t of_layer = div_up(p.tokens, int64_t{kDepth<T>});
    layer = step / of_layer;
    token = step % of_layer * kDepth<T>;
  }
};

// One stage: 128 columns of da and as many of the rows as the tile has, each for kDepth<T> tokens.
template <class T, class From, int Columns>
PYEFF_DEVICE void copy_outer(const OuterParams& p, char* stage, const OuterStep<T>& step, int64_t row0,
                             int64_t column0) {
  constexpr int kRows = 128, kLeft = kRows / kChunk<T>, kRight = Columns / kChunk<T>, kPanel = kDepth<T> * kRowBytes;
  const T* da = static_cast<const T*>(p.da) + step.layer * p.da_stride;
  const int64_t all = p.gates * p.padded;
  for (int i = thread_index(); i < kDepth<T> * kLeft; i += kThreads) {
    const int k = i / kLeft, chunk = i % kLeft;
    const int64_t n = step.token + k, row = row0 + chunk * kChunk<T>;
    const bool there = n < p.tokens && row < all;
    const int64_t from = p.recurrent_n && row >= 2 * p.padded ? row + p.padded : row;
    copy_async16(stage + chunk / 8 * kPanel + chunk_at(k, chunk % 8), da + (there ? n * p.da_ld + from : 0), there);
  }
  const ReadLayer& rows = p.rows.layer[step.layer];
  for (int i = thread_index(); i < kDepth<T> * kRight; i += kThreads) {
    const int k = i / kRight, chunk = i % kRight;
    const int64_t n = step.token + k, column = column0 + chunk * kChunk<T>;
    const bool there = n < p.tokens && rows.data && column < p.width;
    const int left = static_cast<int>(p.width - column < kChunk<T> ? p.width - column : kChunk<T>);
    // Where there is nothing to copy, da stands for an address that is not read.
    const From* source = there ? static_cast<const From*>(rows.data) + row_offset(rows, p.first + n) + column
                               : reinterpret_cast<const From*>(da);
    copy_chunk<T>(stage + kRows * kRowBytes + chunk / 8 * kPanel + chunk_at(k, chunk % 8), source, there ? left : 0,
                  rows.aligned);
  }
}

// Column sums of da, by the blocks of the first columns: each thread adds one chunk of every kGroups-th token.
template <class T>
struct OuterSums {
  static constexpr int kChunks = OuterTile<T>::kRows / kChunk<T>, kGroups = kThreads / kChunks;
  float bias[kChunk<T>] = {};

  PYEFF_DEVICE void add(const char* stage) {
    const int chunk = thread_index() % kChunks;
    for (int k = thread_index() / kChunks; k < kDepth<T>; k += kGroups) {
      const Vec16 v = load_shared16(stage + chunk / 8 * (kDepth<T> * kRowBytes) + chunk_at(k, chunk % 8));
      PYEFF_UNROLL
      for (int i = 0; i < kChunk<T>; ++i) {
        if constexpr (sizeof(T) == 4) {
          bias[i] += float_of(v.x[i]);
        } else {
          bias[i] += i % 2 ? high_of<T>(v.x[i / 2]) : low_of<T>(v.x[i / 2]);
        }
      }
    }
  }

  // Over the groups, in order. The stages are free.
  PYEFF_DEVICE void finish(const OuterParams& p, int64_t row0) {
    constexpr int kRows = OuterTile<T>::kRows;
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int group = thread_index() / kChunks, column = thread_index() % kChunks * kChunk<T>;
    PYEFF_UNROLL
    for (int i = 0; i < kChunk<T>; ++i) store_shared(shared + group * kRows + column + i, bias[i]);
    barrier();
    const int64_t row = row0 + thread_index(), all = p.gates * p.padded;
    if (thread_index() >= kRows || row >= all) return;
    float* to = p.bias + block_index_z() * all + row;
    float sum = p.accumulate ? load(to) : 0.0f;
    for (int i = 0; i < kGroups; ++i) sum += load_shared(shared + i * kRows + thread_index());
    store(to, sum);
  }
};

template <class T, class From>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_outer(const PYEFF_GRID_CONSTANT OuterParams p) {
  using Tile = OuterTile<T>;
  const int64_t column0 = int64_t{block_index_x()} * Tile::kColumns, row0 = int64_t{block_index_y()} * Tile::kRows;
  const int64_t steps = p.layers * div_up(p.tokens, int64_t{kDepth<T>});
  const int64_t begin = steps * block_index_z() / p.splits, end = steps * (block_index_z() + 1) / p.splits;
  float* scales = reinterpret_cast<float*>(shared_memory() + Tile::kStages * Tile::kStage);
  float* means = scales + Tile::kStages * kDepth<T>;
  const int m = warp() % 2 * 64, n = warp() / 2 * 32;
  float sums[Tile::kMT][Tile::kNT][4];
  clear(sums);
  OuterSums<T> columns;
  // A token's statistics are asked for a step before they are put into shared memory.
  float rstd = 0.0f, mean = 0.0f;
  const auto ask = [&](int64_t i) {
    const OuterStep<T> step(p, i);
    const int64_t token = step.token + thread_index();
    const bool there = p.rstd && i < end && thread_index() < kDepth<T> && token < p.tokens;
    rstd = there ? load(p.rstd + step.layer * p.stats_stride + token) : 0.0f;
    mean = there && p.mean ? load(p.mean + step.layer * p.stats_stride + token) : 0.0f;
  };
  ask(begin);
  run_pipeline<Tile::kStages>(
      static_cast<int>(end - begin), Tile::kStage,
      [&](char* stage, int i) {
        copy_outer<T, From, Tile::kColumns>(p, stage, OuterStep<T>(p, begin + i), row0, column0);
        if (p.rstd && thread_index() < kDepth<T>) {
          store_shared(scales + i % Tile::kStages * kDepth<T> + thread_index(), rstd);
          store_shared(means + i % Tile::kStages * kDepth<T> + thread_index(), mean);
        }
        ask(begin + i + 1);
      },
      [&](const char* stage, int i) {
        const int at = i % Tile::kStages * kDepth<T>;
        multiply<T, Tile::kMT, Tile::kNT, Major::mn, Major::mn>(
            sums, stage, m, stage + Tile::kRows * kRowBytes, Columns{n, Tile::kNT, 0},
            Normalize<T>{p.rstd ? scales + at : nullptr, means + at});
        if (block_index_x() == 0) columns.add(stage);
      });
  const int64_t all = p.gates * p.padded;
  float* to = p.partial + block_index_z() * all * p.width;
  PYEFF_UNROLL
  for (int i = 0; i < 2 * Tile::kMT; ++i) {
    const int64_t row = row0 + m + i * 8 + lane() / 4;
    PYEFF_UNROLL
    for (int j = 0; j < 2 * Tile::kNT; ++j) {
      const int64_t column = column0 + n + j / 2 * 8 + 2 * (lane() % 4) + j % 2;
      if (row >= all || column >= p.width) continue;
      float* at = to + row * p.width + column;
      store(at, sums[i / 2][j / 2][i % 2 * 2 + j % 2] + (p.accumulate ? load(at) : 0.0f));
    }
  }
  if (block_index_x() == 0) {
    barrier();
    columns.finish(p, row0);
  }
}

struct FinishParams {
  const float *partial, *bias;   // as read_outer leaves them
  const void *gamma, *beta, *w;  // for the input's weights: [width], [width], [rows, width]; or null
  void *dw, *db;                 // [rows, width], [rows]; null where not wanted
  float *dgamma, *dbeta;         // [row groups, width] or null
  int64_t rank, padded, width;
  int gates, splits;
};

// Rows of a weight that one block finishes.
constexpr int kFinishRows = 16;

// dW = S gamma + db beta;  sums over the block's rows of W S and W db.  A thread for each column.
template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_finish(const PYEFF_GRID_CONSTANT FinishParams p) {
  const int64_t column = int64_t{block_index_x()} * kThreads + thread_index(), rows = p.gates * p.rank;
  const int64_t all = p.gates * p.padded;
  const bool there = column < p.width;
  const float gamma = p.gamma && there ? to_float(load(static_cast<const T*>(p.gamma) + column)) : 1.0f;
  const float beta = p.beta && there ? to_float(load(static_cast<const T*>(p.beta) + column)) : 0.0f;
  float dgamma = 0.0f, dbeta = 0.0f;
  for (int i = 0; i < kFinishRows; ++i) {
    const int64_t row = int64_t{block_index_y()} * kFinishRows + i;
    if (row >= rows) break;
    const int64_t from = row / p.rank * p.padded + row % p.rank;
    float sum = 0.0f, bias = 0.0f;
    for (int split = 0; split < p.splits; ++split) {
      if (there) sum += load(p.partial + (split * all + from) * p.width + column);
      bias += load(p.bias + split * all + from);
    }
    if (p.db && column == 0) store(static_cast<T*>(p.db) + row, from_float<T>(bias));
    if (!there) continue;
    if (p.dw) store(static_cast<T*>(p.dw) + row * p.width + column, from_float<T>(fmaf(sum, gamma, bias * beta)));
    if (p.dgamma || p.dbeta) {
      const float w = to_float(load(static_cast<const T*>(p.w) + row * p.width + column));
      dgamma = fmaf(w, sum, dgamma);
      dbeta = fmaf(w, bias, dbeta);
    }
  }
  if (there && p.dgamma) store(p.dgamma + block_index_y() * p.width + column, dgamma);
  if (there && p.dbeta) store(p.dbeta + block_index_y() * p.width + column, dbeta);
}

struct NormGradParams {
  const float *dgamma, *dbeta;  // [groups, width] or null
  void *dnorm_weight, *dnorm_bias;
  int64_t groups, width;
};

template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_norm_grads(const PYEFF_GRID_CONSTANT NormGradParams p) {
  const int64_t column = int64_t{block_index_x()} * kThreads + thread_index();
  if (column >= p.width) return;
  float gamma = 0.0f, beta = 0.0f;
  for (int64_t i = 0; i < p.groups; ++i) {
    if (p.dgamma) gamma += load(p.dgamma + i * p.width + column);
    if (p.dbeta) beta += load(p.dbeta + i * p.width + column);
  }
  if (p.dnorm_weight) store(static_cast<T*>(p.dnorm_weight) + column, from_float<T>(gamma));
  if (p.dnorm_bias) store(static_cast<T*>(p.dnorm_bias) + column, from_float<T>(beta));
}

}  // namespace pyeff::gpu
