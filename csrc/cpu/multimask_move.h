// Tokens to the students that keep them and back to their places, and the derivatives of both.
#pragma once

#include "multimask.h"
#include "multimask_copy.h"
#include "normal.h"

namespace pyeff {
namespace PYEFF_ISA {

template <class T>
PYEFF_INLINE const T* row_of(const StridedRows& rows, int64_t outer, int64_t inner) {
  return static_cast<const T*>(rows.data) + outer * rows.outer + inner * rows.inner;
}

// out[r, k] = from[r / share, ids_keep[r, k]]; zero in slots past what a row keeps.
template <class T>
void copy_kept(const MultimaskProblem& p, const StridedRows& from, int64_t share, void* out, const Parallel& parallel) {
  const int64_t bytes = p.width * int64_t(sizeof(T));
  const Target target(out, p.rows * p.slots * bytes, p.streamed);
  for_each_piece(parallel, p.rows * p.slots, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, r = begin / p.slots, k = begin % p.slots; i < end; ++i, ++k) {
      if (k == p.slots) ++r, k = 0;
      if (k < p.keep_len[r])
        target.copy(i * bytes, row_of<T>(from, r / share, p.ids_keep[i]), bytes);
      else
        target.zero(i * bytes, bytes);
    }
    target.end();
  });
}

// out[d] = sum of row(i)[d] over the i < count for which there is one, in this order, in the type that T is computed
// in.
template <class T, class Row>
PYEFF_INLINE void sum_of_rows(int64_t count, int64_t width, const Row& row, T* out, bool streamed) {
  using C = Compute<T>;
  constexpr int64_t lanes = kLanes<C>;
  constexpr int kVectors = 8, kMost = 256;
  const T* rows[kMost];
  int64_t found = 0;
  auto collect = [&](int64_t from) {
    found = 0;
    for (int64_t i = from; i < at_most(count, from + kMost); ++i)
      if (const T* there = row(i)) rows[found++] = there;
  };
  if (count <= kMost) collect(0);
  int64_t d = 0;
  for (; d + kVectors * lanes <= width; d += kVectors * lanes) {
    Vec<C> sums[kVectors] = {};
    for (int64_t from = 0; from < count; from += kMost) {
      if (count > kMost) collect(from);
      for (int64_t i = 0; i < found; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[v] += load(rows[i] + d + v * lanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if (streamed)
        stream(out + d + v * lanes, sums[v]);
      else
        store(out + d + v * lanes, sums[v]);
    }
  }
  for (; d < width; d += lanes) {
    Vec<C> sum{};
    for (int64_t from = 0; from < count; from += kMost) {
      if (count > kMost) collect(from);
      for (int64_t i = 0; i < found; ++i) sum += load_first(rows[i] + d, width - d);
    }
    store_first(out + d, sum, width - d);
  }
}

template <class T>
void sum_kept(const MultimaskProblem& p, const StridedRows& grad, T* dx, const Parallel& parallel) {
  const int64_t masks = p.rows / p.batch, bytes = p.width * int64_t(sizeof(T));
  const Target target(dx, p.batch * p.tokens * bytes, p.streamed);
  const bool streamed = target.streamed && can_stream(dx, p.width);
  for_each_piece(parallel, p.batch * p.tokens, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / p.tokens * masks, t = i % p.tokens;
      const auto row = [&](int64_t m) {
        const int32_t slot = p.inverse[(first + m) * p.tokens + t];
        return slot < 0 ? nullptr : row_of<T>(grad, first + m, slot);
      };
      sum_of_rows(masks, p.width, row, dx + i * p.width, streamed);
    }
    target.end();
  });
}

// dfill[f, t] = sum of grad[r, t] over the rows of sample f, or all rows, from which t is hidden.
template <class T>
void sum_hidden(const MultimaskProblem& p, const StridedRows& grad, T* dfill, int64_t fills, const Parallel& parallel) {
  const int64_t masks = p.rows / p.batch, summed = p.rows / fills, bytes = p.width * int64_t(sizeof(T));
  const Target target(dfill, fills * p.tokens * bytes, p.streamed);
  const bool streamed = target.streamed && can_stream(dfill, p.width);
  for_each_piece(parallel, fills * p.tokens, bytes * summed, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / p.tokens * summed, t = i % p.tokens;
      const auto row = [&](int64_t m) {
        const int64_t r = first + m;
        const bool hidden = p.inverse[r * p.tokens + t] < 0 && t < p.lengths[r / masks];
        return hidden ? row_of<T>(grad, r, t) : nullptr;
      };
      sum_of_rows(summed, p.width, row, dfill + i * p.width, streamed);
    }
    target.end();
  });
}

// What stands in hidden places: fill + std * normal, rounded once.
template <class T>
class Noise {
 public:
  using C = Compute<T>;
  Noise(uint64_t seed, double std) : philox_(seed), std_(C(std)) {}

  void row(int64_t token, const PhiloxRow& of, const T* fill, int64_t width, T* out, bool streamed) const {
    const uint32_t first = uint32_t(token * ((width + 3) / 4));
    int64_t d = 0;
    for (; d + kPhiloxStep <= width; d += kPhiloxStep) {
      FloatV z[4];
      normals(philox_, first + uint32_t(d / 4), of, z);
      put(z, fill ? fill + d : nullptr, out + d, streamed);
    }
    if (d == width) return;
    T padded[kPhiloxStep], result[kPhiloxStep];
    for (int64_t i = 0; i < kPhiloxStep; ++i) padded[i] = fill && d + i < width ? fill[d + i] : T{};
    FloatV z[4];
    normals(philox_, first + uint32_t(d / 4), of, z);
    put(z, padded, result, false);
    __builtin_memcpy(out + d, result, size_t(width - d) * sizeof(T));
  }

 private:
  PYEFF_INLINE void put(const FloatV* z, const T* fill, T* out, bool streamed) const {
    constexpr int64_t lanes = kLanes<C>;
    C wide[kPhiloxStep];
    if constexpr (sizeof(C) == 8) {
      float single[kPhiloxStep];
      __builtin_memcpy(single, z, sizeof single);
      for (int64_t i = 0; i < kPhiloxStep; ++i) wide[i] = single[i];
    } else {
      __builtin_memcpy(wide, z, sizeof wide);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kPhiloxStep; i += lanes) {
      Vec<C> v = load(wide + i) * std_;
      if (fill) v += load(fill + i);
      if (streamed)
        stream(out + i, v);
      else
        store(out + i, v);
    }
  }

  Philox<7> philox_;
  C std_;
};

template <class T>
void put_in_place(const MultimaskProblem& p, const StridedRows& x, const StridedRows& fill, const MultimaskNoise& noise,
                  T* out, const Parallel& parallel) {
  const int64_t masks = p.rows / p.batch, bytes = p.width * int64_t(sizeof(T));
  const Target target(out, p.rows * p.tokens * bytes, p.streamed);
  const bool streamed = target.streamed && can_stream(out, p.width);
  const Noise<T> source(noise.seed, noise.std);
  for_each_piece(parallel, p.rows * p.tokens, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, r = begin / p.tokens, t = begin % p.tokens; i < end; ++i, ++t) {
      if (t == p.tokens) ++r, t = 0;
      const int64_t b = r / masks;
      const int32_t slot = p.inverse[i];
      if (slot >= 0) {
        target.copy(i * bytes, row_of<T>(x, r, slot), bytes);
      } else if (t >= p.lengths[b] || (noise.std == 0 && !fill.data)) {
        target.zero(i * bytes, bytes);
      } else {
        const T* under = fill.data ? row_of<T>(fill, b, t) : nullptr;
        if (noise.std == 0) {
          target.copy(i * bytes, under, bytes);
          continue;
        }
        const PhiloxRow of{uint32_t(r % masks), uint64_t(noise.sample_ids ? noise.sample_ids[b] : b)};
        source.row(t, of, under, p.width, out + i * p.width, streamed);
      }
    }
    target.end();
  });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
