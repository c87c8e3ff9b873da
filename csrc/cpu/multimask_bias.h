// A bias of attention by the distances between kept tokens, in the whole sequence: -slope |i - j|.
#pragma once

#include "multimask.h"
#include "multimask_copy.h"

namespace pyeff {
namespace PYEFF_ISA {

// The places of one row's kept slots in the computed type. Before `first` and from `count` on there are no distances.
template <class C>
struct BiasRow {
  const C* ids;
  int64_t first, count;

  BiasRow(const MultimaskProblem& p, int64_t r, int64_t prefix, C* places)
      : ids(places), first(at_most(prefix, p.keep_len[r])), count(p.keep_len[r]) {
    for (int64_t j = 0; j < count; ++j) places[j] = C(p.ids_keep[r * p.slots + j]);
  }
  // What `places` needs room for: two whole vectors are read from any of them on.
  static int64_t bytes(int64_t slots) {
    return (slots * int64_t(sizeof(C)) + 2 * kVectorBytes + kLine - 1) / kLine * kLine;
  }
  PYEFF_INLINE Vec<C> distances(int64_t j, C from) const {
    using Int = typename VectorOf<C>::Int;
    const Int sign = bit_cast<Int>(splat<Vec<C>>(C(-0.0)));
    return bit_cast<Vec<C>>(Int(bit_cast<Int>(Vec<C>(load(ids + j) - from)) & ~sign));
  }
};

// Line i of the bias: `scale` times distances, `near` where there are none, `forbidden` for keys past what is kept. Up
// to two vectors more are written behind it.
template <class T>
PYEFF_INLINE void bias_line(const BiasRow<Compute<T>>& row, int64_t i, int64_t slots, Compute<T> scale,
                            Compute<T> forbidden, T* out) {
  using C = Compute<T>;
  constexpr int64_t lanes = kLanes<C>;
  const C near = scale * C(0);
  const bool far = row.first <= i && i < row.count;
  const C from = far ? row.ids[i] : C(0);
  if (far)
    for (int64_t j = 0; j < row.count; j += 2 * lanes)
      put_two(out + j, row.distances(j, from) * scale, row.distances(j + lanes, from) * scale, false);
  const T at_near = narrow<T>(near);
  for (int64_t j = 0; j < (far ? row.first : row.count); ++j) out[j] = at_near;
  if (row.count == slots) return;
  const Vec<C> last = splat<Vec<C>>(forbidden);
  for (int64_t j = row.count; j < slots; j += 2 * lanes) put_two(out + j, last, last, false);
}

template <class T>
bool bias_forward(const MultimaskProblem& p, const Compute<T>* slopes, int64_t heads, int64_t prefix, T* out,
                  const Parallel& parallel) {
  using C = Compute<T>;
  const int64_t line_bytes = p.slots * int64_t(sizeof(T)), lines = p.rows * heads * p.slots;
  const Target target(out, lines * line_bytes, p.streamed);
  const int64_t ids_bytes = BiasRow<C>::bytes(p.slots);
  bool done = true;
  for_each_piece(parallel, lines, line_bytes, [&](int64_t begin, int64_t end) {
    char* scratch = static_cast<char*>(scratch_allocate(ids_bytes + Staged::bytes(line_bytes + 2 * kVectorBytes)));
    if (!scratch) return __atomic_store_n(&done, false, __ATOMIC_RELAXED);
    Staged staged(target, begin * line_bytes, scratch + ids_bytes);
    for (int64_t line = begin; line < end;) {
      const int64_t r = line / (heads * p.slots), last = at_most(end, (r + 1) * heads * p.slots);
      const BiasRow<C> row(p, r, prefix, reinterpret_cast<C*>(scratch));
      for (int64_t h = line / p.slots % heads, i = line % p.slots; line < last; ++line) {
        const C scale = -slopes[h];
        const C forbidden = row.count ? C(-__builtin_inf()) : scale * C(0);
        bias_line<T>(row, i, p.slots, scale, forbidden, reinterpret_cast<T*>(staged.next()));
        staged.wrote(line_bytes);
        if (++i == p.slots) i = 0, ++h;
      }
    }
    staged.end();
    target.end();
    scratch_free(scratch);
  });
  return done;
}

// Sums of a line are added up in float64.
PYEFF_INLINE void add_wide(DoubleV* sums, FloatV v) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  struct Halves {
    Half low, high;
  } halves = bit_cast<Halves>(v);
  sums[0] += __builtin_convertvector(halves.low, DoubleV) + __builtin_convertvector(halves.high, DoubleV);
}
PYEFF_INLINE void add_wide(DoubleV* sums, DoubleV v) { sums[0] += v; }

// The sum over lines [begin, end) of one row and head of grad times distance. There are `readable` numbers from grad
// on.
template <class T>
double bias_sum(const BiasRow<Compute<T>>& row, const T* grad, int64_t slots, int64_t begin, int64_t end,
                int64_t readable) {
  using C = Compute<T>;
  using Int = typename VectorOf<C>::Int;
  constexpr int64_t lanes = kLanes<C>, kAhead = 2048;
  Int lane{};
  for (int l = 0; l < lanes; ++l) lane[l] = l;
  DoubleV total{};
  for (int64_t i = at_least(begin, row.first); i < at_most(end, row.count); ++i) {
    const T* line = grad + i * slots;
    const C from = row.ids[i];
    Vec<C> sums[4] = {};
    int64_t j = row.first;
    for (; j + 4 * lanes <= row.count; j += 4 * lanes)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        // Memory is read in one long sequence, but a processor looks ahead within a page only.
        __builtin_prefetch(reinterpret_cast<const char*>(line + j + v * lanes) + kAhead);
        sums[v] += row.distances(j + v * lanes, from) * load(line + j + v * lanes);
      }
    for (; j + lanes <= row.count; j += lanes) sums[0] += row.distances(j, from) * load(line + j);
    if (j < row.count) {
      // What is behind the last of them is read where there is something, and then left out.
      const Vec<C> g = i * slots + j + lanes <= readable ? load(line + j) : load_first(line + j, row.count - j);
      const Int counts = lane < decltype(lane[0] + 0)(row.count - j);
      sums[1] += counts ? row.distances(j, from) * g : Vec<C>{};
    }
    add_wide(&total, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return sum_lanes<double>(total);
}

// In a fixed order: first blocks of lines of each row and head, then all of a head.
template <class T>
bool bias_backward(const MultimaskProblem& p, const T* grad, int64_t heads, int64_t prefix, Compute<T>* dslopes,
                   const Parallel& parallel) {
  using C = Compute<T>;
  constexpr int64_t kLines = 64;
  const int64_t square = p.slots * p.slots, numbers = p.rows * heads * square;
  const int64_t blocks = (p.slots + kLines - 1) / kLines, count = p.rows * heads * blocks;
  double* sums = static_cast<double*>(scratch_allocate(count * int64_t(sizeof(double))));
  if (!sums) return false;
  bool done = true;
  const int64_t bytes = at_most(kLines, p.slots) * p.slots * int64_t(sizeof(T));
  for_each_piece(parallel, count, bytes, [&](int64_t begin, int64_t end) {
    C* ids = static_cast<C*>(scratch_allocate(BiasRow<C>::bytes(p.slots)));
    if (!ids) return __atomic_store_n(&done, false, __ATOMIC_RELAXED);
    for (int64_t at = begin; at < end;) {
      const int64_t r = at / (heads * blocks), last = at_most(end, (r + 1) * heads * blocks);
      const BiasRow<C> row(p, r, prefix, ids);
      for (; at < last; ++at) {
        const int64_t line = at % blocks * kLines, from = at / blocks * square;
        sums[at] = bias_sum<T>(row, grad + from, p.slots, line, line + kLines, numbers - from);
      }
    }
    scratch_free(ids);
  });
  for (int64_t h = 0; h < heads && done; ++h) {
    double total = 0;
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t block = 0; block < blocks; ++block) total += sums[(r * heads + h) * blocks + block];
    dslopes[h] = C(-total);
  }
  scratch_free(sums);
  return done;
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
