// A bias of attention by the distances between kept tokens, in the whole sequence: -slope |i - j|.
#pragma once

#include "multimask.h"
#include "multimask_copy.h"

namespace pyeff {
namespace PYEFF_ISA {

// What each row's slots are in the computed type, for one row at a time. Before `first` and from `count` on there are
// no distances.
template <class C>
struct BiasRow {
  int64_t first, count;

  BiasRow(const MultimaskProblem& p, int64_t r, int64_t prefix, C* ids)
      : first(at_most(prefix, p.keep_len[r])), count(p.keep_len[r]) {
    for (int64_t j = 0; j < count; ++j) ids[j] = C(p.ids_keep[r * p.slots + j]);
  }
};

template <class C>
PYEFF_INLINE Vec<C> distances(Vec<C> ids, C from) {
  const Vec<C> d = ids - from;
  return d < 0 ? -d : d;
}

// One row [slots] of the bias: `scale` times distances, `forbidden` for keys past what is kept.
template <class T>
PYEFF_INLINE void bias_row(const BiasRow<Compute<T>>& row, const Compute<T>* ids, int64_t i, int64_t slots,
                           Compute<T> scale, T near, T forbidden, T* out) {
  using C = Compute<T>;
  constexpr int64_t lanes = kLanes<C>;
  int64_t j = 0;
  if (i < row.first || i >= row.count) {
    for (; j < row.count; ++j) out[j] = near;
  } else {
    for (; j < row.first; ++j) out[j] = near;
    for (; j + lanes <= row.count; j += lanes) store(out + j, distances<C>(load(ids + j), ids[i]) * scale);
    if (j < row.count)
      store_first(out + j, distances<C>(load_first(ids + j, row.count - j), ids[i]) * scale, row.count - j);
    j = row.count;
  }
  for (; j < slots; ++j) out[j] = forbidden;
}

// What a task writes is put together in the cache, since a row seldom begins where a line does.
template <class T>
bool bias_forward(const MultimaskProblem& p, const Compute<T>* slopes, int64_t heads, int64_t prefix, T* out,
                  const Parallel& parallel) {
  using C = Compute<T>;
  constexpr int64_t kStaged = int64_t(16) << 10;
  const int64_t row_bytes = p.slots * int64_t(sizeof(T)), lines = p.rows * heads * p.slots;
  const Target target(out, lines * row_bytes, p.streamed);
  const int64_t at_once = at_least(1, kStaged / at_least(1, row_bytes));
  bool done = true;
  for_each_piece(parallel, lines, row_bytes, [&](int64_t begin, int64_t end) {
    const int64_t ids_bytes = (p.slots * int64_t(sizeof(C)) + kLine - 1) / kLine * kLine;
    char* scratch = static_cast<char*>(scratch_allocate(ids_bytes + at_once * row_bytes));
    if (!scratch) return __atomic_store_n(&done, false, __ATOMIC_RELAXED);
    C* ids = reinterpret_cast<C*>(scratch);
    for (int64_t line = begin; line < end;) {
      const int64_t r = line / (heads * p.slots), head = line / p.slots % heads;
      const BiasRow<C> row(p, r, prefix, ids);
      // The lines of this row and head, or of all the row's heads that are in this piece.
      const int64_t last = at_most(end, (r + 1) * heads * p.slots);
      const C lowest = C(-__builtin_inf());
      int64_t h = head, i = line % p.slots;
      while (line < last) {
        const int64_t block = at_most(at_once, last - line);
        T* staged = target.streamed ? reinterpret_cast<T*>(scratch + ids_bytes) : out + line * p.slots;
        for (int64_t l = 0; l < block; ++l) {
          const C scale = -slopes[h];
          const T near = narrow<T>(C(scale * C(0)));
          bias_row<T>(row, ids, i, p.slots, scale, near, row.count ? narrow<T>(lowest) : near, staged + l * p.slots);
          if (++i == p.slots) i = 0, ++h;
        }
        if (target.streamed) target.copy(line * row_bytes, staged, block * row_bytes);
        line += block;
      }
    }
    target.end();
    scratch_free(scratch);
  });
  return done;
}

// The sum over the pairs of one row of one head, lines [begin, end), of grad times -distance.
template <class T>
PYEFF_INLINE double bias_sum(const BiasRow<Compute<T>>& row, const Compute<T>* ids, const T* grad, int64_t slots,
                             int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int64_t lanes = kLanes<C>;
  double total = 0;
  for (int64_t i = at_least(begin, row.first); i < at_most(end, row.count); ++i) {
    const T* line = grad + i * slots;
    Vec<C> sums[4] = {};
    int64_t j = row.first;
    for (; j + 4 * lanes <= row.count; j += 4 * lanes)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        sums[v] += distances<C>(load(ids + j + v * lanes), ids[i]) * load(line + j + v * lanes);
    for (; j < row.count; j += lanes) {
      const int64_t left = row.count - j;
      sums[0] += distances<C>(load_first(ids + j, left), ids[i]) * load_first(line + j, left);
    }
    total -= double(sum_lanes<C>((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  return total;
}

// Sums of blocks of lines in a fixed order: first of each row, head and block, then over rows and blocks.
template <class T>
bool bias_backward(const MultimaskProblem& p, const T* grad, int64_t heads, int64_t prefix, Compute<T>* dslopes,
                   const Parallel& parallel) {
  using C = Compute<T>;
  constexpr int64_t kLines = 64;
  const int64_t blocks = (p.slots + kLines - 1) / kLines, count = p.rows * heads * blocks;
  double* sums = static_cast<double*>(scratch_allocate(count * int64_t(sizeof(double))));
  if (!sums) return false;
  bool done = true;
  for_each_piece(parallel, count, at_most(kLines, p.slots) * p.slots * int64_t(sizeof(T)),
                 [&](int64_t begin, int64_t end) {
                   C* ids = static_cast<C*>(scratch_allocate(p.slots * int64_t(sizeof(C))));
                   if (!ids) return __atomic_store_n(&done, false, __ATOMIC_RELAXED);
                   for (int64_t at = begin; at < end;) {
                     const int64_t r = at / (heads * blocks), last = at_most(end, (r + 1) * heads * blocks);
                     const BiasRow<C> row(p, r, prefix, ids);
                     for (; at < last; ++at) {
                       const int64_t block = at % blocks;
                       sums[at] = bias_sum<T>(row, ids, grad + at / blocks * p.slots * p.slots, p.slots, block * kLines,
                                              (block + 1) * kLines);
                     }
                   }
                   scratch_free(ids);
                 });
  for (int64_t h = 0; h < heads && done; ++h) {
    double total = 0;
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t block = 0; block < blocks; ++block) total += sums[(r * heads + h) * blocks + block];
    dslopes[h] = C(total);
  }
  scratch_free(sums);
  return done;
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
