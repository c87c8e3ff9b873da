// The gradients of a ticket's values and bias: of each living block the sum over tokens of g^T x, and the sum of g.
//
// Tokens are taken a chunk at a time: x and g are packed by columns and rows of blocks, by all threads, then every
// living block adds its chunk. The vectors of one tile may come from several blocks of a row, so that narrow blocks
// fill it, too. The order of the sums is one, whatever the number of threads.
#pragma once

#include "ticket_index.h"
#include "ticket_source.h"

namespace pyeff {
namespace PYEFF_ISA {

// A vector of the right operand from the pieces of P columns that are packed apart.
template <class Op, int P>
PYEFF_INLINE auto load_pieces(const typename Op::Element* const* column, int64_t p) {
  constexpr int lanes = kLanes<typename Op::Acc>;
#if defined(__AVX512F__)
  if constexpr (P == 2) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column[0] + p * lanes / 2));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column[1] + p * lanes / 2));
    return bit_cast<decltype(Op::load_vector(column[0]))>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
#endif
  return Op::load_vector(column[0] + p * lanes);
}

// sums[i][j] = sum over p < k of left[p][i] right[j][p], MR rows by NV vectors, each of which has a packed column of
// its own.
template <class Op, int MR, int NV, int P>
__attribute__((noinline)) void outer_tile(typename Op::Acc* sums, const typename Op::Element* left, int64_t ld,
                                          const typename Op::Element* const* right, int64_t k) {
  using Element = typename Op::Element;
  using V = Vec<typename Op::Acc>;
  constexpr int lanes = kLanes<typename Op::Acc>;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = V{};
  const Element* column[NV * P];
#pragma GCC unroll 8
  for (int j = 0; j < NV * P; ++j) column[j] = right[j];
#pragma GCC unroll 1
  for (int64_t p = 0; p < k; ++p, left += ld) {
    decltype(Op::load_vector(left)) vector[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) vector[j] = load_pieces<Op, P>(column + j * P, p);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      auto one = Op::broadcast(left + i);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = Op::fma(one, vector[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(sums + (i * NV + j) * lanes, acc[i][j]);
}

// Columns of a [tokens, width] source, by blocks, as tile operands: [block][piece of the block][step][piece]. A piece
// is a vector where the blocks are whole vectors, and for the left operand else the rows of a tile. What a block lacks
// to whole pieces is not written, and what comes of it is dropped.
template <class T>
struct ColumnPack {
  using Op = Operand<T>;
  using Element = typename Op::Element;
  using C = Compute<T>;
  static constexpr int kLength = kLanes<C>, kStrip = 4;  // vectors of a strip, which one pass over the tokens takes
  static constexpr int64_t kAhead = 8;                   // tokens

  int64_t width, block, room;  // the steps that a chunk has room for
  int64_t piece;

  int64_t pieces() const { return ceil_div(block, piece); }
  int64_t elements() const { return ceil_div(width, block) * pieces() * piece * room; }
  int64_t strips() const { return ceil_div(width, kStrip * kLength); }
  // Where the piece of one column of a block begins, and the column in it.
  const Element* at(const Element* packed, int64_t b, int64_t r) const { return packed + offset(b * block + r); }
  int64_t offset(int64_t column) const {
    const int64_t b = column / block, r = column % block;
    return (b * pieces() + r / piece) * piece * room + r % piece;
  }

  // Adds the column sums of one strip over the tokens [first, first + count) to `sums`, if any; packs it, if wanted.
  template <class Source>
  __attribute__((noinline)) void strip(Element* packed, C* sums, const Source& source, int64_t index, int64_t first,
                                       int64_t count) const {
    const int64_t begin = index * kStrip * kLength, left = smaller(width - begin, kStrip * kLength);
    int64_t offsets[kStrip * kLength];
    for (int64_t i = 0; i < left; ++i) offsets[i] = offset(begin + i);
    Vec<C> total[kStrip] = {};
    constexpr int kHalf = kLength / 2;
    const bool halves = block % kHalf == 0 && piece % kHalf == 0;  // which then lie together
    if (left == kStrip * kLength && block % kLength == 0 && piece == kLength && packed) {
      pack_vectors<kStrip>(packed, total, source, begin, offsets, first, count);
    } else {
      for (int64_t t = 0; t < count; t += Op::kPack)
        for (int v = 0; v < kStrip && v * kLength < left; ++v) {
          const Vec<C> bits = step(source, first + t, t + 1 < count, begin + v * kLength, left - v * kLength, total[v]);
          Element vector[kLength];
          __builtin_memcpy(vector, &bits, sizeof vector);
          if (!packed) continue;
          Element* to = packed + t / Op::kPack * piece;
          if (halves && left - v * kLength >= kLength) {
            for (int l = 0; l < kLength; l += kHalf)
              __builtin_memcpy(to + offsets[v * kLength + l], vector + l, kHalf * sizeof(Element));
            continue;
          }
          for (int l = 0; l < smaller(kLength, left - v * kLength); ++l) to[offsets[v * kLength + l]] = vector[l];
        }
    }
    for (int v = 0; sums && v < kStrip && v * kLength < left; ++v) {
      C* to = sums + begin + v * kLength;
      store_first(to, first ? load_first(to, left - v * kLength) + total[v] : total[v], left - v * kLength);
    }
  }

 private:
  // One step of K of a vector of columns: the bits of its operand elements.
  template <class Source>
  static PYEFF_INLINE Vec<C> step(const Source& source, int64_t token, bool two, int64_t column, int64_t left,
                                  Vec<C>& total) {
    const Vec<C> x = source.value(token, column, left);
    total += x;
    if constexpr (Op::kPack == 1) {
      return x;
    } else {
      UInt32V pair = rounded_bits(x);
      if (two) {
        const Vec<C> next = source.value(token + 1, column, left);
        total += next;
        pair |= rounded_bits(next) << 16;
      }
      return bit_cast<Vec<C>>(pair);
    }
  }

  template <int kVectors, class Source>
  PYEFF_INLINE void pack_vectors(Element* packed, Vec<C>* totals, const Source& source, int64_t begin,
                                 const int64_t* offsets, int64_t first, int64_t count) const {
    Vec<C> total[kVectors] = {};
    Element* to[kVectors];
    for (int v = 0; v < kVectors; ++v) to[v] = packed + offsets[v * kLength];
#pragma GCC unroll 1
    for (int64_t t = 0; t < count; t += Op::kPack) {
      if (t + kAhead + Op::kPack <= count) source.prefetch(first + t + kAhead, begin, kVectors * kLength);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<C> bits = step(source, first + t, t + 1 < count, begin + v * kLength, kLength, total[v]);
        __builtin_memcpy(to[v] + t / Op::kPack * kLength, &bits, sizeof bits);
      }
    }
    for (int v = 0; v < kVectors; ++v) totals[v] = total[v];
  }
};

template <class T, class Gradient>
struct Outer {
  using Op = Operand<T>;
  using Element = typename Op::Element;
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int kLength = kLanes<C>, kVectors = 3, kRows = kTileRows<kVectors>;
  static constexpr int64_t kTokens = 256;             // of a chunk
  static constexpr int64_t kColumnBytes = 512 << 10;  // of packed columns that share a pass over the rows

  const TicketProblem& p;
  const TicketParts& index;
  Gradient gradient;
  PlainSource<T> input;
  T *dvalues, *dbias;

  // Where a vector is twice as long as a narrow block, two of them share it.
  static constexpr bool kHalves = kVectorBytes == 64 && sizeof(C) == 4;

  int64_t room, groups, group_blocks;  // tokens of a chunk; groups of columns of blocks, and how many each has
  ColumnPack<T> left, right;

  // A vector of one living block: where it is packed, and where its sums go.
  struct Target {
    int64_t slot, piece;
    bool last_column;
  };

  Outer(const TicketProblem& p, const TicketParts& index, const Gradient& gradient, const PlainSource<T>& input,
        T* dvalues, T* dbias)
      : p(p), index(index), gradient(gradient), input(input), dvalues(dvalues), dbias(dbias) {
    room = smaller(kTokens, ceil_div(p.tokens, Op::kPack) * Op::kPack);
    left = {p.out, p.bo, steps<Op>(room), p.bo % kLength == 0 && kLength % kRows == 0 ? kLength : kRows};
    right = {p.in, p.bi, steps<Op>(room), kHalves && p.bi % kLength == kLength / 2 ? kLength / 2 : kLength};
    const int64_t block_bytes = right.pieces() * right.piece * right.room * int64_t(sizeof(Element));
    group_blocks = smaller(index.columns, larger(1, kColumnBytes / block_bytes));
    groups = ceil_div(index.columns, group_blocks);
  }

  bool operator()(const Parallel& parallel) const {
    const int64_t threads = larger(1, parallel.threads);
    const int64_t chunks = ceil_div(p.tokens, room), cells = groups * index.rows;
    const bool wide_sums = dvalues && sizeof(T) == 2 && chunks > 1;

    struct Shared {
      Element *left, *right;
      C *bias, *sums;
      int64_t* work;
      int32_t* begin;
    } shared;
    auto place = [&](Arena& arena) {
      shared.left = arena.take<Element>(dvalues ? left.elements() : 0);
      shared.right = arena.take<Element>(dvalues ? right.elements() : 0);
      shared.bias = arena.take<C>(dbias ? p.out : 0);
      shared.sums = arena.take<C>(wide_sums ? p.nnz * p.bo * p.bi : 0);
      shared.work = arena.take<int64_t>(dvalues ? cells + 1 : 0);
      shared.begin = arena.take<int32_t>(dvalues ? cells + 1 : 0);
    };
    Arena layout(nullptr);
    place(layout);
    Scratch scratch(layout.used + 64);
    if (!scratch.block) return false;
    Arena arena(scratch.block);
    place(arena);
    if (dvalues) count_work(shared.work, shared.begin);

    const int64_t left_strips = left.strips(), right_strips = dvalues ? right.strips() : 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * room, count = smaller(room, p.tokens - first);
      for_each_task(parallel, left_strips + right_strips, [&](int64_t task) {
        if (task < left_strips)
          left.strip(shared.left, shared.bias, gradient, task, first, count);
        else
          right.strip(shared.right, nullptr, input, task - left_strips, first, count);
      });
      if (!dvalues || p.nnz == 0) continue;
      for_each_task(parallel, threads, [&](int64_t part) {
        int64_t cell = first_cell(shared.work, cells, part, threads);
        const int64_t end = first_cell(shared.work, cells, part + 1, threads);
        for (; cell < end; ++cell)
          run(cell % index.rows, shared.begin[cell], cell / index.rows, shared.left, shared.right, shared.sums,
              steps<Op>(count), chunk == 0, chunk + 1 == chunks);
      });
    }
    for (int64_t i = 0; dbias && i < p.out; ++i) dbias[i] = narrow<T>(shared.bias[i]);
    return true;
  }

  // work[cell]: what comes before it. A cell is a row of blocks within a group of columns; the groups lie one behind
  // the other. begin[cell]: the first living block of the row that is in the group.
  void count_work(int64_t* work, int32_t* begin) const {
    for (int64_t row = 0; row < index.rows; ++row) {
      int32_t at = index.row_start[row];
      for (int64_t group = 0; group < groups; ++group) {
        begin[group * index.rows + row] = at;
        const int32_t from = at;
        while (at < index.row_start[row + 1] && index.column[at] < (group + 1) * group_blocks) ++at;
        work[group * index.rows + row + 1] = at - from;
      }
    }
    work[0] = 0;
    for (int64_t cell = 0; cell < groups * index.rows; ++cell) work[cell + 1] += work[cell];
  }
  static int64_t first_cell(const int64_t* work, int64_t cells, int64_t part, int64_t parts) {
    if (part == parts) return cells;
    const int64_t before = work[cells] * part / parts;
    int64_t low = 0, high = cells;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work[middle] < before)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  // The living blocks of one row from `entry` on that lie in a group of columns: a chunk of their sums.
  void run(int64_t row, int64_t entry, int64_t group, const Element* lefts, const Element* rights, C* sums, int64_t k,
           bool fresh, bool last) const {
    const int64_t end = index.row_start[row + 1], limit = (group + 1) * group_blocks, each = right.pieces();
    const int in_vector = int(kLength / right.piece), most = kVectors * in_vector;
    const Element* columns[2 * kVectors];
    Target targets[2 * kVectors];
    int count = 0;
    auto flush = [&] {
      if (count == 0) return;
      // Halves that are missing are those of the first, and are dropped.
      for (int i = count; i < most; ++i) columns[i] = columns[0];
      const int vectors = int(ceil_div(count, in_vector));
      if constexpr (kHalves) {
        if (in_vector == 2) {
          if (vectors == 3) run_tiles<3, 2>(row, columns, targets, count, lefts, sums, k, fresh, last);
          if (vectors == 2) run_tiles<2, 2>(row, columns, targets, count, lefts, sums, k, fresh, last);
          if (vectors == 1) run_tiles<1, 2>(row, columns, targets, count, lefts, sums, k, fresh, last);
          count = 0;
          return;
        }
      }
      if (vectors == 3) run_tiles<3, 1>(row, columns, targets, count, lefts, sums, k, fresh, last);
      if (vectors == 2) run_tiles<2, 1>(row, columns, targets, count, lefts, sums, k, fresh, last);
      if (vectors == 1) run_tiles<1, 1>(row, columns, targets, count, lefts, sums, k, fresh, last);
      count = 0;
    };
    for (int64_t e = entry; e < end && index.column[e] < limit; ++e)
      for (int64_t piece = 0; piece < each; ++piece) {
        columns[count] = right.at(rights, index.column[e], piece * right.piece);
        targets[count++] = {e, piece, index.column[e] == index.columns - 1};
        if (count == most) flush();
      }
    flush();
  }

  template <int NV, int P>
  __attribute__((noinline)) void run_tiles(int64_t row, const Element* const* columns, const Target* targets, int count,
                                           const Element* lefts, C* sums, int64_t k, bool fresh, bool last) const {
    const int64_t rows_there = smaller(p.bo, p.out - row * p.bo);
    constexpr int64_t kPiece = kLength / P;
    for (int64_t first = 0; first < p.bo; first += kRows) {
      C result[kRows * NV * kLength];
      const int64_t rows = smaller(kRows, p.bo - first);
      outer_tile<Op, kRows, NV, P>(result, left.at(lefts, row, first), left.piece, columns, k);
      for (int64_t i = 0; i < rows; ++i)
        for (int j = 0; j < count; ++j) {
          const int64_t column = targets[j].piece * kPiece, width = smaller(kPiece, p.bi - column);
          const int64_t at = (targets[j].slot * p.bo + first + i) * p.bi + column;
          V sum = load_some(result + i * NV * kLength + j * kPiece, width);
          // Past the end of the weight there is nothing, whatever the lanes hold.
          if (first + i >= rows_there) sum = V{};
          if (targets[j].last_column && p.in % p.bi) {
            const int64_t there = p.in - (index.columns - 1) * p.bi - column;
            for (int l = 0; l < kLength; ++l)
              if (l >= there) sum[l] = 0;
          }
          if (sums) {
            if (!fresh) sum += load_some(sums + at, width);
            if (last)
              store_some(dvalues + at, sum, width);
            else
              store_some(sums + at, sum, width);
          } else {
            if (!fresh) sum += load_some(dvalues + at, width);
            store_some(dvalues + at, sum, width);
          }
        }
    }
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
