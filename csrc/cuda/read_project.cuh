// The input's share of the gates for every layer and token at once: one product over all rows of all layers.
//   pre[l, n] = rstd (W * gamma)(phi_l[n] - mean) + bias
#pragma once

#include "cuda/pipeline.cuh"
#include "cuda/read_norm.cuh"

namespace pyeff::gpu {

struct ProjectParams {
  Layers phi;
  const void* weight;  // [columns, ld] of T, zero from `width` on, aligned
  const float *bias, *sums;
  void* pre;           // [layers, tokens, pre_ld] of T with pre_stride numbers from layer to layer
  float *rstd, *mean;  // written (16-bit) or read (float); [layers, tokens] with stats_stride; mean for a layer norm
  int64_t pre_stride, pre_ld, stats_stride, first, tokens, width, ld, columns;
  float eps;
  Norm norm;
  bool pre_aligned;  // its rows start at multiples of 16 bytes
};

// Rows of the output in registers, from the products' sums.
struct RowScale {
  float rstd, mean;
  PYEFF_DEVICE float operator()(float sum, float row_sum, float bias) const {
    // Left out, not multiplied by 0: the sum may have overflowed.
    return rstd == 0.0f ? bias : fmaf(rstd, sum - mean * row_sum, bias);
  }
};

// The tile of a block: 128 rows by kColumns, 8 warps.
template <class T>
struct ProjectTile {
  static constexpr bool kFloat = std::is_same<T, float>::value;
  static constexpr int kRows = 128, kColumns = kFloat ? 64 : 128, kWarpsM = kFloat ? 4 : 2, kStages = 3;
  static constexpr int kMT = kRows / kWarpsM / 16, kNT = kColumns / (8 / kWarpsM) / 8;
  static constexpr int kStage = (kRows + kColumns) * kRowBytes;
  static constexpr int kShared = kStages * kStage + 2 * kRows * static_cast<int>(sizeof(float));
};

// The addresses of the rows that a thread copies: chunk thread % 8 of every 32nd row.
template <class From, int Rows>
struct RowPointers {
  const From* row[Rows / 32];
  float shift[Rows / 32];
  int64_t width;
  uint32_t there = 0;  // a bit for each row
  bool aligned;

  PYEFF_DEVICE RowPointers(const ProjectParams& p, const ReadLayer& layer, int64_t row0, const float* means)
      : width(p.width), aligned(layer.aligned) {
    PYEFF_UNROLL
    for (int i = 0; i < Rows / 32; ++i) {
      const int64_t n = row0 + thread_index() / 8 + 32 * i;
      const bool inside = n < p.tokens;
      there |= uint32_t{inside} << i;
      row[i] = static_cast<const From*>(layer.data) + (inside ? row_offset(layer, p.first + n) : 0);
      shift[i] = inside && means ? load(means + n) : 0.0f;
    }
  }

  template <class T>
  PYEFF_DEVICE void copy(char* panel, int64_t k) const {
    const int chunk = thread_index() % 8;
    k += chunk * kChunk<T>;
    const int left = static_cast<int>(width - k < kChunk<T> ? width - k : kChunk<T>);
    PYEFF_UNROLL
    for (int i = 0; i < Rows / 32; ++i) {
      copy_chunk<T>(panel + chunk_at(thread_index() / 8 + 32 * i, chunk), row[i] + k, there >> i & 1u ? left : 0,
                    aligned, shift[i]);
    }
  }
};

// Rows [row0, row0 + Rows) of an aligned matrix [rows, ld], its columns [k, k + kDepth).
template <class T, int Rows>
PYEFF_DEVICE void copy_panel(char* panel, const T* matrix, int64_t ld, int64_t row0, int64_t rows, int64_t k) {
  const int chunk = thread_index() % 8;
  PYEFF_UNROLL
  for (int i = thread_index() / 8; i < Rows; i += kThreads / 8) {
    const bool there = row0 + i < rows && k + chunk * kChunk<T> < ld;
    copy_async16(panel + chunk_at(i, chunk), matrix + (there ? (row0 + i) * ld + k + chunk * kChunk<T> : 0), there);
  }
}

// The statistics of a block's rows, in shared memory behind the stages: from the sums, or as they were given.
template <class T, int Rows>
PYEFF_DEVICE void share_stats(const ProjectParams& p, RunningStats<T>& running, int64_t row0, float* shared) {
  const int64_t at = block_index_z() * p.stats_stride + row0;
  if constexpr (std::is_same<T, float>::value) {
    const int i = thread_index();
    if (i < Rows) {
      const bool there = p.norm != Norm::none && row0 + i < p.tokens;
      // The rows were centred as they were copied.
      store_shared(shared + i, there ? load(p.rstd + at + i) : 1.0f);
      store_shared(shared + Rows + i, 0.0f);
    }
  } else {
    float rstd = 1.0f, mean = 0.0f;
    const bool centre = p.norm == Norm::layer;
    if (p.norm != Norm::none) running.finish(rstd, mean, p.width, p.eps, centre);
    if (!centre) mean = 0.0f;
    const int i = thread_index() / 2;
    if (thread_index() % 2 == 0 && i < Rows) {
      store_shared(shared + i, rstd);
      store_shared(shared + Rows + i, mean);
      if (block_index_x() == 0 && row0 + i < p.tokens && p.norm != Norm::none) {
        if (p.rstd) store(p.rstd + at + i, rstd);
        if (p.mean) store(p.mean + at + i, mean);
      }
    }
  }
  barrier();
}

template <class T>
PYEFF_DEVICE void store_projected(const ProjectParams& p, int64_t row, int64_t column, const RowScale& scale, float low,
                                  float high) {
  if (row >= p.tokens || column >= p.columns) return;
  const int count = column + 1 < p.columns ? 2 : 1;
  const float row_sum[2] = {load(p.sums + column), count > 1 ? load(p.sums + column + 1) : 0.0f};
  const float bias[2] = {load(p.bias + column), count > 1 ? load(p.bias + column + 1) : 0.0f};
  T* to = static_cast<T*>(p.pre) + block_index_z() * p.pre_stride + row * p.pre_ld + column;
  store_two(to, scale(low, row_sum[0], bias[0]), scale(high, row_sum[1], bias[1]), count, true);
}

template <class T, class From>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1) read_project(const PYEFF_GRID_CONSTANT ProjectParams p) {
  using Tile = ProjectTile<T>;
  const ReadLayer& layer = p.phi.layer[block_index_z()];
  const int64_t row0 = int64_t{block_index_y()} * Tile::kRows, column0 = int64_t{block_index_x()} * Tile::kColumns;
  const bool centre = std::is_same<T, float>::value && p.norm == Norm::layer;
  const RowPointers<From, Tile::kRows> rows(p, layer, row0,
                                            centre ? p.mean + block_index_z() * p.stats_stride : nullptr);
  const int m = warp() % Tile::kWarpsM * (Tile::kMT * 16), n = warp() / Tile::kWarpsM * (Tile::kNT * 8);
  float sums[Tile::kMT][Tile::kNT][4];
  clear(sums);
  RunningStats<T> stats;
  const bool count = !std::is_same<T, float>::value && p.norm != Norm::none;
  run_pipeline<Tile::kStages>(
      static_cast<int>(div_up(p.width, int64_t{kDepth<T>})), Tile::kStage,
      [&](char* stage, int i) {
        const int64_t k = int64_t{i} * kDepth<T>;
        rows.template copy<T>(stage, k);
        copy_panel<T, Tile::kColumns>(stage + Tile::kRows * kRowBytes, static_cast<const T*>(p.weight), p.ld, column0,
                                      p.columns, k);
      },
      [&](const char* stage, int i) {
        multiply<T, Tile::kMT, Tile::kNT, Major::k, Major::k>(sums, stage, m, stage + Tile::kRows * kRowBytes,
                                                              Columns{n, Tile::kNT, 0});
        if constexpr (!std::is_same<T, float>::value) {
          if (count) stats.add(stage, int64_t{i} * kDepth<T>, p.width, p.norm == Norm::layer);
        }
      });
  float* shared = reinterpret_cast<float*>(shared_memory() + Tile::kStages * Tile::kStage);
  share_stats<T, Tile::kRows>(p, stats, row0, shared);
  PYEFF_UNROLL
  for (int i = 0; i < 2 * Tile::kMT; ++i) {
    const int row = m + i * 8 + lane() / 4;
    const RowScale scale{load_shared(shared + row), load_shared(shared + Tile::kRows + row)};
    PYEFF_UNROLL
    for (int j = 0; j < Tile::kNT; ++j) {
      const float* pair = sums[i / 2][j] + (i % 2) * 2;
      store_projected<T>(p, row0 + row, column0 + n + j * 8 + 2 * (lane() % 4), scale, pair[0], pair[1]);
    }
  }
}

}  // namespace pyeff::gpu
