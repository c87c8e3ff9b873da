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

// The rows that each of some outputs is the sum of, one list behind the other.
template <class T>
struct RowLists {
  static constexpr int64_t kMost = 512;
  const T* rows[kMost];
  int64_t count = 0;

  // Those of row(from) to row(end - 1) that are there.
  template <class Row>
  PYEFF_INLINE void collect(int64_t from, int64_t end, const Row& row) {
    // Which are there is not to be foreseen, so nothing branches on it.
    for (int64_t s = from; s < end; ++s) {
      const T* there = row(s);
      rows[count] = there;
      count += there != nullptr;
    }
  }
};

// Adds kVectors vectors at `d` of the rows [from, end), while those of later rows are asked for: they lie where no
// processor would look for them.
template <int kVectors, class T>
PYEFF_INLINE void add_rows(const RowLists<T>& lists, int64_t from, int64_t end, int64_t d, Vec<Compute<T>>* sums) {
  constexpr int64_t lanes = kLanes<Compute<T>>, bytes = kVectors * lanes * int64_t(sizeof(T));
  constexpr int64_t kAhead = 1 + 4096 / bytes;
  for (int64_t s = from; s < end; ++s) {
    const char* later = reinterpret_cast<const char*>(lists.rows[at_most(s + kAhead, lists.count - 1)] + d);
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(later + at);
    const T* row = lists.rows[s] + d;
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v) sums[v] += load(row + v * lanes);
  }
}

// out[i, d] = sum of row(i / inner, i % inner, s)[d] over the s < summed for which there is one, in this order, in the
// type that T is computed in.
template <class T, class Row>
void sum_rows(int64_t outer, int64_t inner, int64_t summed, int64_t width, const Row& row, T* out,
              int64_t streamed_from, const Parallel& parallel) {
  using C = Compute<T>;
  using Lists = RowLists<T>;
  constexpr int64_t lanes = kLanes<C>, kMost = Lists::kMost;
  constexpr int kMany = kVectorRegisters >= 32 ? 24 : 8, kFew = 4;
  const Target target(out, outer * inner * width * int64_t(sizeof(T)), streamed_from);
  const bool streamed = target.streamed && can_stream(out, width), listed = summed <= kMost;
  const int64_t at_once = listed ? at_most(64, kMost / summed) : 1;
  for_each_piece(parallel, outer * inner, width * int64_t(sizeof(T)) * (summed + 1), [&](int64_t begin, int64_t end) {
    Lists lists;
    int64_t first[65];
    const auto collect = [&](int64_t i, int64_t from) {
      const int64_t o = i / inner, t = i % inner;
      lists.collect(from, at_most(summed, from + kMost), [&](int64_t s) { return row(o, t, s); });
    };
    const auto sum = [&](int64_t i, int64_t list) {
      T* to = out + i * width;
      // Too many rows to be listed are collected anew for each block of columns.
      const auto for_each_list = [&](const auto& add) {
        if (listed) return add(first[list], first[list + 1]);
        for (int64_t from = 0; from < summed; from += kMost) {
          lists.count = 0;
          collect(i, from);
          add(int64_t(0), lists.count);
        }
      };
      int64_t d = 0;
      const auto block = [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        for (; d + kVectors * lanes <= width; d += kVectors * lanes) {
          Vec<C> sums[kVectors] = {};
          for_each_list([&](int64_t from, int64_t stop) { add_rows<kVectors>(lists, from, stop, d, sums); });
#pragma GCC unroll 32
          for (int v = 0; v < kVectors; ++v) put(to + d + v * lanes, sums[v], streamed);
        }
      };
      block(Count<kMany>{});
      block(Count<kFew>{});
      for (; d < width; d += lanes) {
        Vec<C> last{};
        for_each_list([&](int64_t from, int64_t stop) {
          for (int64_t s = from; s < stop; ++s) last += load_first(lists.rows[s] + d, width - d);
        });
        store_first(to + d, last, width - d);
      }
    };
    for (int64_t i = begin; i < end;) {
      const int64_t stop = at_most(end, i + at_once);
      lists.count = 0;
      for (int64_t l = 0; listed && l < stop - i; ++l) {
        first[l] = lists.count;
        collect(i + l, 0);
        first[l + 1] = lists.count;
      }
      for (int64_t l = 0; i < stop; ++i, ++l) sum(i, l);
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
    fill ? row_of_steps<true>(token, of, fill, width, out, streamed)
         : row_of_steps<false>(token, of, fill, width, out, streamed);
  }

 private:
  template <bool kFilled>
  void row_of_steps(int64_t token, const PhiloxRow& of, const T* fill, int64_t width, T* out, bool streamed) const {
    const uint32_t first = uint32_t(token * ((width + 3) / 4));
    // As many at once as there are registers for.
    constexpr int kAtOnce = kVectorRegisters >= 32 ? 2 : 1;
    int64_t d = 0;
    for (; d + kAtOnce * kPhiloxStep <= width; d += kAtOnce * kPhiloxStep)
      steps<kAtOnce, kFilled>(first + uint32_t(d / 4), of, fill + (kFilled ? d : 0), out + d, streamed);
    for (; d + kPhiloxStep <= width; d += kPhiloxStep)
      steps<1, kFilled>(first + uint32_t(d / 4), of, fill + (kFilled ? d : 0), out + d, streamed);
    if (d == width) return;
    T padded[kPhiloxStep], result[kPhiloxStep];
    for (int64_t i = 0; i < kPhiloxStep; ++i) padded[i] = kFilled && d + i < width ? fill[d + i] : T{};
    steps<1, kFilled>(first + uint32_t(d / 4), of, padded, result, false);
    __builtin_memcpy(out + d, result, size_t(width - d) * sizeof(T));
  }

  // Whether there is a fill is known when this is compiled: a product and a sum are one operation or two, and that must
  // not hang on what else is asked for.
  template <int N, bool kFilled>
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
      if constexpr (kFilled) a += load(fill + i), b += load(fill + i + lanes);
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
