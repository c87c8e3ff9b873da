// Tokens to the students that keep them and back to their places, and the derivatives of both.
#pragma once

#include "multimask.h"
#include "multimask_copy.h"
#include "normal.h"

namespace pyeff {
namespace PYEFF_ISA {

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

template <class T>
PYEFF_INLINE const T* row_of(const StridedRows& rows, int64_t outer, int64_t inner) {
  return static_cast<const T*>(rows.data) + outer * rows.outer + inner * rows.inner;
}

// out[r, k] = from[r / share, ids_keep[r, k]]; zero in slots past what a row keeps. The rows of a sample take turns,
// some slots each, so that what one has read is in the cache for the next, since they keep about the same share of
// tokens.
template <class T>
void copy_kept(const MultimaskProblem& p, const StridedRows& from, int64_t share, void* out, const Parallel& parallel) {
  constexpr int64_t kShared = int64_t(192) << 10;  // bytes of slots in a turn
  const int64_t bytes = p.width * int64_t(sizeof(T));
  const Target target(out, p.rows * p.slots * bytes, p.streamed);
  const int64_t turn = share == 1 ? p.slots : at_most(p.slots, at_least(8, kShared / at_least(1, bytes)));
  const int64_t turns = (p.slots + turn - 1) / turn;
  // The i-th slot in the order of sample, turn, row.
  const auto row_of_slot = [&](int64_t i, int64_t* r, int64_t* k, int64_t* left) {
    const int64_t of_sample = share * p.slots, b = i / of_sample, rest = i % of_sample;
    const int64_t at = at_most(turns - 1, rest / (turn * share));
    const int64_t here = at_most(turn, p.slots - at * turn), within = rest - at * turn * share;
    *r = b * share + within / here, *k = at * turn + within % here, *left = here - within % here;
  };
  for_each_piece(parallel, p.rows * p.slots, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      int64_t r, k, left;
      row_of_slot(i, &r, &k, &left);
      const int64_t stop = at_most(end, i + left) - i + k, kept = at_most(stop, p.keep_len[r]);
      const int32_t* ids = p.ids_keep + r * p.slots;
      const int64_t b = r / share;
      i += stop - k;
      for (; k < kept; ++k)
        target.copy((r * p.slots + k) * bytes, row_of<T>(from, b, ids[k]), bytes,
                    row_of<T>(from, b, ids[at_most(k + 1, kept - 1)]));
      for (; k < stop; ++k) target.zero((r * p.slots + k) * bytes, bytes);
    }
    target.end();
  });
}

// The rows that one output is the sum of; some at a time, if there are many.
template <class T>
struct RowList {
  static constexpr int64_t kMost = 256;
  const T* rows[kMost + 1];
  int64_t count;

  template <class Row>
  PYEFF_INLINE void collect(int64_t from, int64_t end, const Row& row) {
    count = 0;
    // Which there are is not to be foreseen, so nothing branches on it.
    for (int64_t i = from; i < at_most(end, from + kMost); ++i) {
      const T* there = row(i);
      rows[count] = there;
      count += there != nullptr;
    }
  }
};

// to[v] = the sum over a list, of which each row adds kVectors vectors at `d`, while those of the next one are asked
// for.
template <int kVectors, class T>
PYEFF_INLINE void add_rows(const RowList<T>& list, const RowList<T>& next, int64_t d, Vec<Compute<T>>* sums) {
  constexpr int64_t lanes = kLanes<Compute<T>>, ahead = kVectors * lanes * int64_t(sizeof(T));
  for (int64_t s = 0; s < list.count; ++s) {
    const T* from = list.rows[s] + d;
    const char* later = reinterpret_cast<const char*>(s < next.count ? next.rows[s] + d : from);
    for (int64_t at = 0; at < ahead; at += kLine) __builtin_prefetch(later + at);
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v) sums[v] += load(from + v * lanes);
  }
}

// out[i, d] = sum of row(i / inner, i % inner, s)[d] over the s < summed for which there is one, in this order, in the
// type that T is computed in.
template <class T, class Row>
void sum_rows(int64_t outer, int64_t inner, int64_t summed, int64_t width, const Row& row, T* out,
              int64_t streamed_from, const Parallel& parallel) {
  using C = Compute<T>;
  using List = RowList<T>;
  constexpr int64_t lanes = kLanes<C>;
  constexpr int kMany = kVectorRegisters >= 32 ? 24 : 8, kFew = 4;
  const Target target(out, outer * inner * width * int64_t(sizeof(T)), streamed_from);
  const bool streamed = target.streamed && can_stream(out, width), listed = summed <= List::kMost;
  for_each_piece(parallel, outer * inner, width * int64_t(sizeof(T)) * (summed + 1), [&](int64_t begin, int64_t end) {
    List lists[2];
    const auto collect = [&](List* list, int64_t i, int64_t from) {
      const int64_t o = i / inner, t = i % inner;
      list->collect(from, summed, [&](int64_t s) { return row(o, t, s); });
    };
    if (listed) collect(&lists[0], begin, 0);
    for (int64_t i = begin; i < end; ++i) {
      List& list = lists[(i - begin) % 2];
      List& next = lists[(i - begin + 1) % 2];
      next.count = 0;
      if (listed && i + 1 < end) collect(&next, i + 1, 0);
      T* to = out + i * width;
      int64_t d = 0;
      const auto block = [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        for (; d + kVectors * lanes <= width; d += kVectors * lanes) {
          Vec<C> sums[kVectors] = {};
          for (int64_t from = 0; from < summed; from += List::kMost) {
            if (!listed) collect(&list, i, from);
            add_rows<kVectors>(list, next, d, sums);
          }
#pragma GCC unroll 32
          for (int v = 0; v < kVectors; ++v) put(to + d + v * lanes, sums[v], streamed);
        }
      };
      block(Count<kMany>{});
      block(Count<kFew>{});
      for (; d < width; d += lanes) {
        Vec<C> sum{};
        for (int64_t from = 0; from < summed; from += List::kMost) {
          if (!listed) collect(&list, i, from);
          for (int64_t s = 0; s < list.count; ++s) sum += load_first(list.rows[s] + d, width - d);
        }
        store_first(to + d, sum, width - d);
      }
    }
    target.end();
  });
}

template <class T>
void sum_kept(const MultimaskProblem& p, const StridedRows& grad, T* dx, const Parallel& parallel) {
  const int64_t masks = p.rows / p.batch;
  const auto row = [&](int64_t b, int64_t t, int64_t m) {
    const int64_t r = b * masks + m;
    const int32_t slot = p.inverse[r * p.tokens + t];
    return slot < 0 ? nullptr : row_of<T>(grad, r, slot);
  };
  sum_rows(p.batch, p.tokens, masks, p.width, row, dx, p.streamed, parallel);
}

// dfill[f, t] = sum of grad[r, t] over the rows of sample f, or all rows, from which t is hidden.
template <class T>
void sum_hidden(const MultimaskProblem& p, const StridedRows& grad, T* dfill, int64_t fills, const Parallel& parallel) {
  const int64_t masks = p.rows / p.batch, summed = p.rows / fills;
  const auto row = [&](int64_t f, int64_t t, int64_t s) {
    const int64_t r = f * summed + s;
    const bool hidden = p.inverse[r * p.tokens + t] < 0 && t < p.lengths[r / masks];
    return hidden ? row_of<T>(grad, r, t) : nullptr;
  };
  sum_rows(fills, p.tokens, summed, p.width, row, dfill, p.streamed, parallel);
}

// What stands in hidden places: fill + std * normal, rounded once.
template <class T>
class Noise {
 public:
  using C = Compute<T>;
  Noise(uint64_t seed, double std) : philox_(seed), std_(C(std)) {}

  void row(int64_t token, const PhiloxRow& of, const T* fill, int64_t width, T* out, bool streamed) const {
    const uint32_t first = uint32_t(token * ((width + 3) / 4));
    // As many at once as there are registers for.
    constexpr int kAtOnce = kVectorRegisters >= 32 ? 2 : 1;
    int64_t d = 0;
    for (; d + kAtOnce * kPhiloxStep <= width; d += kAtOnce * kPhiloxStep)
      steps<kAtOnce>(first + uint32_t(d / 4), of, fill ? fill + d : nullptr, out + d, streamed);
    for (; d + kPhiloxStep <= width; d += kPhiloxStep)
      steps<1>(first + uint32_t(d / 4), of, fill ? fill + d : nullptr, out + d, streamed);
    if (d == width) return;
    T padded[kPhiloxStep], result[kPhiloxStep];
    for (int64_t i = 0; i < kPhiloxStep; ++i) padded[i] = fill && d + i < width ? fill[d + i] : T{};
    steps<1>(first + uint32_t(d / 4), of, padded, result, false);
    __builtin_memcpy(out + d, result, size_t(width - d) * sizeof(T));
  }

 private:
  template <int N>
  PYEFF_INLINE void steps(uint32_t first, const PhiloxRow& of, const T* fill, T* out, bool streamed) const {
    constexpr int64_t lanes = kLanes<C>, count = N * kPhiloxStep;
    FloatV z[4 * N];
    normals<N>(philox_, first, of, z);
    C wide[count];
    if constexpr (sizeof(C) == 8) {
      float single[count];
      __builtin_memcpy(single, z, sizeof single);
      for (int64_t i = 0; i < count; ++i) wide[i] = single[i];
    } else {
      __builtin_memcpy(wide, z, sizeof wide);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; i += 2 * lanes) {
      Vec<C> a = load(wide + i) * std_, b = load(wide + i + lanes) * std_;
      if (fill) a += load(fill + i), b += load(fill + i + lanes);
      put_two(out + i, a, b, streamed);
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
