// Teacher targets: layers, each normalised, are added where they lie on the chip.
#pragma once

#include "cuda/multimask_chunk.cuh"

namespace pyeff::gpu {

// Layers of one launch; more of them are added by further launches.
constexpr int kTargetsLayers = 32;

struct MultimaskTargetsParams {
  MultimaskRows layers[kTargetsLayers];
  const int32_t* lengths;
  float* out;          // [B, T, D]
  const float* stats;  // [layers, samples or 1, 3, D]: means, what they lack, and what to multiply with; or null
  int64_t batch, tokens;
  int64_t stats_layer, stats_sample;  // distances
  int count, width, units;
  float eps, weight;
  bool accumulate;
};

// Numbers of a slice of which a thread has every so manieth token, and one chunk of channels.
template <class T, bool Vector, int Columns>
struct TargetsTile {
  static constexpr int kNumbers = kMaskChunk<T, Vector>, kRows = 8, kLanes = kThreads / Columns;
  static constexpr int kTokens = kRows * kLanes, kWarps = kThreads / kWarp;
  static constexpr int kSums = (kWarps + 1) * Columns * kNumbers * static_cast<int>(sizeof(float));
  static constexpr int kSlots = kThreads * static_cast<int>(sizeof(Vec16));
  // Two stages of as many rows as there are tokens.
  static constexpr int shared(int64_t tokens) {
    return kSums + 2 * static_cast<int>((tokens + kLanes - 1) / kLanes) * kSlots;
  }
};

// Adds over the tokens of a block: threads of the same column, in a fixed order. Every thread gets the sums of its own
// column. `shared` has a place for each warp's sums and for the whole.
template <int N, int Columns>
PYEFF_DEVICE void column_sums(float (&x)[N], float* shared) {
  constexpr int kWarps = kThreads / kWarp, kAll = Columns * N;
  PYEFF_UNROLL
  for (int mask = Columns; mask < kWarp; mask *= 2) {
    PYEFF_UNROLL
    for (int j = 0; j < N; ++j) x[j] += shuffle_xor(x[j], mask);
  }
  PYEFF_UNROLL
  for (int j = 0; j < N; ++j)
    if (lane() < Columns) store_shared(shared + warp() * kAll + lane() * N + j, x[j]);
  barrier();
  if (thread_index() < kAll) {
    float sum = 0.0f;
    PYEFF_UNROLL
    for (int w = 0; w < kWarps; ++w) sum += load_shared(shared + w * kAll + thread_index());
    store_shared(shared + kWarps * kAll + thread_index(), sum);
  }
  barrier();
  PYEFF_UNROLL
  for (int j = 0; j < N; ++j) x[j] = load_shared(shared + kWarps * kAll + lane() % Columns * N + j);
}

// Of some tokens, for each channel: the mean, what it has been rounded by, and the sum of squares about both. Numbers
// of 16 bits are never so close together that what is lost of a mean mattered.
template <int N>
struct Moments {
  float mean[N], rest[N], squares[N];
};

// Of the tokens that `of(i, x)` has, `count` in the block: it fills x and says whether there are any.
template <class T, int N, int Columns, int Rows, class Of>
PYEFF_DEVICE void slice_moments(Moments<N>& m, int count, float* shared, const Of& of) {
  const float share = 1.0f / static_cast<float>(count > 0 ? count : 1);
  m = {};
  PYEFF_UNROLL
  for (int i = 0; i < Rows; ++i) {
    float x[N];
    if (!of(i, x)) continue;
    PYEFF_UNROLL
    for (int j = 0; j < N; ++j) m.mean[j] += x[j];
  }
  column_sums<N, Columns>(m.mean, shared);
  PYEFF_UNROLL
  for (int j = 0; j < N; ++j) m.mean[j] *= share;
  PYEFF_UNROLL
  for (int i = 0; i < Rows; ++i) {
    float x[N];
    if (!of(i, x)) continue;
    PYEFF_UNROLL
    for (int j = 0; j < N; ++j) {
      const float d = x[j] - m.mean[j];
      if constexpr (sizeof(T) == 4) m.rest[j] += d;
      m.squares[j] = fmaf(d, d, m.squares[j]);
    }
  }
  column_sums<N, Columns>(m.squares, shared);
  if constexpr (sizeof(T) == 4) {
    column_sums<N, Columns>(m.rest, shared);
    PYEFF_UNROLL
    for (int j = 0; j < N; ++j) {
      m.squares[j] -= m.rest[j] * m.rest[j] * share;
      m.rest[j] *= share;
    }
  }
}

// What a mean leaves of a number.
template <class T>
PYEFF_DEVICE float centred(float x, float mean, float rest) {
  return sizeof(T) == 4 ? x - mean - rest : x - mean;
}

// Where a thread of a slice is.
template <class T, bool Vector, int Columns>
struct TargetsPlace {
  using Tile = TargetsTile<T, Vector, Columns>;
  int64_t outer;  // what the blocks of all channels share
  int row, column, left;

  PYEFF_DEVICE TargetsPlace(int units, int width) {
    const int groups = div_up(units, Columns);
    outer = block_index_x() / groups;
    row = thread_index() / Columns;
    column =
        ((block_index_x() - static_cast<int>(outer * groups)) * Columns + thread_index() % Columns) * Tile::kNumbers;
    left = width - column;
  }
};

// No load moves over this place: the compiler would begin with all of them, and has no registers for it.
PYEFF_DEVICE void keep_order() {
#ifdef __CUDA_ARCH__
  asm volatile("" ::: "memory");
#endif
}

// Instance norm: a block has all tokens of a sample for some channels, and its sums stay in registers for all layers.
// The next layer is copied meanwhile; a thread reads only what it copied itself.
template <class T, bool Vector, int Columns>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_targets_slice(const PYEFF_GRID_CONSTANT MultimaskTargetsParams p) {
  using Tile = TargetsTile<T, Vector, Columns>;
  constexpr int N = Tile::kNumbers, R = Tile::kRows;
  const TargetsPlace<T, Vector, Columns> at(p.units, p.width);
  const int length = clamped_length(p.lengths, at.outer, p.tokens), left = at.left;
  float* sums = reinterpret_cast<float*>(shared_memory());
  char* stages = shared_memory() + Tile::kSums + thread_index() * static_cast<int>(sizeof(Vec16));
  const int stage_bytes = static_cast<int>(div_up(p.tokens, int64_t{Tile::kLanes})) * Tile::kSlots;
  const auto token = [&](int i) { return i * Tile::kLanes + at.row; };
  const auto here = [&](int i) { return token(i) < length && left > 0; };
  const auto copy = [&](int k) {
    const MultimaskRows& layer = p.layers[k];
    const T* from = static_cast<const T*>(layer.data) + at.outer * layer.outer + at.row * layer.inner + at.column;
    char* to = stages + k % 2 * stage_bytes;
    PYEFF_NO_UNROLL
    for (int i = 0; i < R; ++i, from += Tile::kLanes * layer.inner, to += Tile::kSlots) {
      if (!here(i)) break;
      if constexpr (Vector) {
        copy_async16(to, from, true);
      } else {
        Piece<T, false> piece;
        float x[4];
        piece.read(from, left);
        piece.numbers(x);
        store_shared16(to, {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}});
      }
    }
    copy_async_commit();
  };
  float sum[R][N] = {};
  copy(0);
  PYEFF_NO_UNROLL
  for (int k = 0; k < p.count; ++k) {
    if (k + 1 < p.count) {
      copy(k + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    const char* stage = stages + k % 2 * stage_bytes;
    const auto of = [&](int i, float (&x)[N]) {
      if (i % 2 == 0) keep_order();
      if (!here(i)) return false;
      Piece<std::conditional_t<Vector, T, float>, true> piece;
      piece.bits = load_shared16(stage + i * Tile::kSlots);
      piece.numbers(x);
      return true;
    };
    Moments<N> m;
    slice_moments<T, N, Columns, R>(m, length, sums, of);
    const float share = 1.0f / static_cast<float>(length > 0 ? length : 1);
    PYEFF_UNROLL
    for (int j = 0; j < N; ++j) m.squares[j] = rsqrt(fmaf(m.squares[j], share, p.eps));
    PYEFF_UNROLL
    for (int i = 0; i < R; ++i) {
      float x[N];
      of(i, x);
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) sum[i][j] = fmaf(centred<T>(x[j], m.mean[j], m.rest[j]), m.squares[j], sum[i][j]);
    }
  }
  float* out = p.out + at.outer * p.tokens * p.width + at.column;
  PYEFF_UNROLL
  for (int i = 0; i < R; ++i) {
    if (token(i) >= p.tokens || left <= 0 || (p.accumulate && !here(i))) continue;
    float* to = out + token(i) * int64_t{p.width};
    float x[N] = {};
    if (p.accumulate) read_floats<N, Vector>(x, to, left);
    PYEFF_UNROLL
    for (int j = 0; j < N; ++j) x[j] = here(i) ? fmaf(p.weight, sum[i][j], x[j]) : 0.0f;
    write_floats<N, Vector>(to, x, left);
  }
}

// Tokens of a block of the two-stage statistics, and blocks to a sample.
using TargetsPart = TargetsTile<float, true, 8>;
inline int64_t targets_parts(int64_t tokens) { return div_up(tokens, int64_t{TargetsPart::kTokens}); }
PYEFF_DEVICE int tokens_of_part(int length, int64_t part) {
  const int64_t left = length - part * TargetsPart::kTokens;
  return left < 0 ? 0 : left > TargetsPart::kTokens ? TargetsPart::kTokens : static_cast<int>(left);
}

// A chunk of channels of a layer's statistics.
template <class T, bool Vector>
struct TargetsStats {
  static constexpr int N = kMaskChunk<T, Vector>;
  float mean[N], rest[N] = {}, factor[N];

  PYEFF_DEVICE TargetsStats(const float* from, int64_t width, int left) {
    read_floats<N, Vector>(mean, from, left);
    if constexpr (sizeof(T) == 4) read_floats<N, Vector>(rest, from + width, left);
    read_floats<N, Vector>(factor, from + 2 * width, left);
  }
  PYEFF_DEVICE TargetsStats(const MultimaskTargetsParams& p, int64_t k, int64_t sample, int column, int left)
      : TargetsStats(p.stats + k * p.stats_layer + sample * p.stats_sample + column, p.width, left) {}
  PYEFF_DEVICE float normal(float x, int j) const { return centred<T>(x, mean[j], rest[j]) * factor[j]; }
};

struct MultimaskStatsParams {
  MultimaskTargetsParams p;
  float* partial;      // [layers, samples, parts, 3, D]
  MultimaskRows grad;  // of the backward
  float* to;           // [layers, samples or 1, 3, D]
  int64_t parts;
  bool all;  // samples together
};

// The first stage: the mean and the squares about it of a part of a sample; or, of a gradient, its sum and the sum of
// its products with what was normalised.
template <class T, bool Vector, bool Gradient>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_targets_part(const PYEFF_GRID_CONSTANT MultimaskStatsParams s) {
  constexpr int kColumns = 8;
  using Tile = TargetsTile<T, Vector, kColumns>;
  constexpr int N = Tile::kNumbers, R = Tile::kRows;
  const MultimaskTargetsParams& p = s.p;
  const TargetsPlace<T, Vector, kColumns> at(p.units, p.width);
  const int k = block_index_y(), left = at.left;
  const int64_t sample = at.outer / s.parts, part = at.outer - sample * s.parts;
  const int count = tokens_of_part(clamped_length(p.lengths, sample, p.tokens), part);
  const int64_t first = part * Tile::kTokens;
  const auto token = [&](int i) { return i * Tile::kLanes + at.row; };
  Piece<T, Vector> piece[R];
  PYEFF_UNROLL
  for (int i = 0; i < R; ++i) {
    if (token(i) < count && left > 0)
      piece[i].read(static_cast<const T*>(p.layers[k].data) + sample * p.layers[k].outer +
                        (first + token(i)) * p.layers[k].inner + at.column,
                    left);
  }
  Moments<N> m;
  float* shared = reinterpret_cast<float*>(shared_memory());
  if constexpr (!Gradient) {
    slice_moments<T, N, kColumns, R>(m, count, shared, [&](int i, float (&x)[N]) {
      piece[i].numbers(x);
      return token(i) < count && left > 0;
    });
  } else {
    // Threads past the last channel have some column, too.
    const TargetsStats<T, Vector> stats(p, k, sample, left > 0 ? at.column : 0, left);
    m = {};
    PYEFF_UNROLL
    for (int i = 0; i < R; ++i) {
      if (token(i) >= count || left <= 0) continue;
      float x[N], g[N];
      piece[i].numbers(x);
      read_floats<N, Vector>(g,
                             static_cast<const float*>(s.grad.data) + sample * s.grad.outer +
                                 (first + token(i)) * s.grad.inner + at.column,
                             left);
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) m.mean[j] += g[j], m.squares[j] = fmaf(g[j], stats.normal(x[j], j), m.squares[j]);
    }
    column_sums<N, kColumns>(m.mean, shared);
    column_sums<N, kColumns>(m.squares, shared);
  }
  if (at.row > 0 || left <= 0) return;
  float* to = s.partial + ((k * p.batch + sample) * s.parts + part) * 3 * p.width + at.column;
  write_floats<N, Vector>(to, m.mean, left);
  write_floats<N, Vector>(to + p.width, m.rest, left);
  write_floats<N, Vector>(to + 2 * p.width, m.squares, left);
}

// The second: the parts in their order, each thread one channel of one layer.
template <bool Gradient>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_targets_whole(const PYEFF_GRID_CONSTANT MultimaskStatsParams s) {
  const MultimaskTargetsParams& p = s.p;
  const int64_t samples = s.all ? 1 : p.batch, i = int64_t{block_index_x()} * kThreads + thread_index();
  if (i >= p.count * samples * p.width) return;
  const int64_t k = i / (samples * p.width), sample = i / p.width % samples, column = i % p.width;
  const int64_t begin = s.all ? 0 : sample, end = s.all ? p.batch : sample + 1;
  double count = 0.0, a = 0.0, b = 0.0;
  for (int64_t of = begin; of < end; ++of) {
    const int length = clamped_length(p.lengths, of, p.tokens);
    for (int64_t part = 0; part < s.parts; ++part) {
      const double more = tokens_of_part(length, part);
      if (more == 0.0) break;
      const float* from = s.partial + ((k * p.batch + of) * s.parts + part) * 3 * p.width + column;
      const double c = double{load(from)} + double{load(from + p.width)}, d = load(from + 2 * p.width);
      count += more;
      if constexpr (Gradient) {
        a += c, b += d;
      } else {
        // Chan, Golub and LeVeque: squares about the mean of both.
        const double apart = c - a, share = more / count;
        a += apart * share;
        b += d + apart * apart * (count - more) * share;
      }
    }
  }
  count = count > 0.0 ? count : 1.0;
  if constexpr (Gradient) a /= count;
  float* to = s.to + (k * samples + sample) * 3 * p.width + column;
  const float mean = static_cast<float>(a), of_squares = static_cast<float>(b / count);
  store(to, mean);
  store(to + p.width, static_cast<float>(a - double{mean}));
  store(to + 2 * p.width, Gradient ? of_squares : rsqrt(of_squares + p.eps));
}

// Layers with statistics that are known, or without any: number by number.
template <class T, bool Vector>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_targets_apply(const PYEFF_GRID_CONSTANT MultimaskTargetsParams p) {
  constexpr int N = kMaskChunk<T, Vector>, kAhead = 4;
  const int64_t i = int64_t{block_index_x()} * kThreads + thread_index(), row = i / p.units;
  if (row >= p.batch * p.tokens) return;
  const int64_t sample = row / p.tokens, token = row - sample * p.tokens;
  const int column = static_cast<int>(i - row * p.units) * N, left = p.width - column;
  const bool here = token < clamped_length(p.lengths, sample, p.tokens);
  if (p.accumulate && !here) return;
  float* to = p.out + row * p.width + column;
  float sum[N] = {};
  for (int first = 0; first < p.count && here; first += kAhead) {
    Piece<T, Vector> piece[kAhead];
    PYEFF_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (first + k >= p.count) continue;
      const MultimaskRows& layer = p.layers[first + k];
      piece[k].read(static_cast<const T*>(layer.data) + sample * layer.outer + token * layer.inner + column, left);
    }
    PYEFF_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (first + k >= p.count) continue;
      float x[N];
      piece[k].numbers(x);
      if (p.stats) {
        const TargetsStats<T, Vector> stats(p, first + k, sample, column, left);
        PYEFF_UNROLL
        for (int j = 0; j < N; ++j) sum[j] += stats.normal(x[j], j);
      } else {
        PYEFF_UNROLL
        for (int j = 0; j < N; ++j) sum[j] += x[j];
      }
    }
  }
  float x[N] = {};
  if (p.accumulate) read_floats<N, Vector>(x, to, left);
  PYEFF_UNROLL
  for (int j = 0; j < N; ++j) x[j] = fmaf(p.weight, sum[j], x[j]);
  write_floats<N, Vector>(to, x, left);
}

}  // namespace pyeff::gpu
