// Tokens to and from the places that masks give them: gather, scatter with noise, and sums over what several masks
// share. All of it moves memory: every thread has several chunks under way, and chunks of a warp are neighbours.
#pragma once

#include "cuda/multimask_chunk.cuh"
#include "cuda/philox.cuh"

namespace pyeff::gpu {

// Chunks of a matrix [outer, inner, units], `Several` to a thread, a block's one behind the other.
template <int Several>
struct MaskFlat {
  static constexpr int64_t kOfBlock = int64_t{Several} * kThreads;
  int64_t outer, count;
  int inner, unit, inners, units;

  struct Place {
    int64_t outer;
    int inner, unit;
  };

  PYEFF_DEVICE MaskFlat(int64_t outers, int64_t inners_, int units_)
      : inners(static_cast<int>(inners_)), units(units_) {
    const int64_t first = block_index_x() * kOfBlock, row = first / units;
    count = outers * inners_ * units - first;
    unit = static_cast<int>(first - row * units);
    outer = row / inners;
    inner = static_cast<int>(row - outer * inners);
  }
  static int64_t blocks(int64_t rows, int64_t units) { return div_up(rows * units, kOfBlock); }

  PYEFF_DEVICE bool has(int i) const { return i * kThreads + thread_index() < count; }
  PYEFF_DEVICE Place operator()(int i) const {
    const unsigned at = static_cast<unsigned>(unit + i * kThreads + thread_index());
    const unsigned row = at / static_cast<unsigned>(units), moved = static_cast<unsigned>(inner) + row;
    const unsigned whole = moved / static_cast<unsigned>(inners);
    return {outer + whole, static_cast<int>(moved - whole * static_cast<unsigned>(inners)),
            static_cast<int>(at - row * static_cast<unsigned>(units))};
  }
};

constexpr int kGatherSeveral = 4, kScatterSeveral = 2, kRescaleSeveral = 4;

struct MultimaskGatherParams {
  MultimaskRows x;
  const int32_t *ids_keep, *keep_len;
  void* out;
  int64_t rows, slots, tokens;
  int share;  // rows of the output to one of x
  int width, units;
};

template <class T, bool Vector>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_gather_kernel(const PYEFF_GRID_CONSTANT MultimaskGatherParams p) {
  using Chunk = Piece<T, Vector>;
  const MaskFlat<kGatherSeveral> flat(p.rows, p.slots, p.units);
  int token[kGatherSeveral];
  Chunk chunk[kGatherSeveral];
  PYEFF_UNROLL
  for (int i = 0; i < kGatherSeveral; ++i) {
    token[i] = -1;
    if (!flat.has(i)) continue;
    const auto at = flat(i);
    if (at.inner < load(p.keep_len + at.outer)) token[i] = load(p.ids_keep + at.outer * p.slots + at.inner);
  }
  PYEFF_UNROLL
  for (int i = 0; i < kGatherSeveral; ++i) {
    if (token[i] < 0 || token[i] >= p.tokens) continue;
    const auto at = flat(i);
    const int column = at.unit * Chunk::kNumbers;
    chunk[i].read(static_cast<const T*>(p.x.data) + at.outer / p.share * p.x.outer + token[i] * p.x.inner + column,
                  p.width - column);
  }
  PYEFF_UNROLL
  for (int i = 0; i < kGatherSeveral; ++i) {
    if (!flat.has(i)) continue;
    const auto at = flat(i);
    const int column = at.unit * Chunk::kNumbers;
    chunk[i].write(static_cast<T*>(p.out) + (at.outer * p.slots + at.inner) * p.width + column, p.width - column);
  }
}

struct MultimaskScatterParams {
  MultimaskRows x, fill;
  const int32_t *inverse, *lengths;
  const int64_t *seed, *sample_ids;
  void* out;
  int64_t rows, tokens, slots;
  int masks, width, units;
  float std;
};

template <class T, bool Vector>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_scatter_kernel(const PYEFF_GRID_CONSTANT MultimaskScatterParams p) {
  using Chunk = Piece<T, Vector>;
  const MaskFlat<kScatterSeveral> flat(p.rows, p.tokens, p.units);
  const int64_t seed = p.std != 0.0f ? load(p.seed) : 0;
  Chunk chunk[kScatterSeveral];
  int slot[kScatterSeveral];
  PYEFF_UNROLL
  for (int i = 0; i < kScatterSeveral; ++i) {
    if (!flat.has(i)) continue;
    const auto at = flat(i);
    slot[i] = load(p.inverse + at.outer * p.tokens + at.inner);
  }
  PYEFF_UNROLL
  for (int i = 0; i < kScatterSeveral; ++i) {
    if (!flat.has(i)) continue;
    const auto at = flat(i);
    const int column = at.unit * Chunk::kNumbers, left = p.width - column;
    if (slot[i] >= 0 && slot[i] < p.slots) {
      chunk[i].read(static_cast<const T*>(p.x.data) + at.outer * p.x.outer + slot[i] * p.x.inner + column, left);
      continue;
    }
    const int64_t sample = at.outer / p.masks;
    if (at.inner >= load(p.lengths + sample)) continue;
    float x[Chunk::kNumbers] = {};
    if (p.fill.data) {
      Chunk fill;
      fill.read(static_cast<const T*>(p.fill.data) + sample * p.fill.outer + at.inner * p.fill.inner + column, left);
      fill.numbers(x);
    }
    if (p.std != 0.0f) {
      const int64_t name = p.sample_ids ? load(p.sample_ids + sample) : sample;
      const uint32_t mask = static_cast<uint32_t>(at.outer - sample * p.masks);
      // Counters go by four numbers of a row.
      const uint32_t first = static_cast<uint32_t>(at.inner) * static_cast<uint32_t>((p.width + 3) / 4) +
                             static_cast<uint32_t>(column) / 4;
      PYEFF_UNROLL
      for (int j = 0; j < Chunk::kNumbers; j += 4) {
        float z[4];
        philox_normals<T>(philox_of_sample(seed, name, mask, kPhiloxNoise, first + static_cast<uint32_t>(j) / 4), z);
        PYEFF_UNROLL
        for (int e = 0; e < 4; ++e) x[j + e] += p.std * z[e];
      }
    }
    chunk[i].set(x);
  }
  PYEFF_UNROLL
  for (int i = 0; i < kScatterSeveral; ++i) {
    if (!flat.has(i)) continue;
    const auto at = flat(i);
    const int column = at.unit * Chunk::kNumbers;
    chunk[i].write(static_cast<T*>(p.out) + (at.outer * p.tokens + at.inner) * p.width + column, p.width - column);
  }
}

struct MultimaskSumsParams {
  MultimaskRows from;
  const int32_t *inverse, *lengths;
  void* to;        // or, of several parts,
  float* partial;  // [parts, outputs, T, D]
  int64_t outputs, tokens, slots;
  int64_t share;  // rows that are added for one output
  int masks, width, units, parts;
  bool hidden;
};

// Rows that a thread has asked for before it adds the first.
constexpr int kSumsAhead = 8;

// Where a row has what is added for a token, or -1.
PYEFF_DEVICE int64_t source_of(const MultimaskSumsParams& p, int64_t row, int token) {
  const int slot = load(p.inverse + row * p.tokens + token);
  const bool kept = slot >= 0 && slot < p.slots;
  if (!p.hidden) return kept ? slot : -1;
  return !kept && token < load(p.lengths + row / p.masks) ? token : -1;
}

template <class T, bool Vector>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_sums_kernel(const PYEFF_GRID_CONSTANT MultimaskSumsParams p) {
  using Chunk = Piece<T, Vector>;
  const MaskFlat<1> flat(p.outputs, p.tokens, p.units);
  if (!flat.has(0)) return;
  const auto at = flat(0);
  const int column = at.unit * Chunk::kNumbers, left = p.width - column, part = block_index_y();
  const int64_t begin = at.outer * p.share + p.share * part / p.parts;
  const int64_t end = at.outer * p.share + p.share * (part + 1) / p.parts;
  float sum[Chunk::kNumbers] = {};
  for (int64_t row = begin; row < end; row += kSumsAhead) {
    int64_t from[kSumsAhead];
    Chunk chunk[kSumsAhead];
    PYEFF_UNROLL
    for (int i = 0; i < kSumsAhead; ++i) from[i] = row + i < end ? source_of(p, row + i, at.inner) : -1;
    PYEFF_UNROLL
    for (int i = 0; i < kSumsAhead; ++i) {
      if (from[i] >= 0)
        chunk[i].read(static_cast<const T*>(p.from.data) + (row + i) * p.from.outer + from[i] * p.from.inner + column,
                      left);
    }
    PYEFF_UNROLL
    for (int i = 0; i < kSumsAhead; ++i) {
      if (from[i] < 0) continue;
      float x[Chunk::kNumbers];
      chunk[i].numbers(x);
      PYEFF_UNROLL
      for (int j = 0; j < Chunk::kNumbers; ++j) sum[j] += x[j];
    }
  }
  const int64_t to = (at.outer * p.tokens + at.inner) * p.width + column;
  if (p.parts > 1) {
    write_floats<Chunk::kNumbers, Vector>(p.partial + part * p.outputs * p.tokens * p.width + to, sum, left);
  } else {
    Chunk chunk;
    chunk.set(sum);
    chunk.write(static_cast<T*>(p.to) + to, left);
  }
}

struct MultimaskPartsParams {
  const float* partial;  // [parts, count]
  void* to;
  int64_t count;
  int parts;
};

// The parts of a sum in their order.
template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_parts_kernel(const PYEFF_GRID_CONSTANT MultimaskPartsParams p) {
  const int64_t i = int64_t{block_index_x()} * kThreads + thread_index();
  if (i >= p.count) return;
  float sum = 0.0f;
  for (int part = 0; part < p.parts; ++part) sum += load(p.partial + part * p.count + i);
  store(static_cast<T*>(p.to) + i, from_float<T>(sum));
}

struct MultimaskRescaleParams {
  void* t;
  const float* factor;
  int64_t count;
};

template <class T, bool Vector>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_rescale_kernel(const PYEFF_GRID_CONSTANT MultimaskRescaleParams p) {
  using Chunk = Piece<T, Vector>;
  constexpr int N = Chunk::kNumbers;
  const float factor = load(p.factor);
  if (factor == 1.0f) return;
  const int64_t first = int64_t{block_index_x()} * kRescaleSeveral * kThreads + thread_index();
  T* t = static_cast<T*>(p.t);
  Chunk chunk[kRescaleSeveral];
  // Vectors end before the last, broken one.
  const auto whole = [&](int i) { return (first + i * kThreads + 1) * N <= p.count; };
  PYEFF_UNROLL
  for (int i = 0; i < kRescaleSeveral; ++i)
    if (whole(i)) chunk[i].read(t + (first + i * kThreads) * N, N);
  PYEFF_UNROLL
  for (int i = 0; i < kRescaleSeveral; ++i) {
    const int64_t at = (first + i * kThreads) * N;
    if (whole(i)) {
      float x[N];
      chunk[i].numbers(x);
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) x[j] *= factor;
      chunk[i].set(x);
      chunk[i].write(t + at, N);
    } else {
      PYEFF_NO_UNROLL
      for (int64_t j = at; j < p.count; ++j) store(t + j, from_float<T>(to_float(load(t + j)) * factor));
    }
  }
}

}  // namespace pyeff::gpu
