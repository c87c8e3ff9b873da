// A ticket's products with few tokens: time is that of reading the values once, so vectors lie along a block's rows, as
// memory has them, and tokens are broadcast.
#pragma once

#include "dot.h"
#include "ticket_index.h"
#include "ticket_source.h"

namespace pyeff {
namespace PYEFF_ISA {

// Part `part` of `parts` of the blocks' rows or columns, by living blocks: [first, second).
struct SmallRange {
  int64_t first, second;
  SmallRange(const int32_t* start, int64_t count, int64_t part, int64_t parts)
      : first(bound(start, count, part, parts)), second(bound(start, count, part + 1, parts)) {}

 private:
  static int64_t bound(const int32_t* start, int64_t count, int64_t part, int64_t parts) {
    if (part == parts) return count;
    // An empty row has its bias to store: each counts as a block, too.
    const int64_t before = (start[count] + count) * part / parts;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (start[middle] + middle < before)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// `count` numbers as a step of a dot product; zero past them.
template <class T>
PYEFF_INLINE auto load_step(const T* p, int64_t count) {
  using Step = DotStep<T>;
  if (count >= Step::kLength) return Step::load_vector(p);
#if defined(__AVX512BF16__)
  if constexpr (Step::kLength == 32) return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << count) - 1), p);
#endif
  if constexpr (Step::kLength == kLanes<Compute<T>>) return load_some(p, count);
  T padded[Step::kLength] = {};
  __builtin_memcpy(padded, p, size_t(count) * sizeof(T));
  return Step::load_vector(padded);
}

// sums[t][i] = dot products of `rows` neighbouring rows of all living blocks of a row with M tokens.
template <class T, int R, int M>
__attribute__((noinline)) void small_dots(Compute<T>* sums, const T* values, int64_t block_size, int64_t bi,
                                          const int32_t* column, int64_t count, int64_t in, const T* x,
                                          int64_t x_stride) {
  using Step = DotStep<T>;
  using C = Compute<T>;
  Vec<C> acc[R][M] = {};
  for (int64_t e = 0; e < count; ++e, values += block_size) {
    const int64_t first = column[e] * bi, k = smaller(bi, in - first);
    // The processor foresees no block of another page.
    const T* ahead = values + (e + 2 < count ? 2 * block_size : 0);
    for (int64_t p = 0; p < k; p += Step::kLength) {
      decltype(Step::load_vector(x)) token[M];
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) token[t] = load_step(x + t * x_stride + first + p, k - p);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const auto row = load_step(values + i * bi + p, k - p);
        __builtin_prefetch(ahead + i * bi + p);
#pragma GCC unroll 4
        for (int t = 0; t < M; ++t) acc[i][t] = Step::fma(row, token[t], acc[i][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < M; ++t)
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sums[t * R + i] = sum_lanes<C>(acc[i][t]);
}

// sums[t][...] = sum over the living blocks of a column, and their rows r, of g[t][r] times NV vectors of row r.
template <class T, int NV, int M>
__attribute__((noinline)) void small_rows(Compute<T>* sums, const T* values, int64_t bo, int64_t bi, int64_t width,
                                          const int32_t* row, const int32_t* slot, int64_t count, int64_t out,
                                          const Compute<T>* g) {
  using C = Compute<T>;
  constexpr int lanes = kLanes<C>;
  Vec<C> acc[M][NV] = {};
  for (int64_t e = 0; e < count; ++e) {
    const T* from = values + slot[e] * bo * bi;
    const T* ahead = values + slot[e + 1 < count ? e + 1 : e] * bo * bi;
    const int64_t first = row[e] * bo, k = smaller(bo, out - first);
    for (int64_t r = 0; r < k; ++r, from += bi, ahead += bi) {
      __builtin_prefetch(ahead);
      if (NV * lanes * int(sizeof(T)) > 64) __builtin_prefetch(ahead + lanes);
      Vec<C> vector[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) vector[j] = load_some(from + j * lanes, width - j * lanes);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[t][j] += vector[j] * g[t * out + first + r];
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < M; ++t)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) store(sums + (t * NV + j) * lanes, acc[t][j]);
}

template <class T>
struct SmallTiles {
  using Dots = decltype(&small_dots<T, 1, 1>);
  using Rows = decltype(&small_rows<T, 1, 1>);
  static constexpr int kLength = kLanes<Compute<T>>;
  // Rows that are multiplied together with so many tokens: as many sums as registers hold, in no more rows than a
  // vector has lanes. The more rows, the longer the pieces in which memory is read.
  static constexpr int rows_with(int64_t tokens) {
    const int rows = tokens >= 4 ? 4 : tokens >= 2 ? 8 : 16;
    return rows < kLength ? rows : kLength;
  }

  template <int R>
  static Dots dots_of(int64_t tokens) {
    if constexpr (R <= rows_with(4)) {
      if (tokens == 4) return &small_dots<T, R, 4>;
    }
    if constexpr (R <= rows_with(2)) {
      if (tokens == 2) return &small_dots<T, R, 2>;
    }
    return &small_dots<T, R, 1>;
  }
  template <int NV>
  static Rows rows_of(int64_t tokens) {
    return tokens == 4 ? &small_rows<T, NV, 4> : tokens == 2 ? &small_rows<T, NV, 2> : &small_rows<T, NV, 1>;
  }
  static Dots dots(int64_t rows, int64_t tokens) {
    if (rows == 1) return dots_of<1>(tokens);
    return rows == rows_with(4)   ? dots_of<rows_with(4)>(tokens)
           : rows == rows_with(2) ? dots_of<rows_with(2)>(tokens)
                                  : dots_of<rows_with(1)>(tokens);
  }
  static Rows rows(int64_t vectors, int64_t tokens) { return vectors == 1 ? rows_of<1>(tokens) : rows_of<2>(tokens); }
};

template <class T, class Epilogue>
bool run_small_forward(const TicketProblem& p, const TicketParts& index, const Epilogue& epilogue,
                       const Parallel& parallel) {
  const int64_t parts = smaller(larger(1, parallel.threads), index.rows), block_size = p.bo * p.bi;
  const T* values = static_cast<const T*>(p.values);
  const T* x = static_cast<const T*>(p.x);
  for_each_task(parallel, parts, [&](int64_t part) {
    const SmallRange range(index.row_start, index.rows, part, parts);
    for (int64_t b = range.first; b < range.second; ++b) {
      const int64_t begin = index.row_start[b], count = index.row_start[b + 1] - begin;
      const int64_t height = smaller(p.bo, p.out - b * p.bo);
      for (int64_t i = 0; i < height;) {
        int64_t rows = SmallTiles<T>::rows_with(p.tokens);
        while (rows > 1 && rows > height - i) rows = rows > SmallTiles<T>::rows_with(4) ? rows / 2 : 1;
        const T* from = values + begin * block_size + i * p.bi;
        for (int64_t t = 0; t < p.tokens;) {
          const int64_t left = p.tokens - t, together = left >= 4 ? 4 : left >= 2 ? 2 : 1;
          Compute<T> sums[4 * SmallTiles<T>::kLength] = {};
          SmallTiles<T>::dots(rows, together)(sums, from, block_size, p.bi, index.column + begin, count, p.in,
                                              x + t * p.x_stride, p.x_stride);
          for (int64_t s = 0; s < together; ++s) epilogue(t + s, b * p.bo + i, load(sums + s * rows), rows);
          t += together;
        }
        i += rows;
      }
    }
    epilogue.end();
  });
  return true;
}

template <class T, class Gradient, class Epilogue>
bool run_small_backward(const TicketProblem& p, const TicketParts& index, const Gradient& gradient,
                        const Epilogue& epilogue, const Parallel& parallel) {
  using C = Compute<T>;
  constexpr int lanes = kLanes<C>;
  const int64_t parts = smaller(larger(1, parallel.threads), index.columns);
  const T* values = static_cast<const T*>(p.values);
  Scratch scratch((p.tokens * p.out + lanes) * int64_t(sizeof(C)));
  if (!scratch.block) return false;
  C* g = static_cast<C*>(scratch.block);
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t i = 0; i < p.out; i += lanes)
      store_first(g + t * p.out + i, gradient.value(t, i, p.out - i), p.out - i);
  for_each_task(parallel, parts, [&](int64_t part) {
    const SmallRange range(index.column_start, index.columns, part, parts);
    for (int64_t b = range.first; b < range.second; ++b) {
      const int64_t begin = index.column_start[b], count = index.column_start[b + 1] - begin;
      const int64_t width = smaller(p.bi, p.in - b * p.bi);
      for (int64_t c = 0; c < width;) {
        const int64_t left = width - c, vectors = left > lanes ? 2 : 1;
        for (int64_t t = 0; t < p.tokens;) {
          const int64_t there = p.tokens - t, together = there >= 4 ? 4 : there >= 2 ? 2 : 1;
          Compute<T> sums[8 * SmallTiles<T>::kLength];
          SmallTiles<T>::rows(vectors, together)(sums, values + c, p.bo, p.bi, left, index.row + begin,
                                                 index.slot + begin, count, p.out, g + t * p.out);
          for (int64_t s = 0; s < together; ++s)
            for (int64_t j = 0; j < vectors; ++j)
              epilogue(t + s, b * p.bi + c + j * lanes, load(sums + (s * vectors + j) * lanes), left - j * lanes);
          t += together;
        }
        c += vectors * lanes;
      }
    }
    epilogue.end();
  });
  return true;
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
