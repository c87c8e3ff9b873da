// A ticket's forward, and the gradient of its input: y = act(x W^T + b) and dx = g W, one kernel for both.
//
// Lanes are tokens. The input is packed in panels [inner][vectors of tokens], the right operand of the register tile;
// the blocks are the left one, read in place and broadcast, along their rows for y and across them for dx, so that no
// second copy of the values is made. The accumulators of a tile stay in registers over all living blocks of a row.
#pragma once

#include "ticket_index.h"
#include "ticket_source.h"

namespace pyeff {
namespace PYEFF_ISA {

// Rows of one block of outputs: what multiplies the panel.
template <class Stored>
struct SweepPiece {
  const Stored* base;    // of the first stored block
  int64_t block_stride;  // from one stored block to the next
  int64_t ld;            // within a block, from one row of outputs to the next, or from one step of K to the next
  const int32_t* slot;   // where each block is stored; null: one behind the other
  const int32_t* inner;  // [count], ascending: which blocks of the input they meet
  int64_t count;
  int rows, first;  // how many rows, from which row of the group on
};

// What all pieces share: the input's blocks.
struct SweepInner {
  int64_t k, last, last_k;  // numbers in a block; the last block, and the numbers in that
  int64_t steps;            // of a whole block in the panel
};

// sums[i][...] = sum over the piece's blocks of left times panel, MR rows by NV vectors. A function of its own, as
// accumulate_tile is, and for the same reason.
template <class Op, class Stored, bool kAcross, int MR, int NV>
__attribute__((noinline)) void sweep_tile(typename Op::Acc* sums, const SweepPiece<Stored>& piece,
                                          const SweepInner& inner, const typename Op::Element* panel) {
  using Element = typename Op::Element;
  using V = Vec<typename Op::Acc>;
  constexpr int lanes = kLanes<typename Op::Acc>;
  constexpr int64_t width = NV * lanes;
  // Across a block the left operand is packed by pairs already; along it a pair is two neighbours.
  constexpr int64_t kNumbers = kAcross ? 1 : Op::kPack;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = V{};
  const int64_t ld = piece.ld, count = piece.count;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t block = piece.inner[e];
    const Stored* left = piece.base + (piece.slot ? piece.slot[e] : e) * piece.block_stride;
    const Element* right = panel + block * inner.steps * width;
    const int64_t k = block == inner.last ? inner.last_k : inner.k;
    const int64_t whole = kAcross ? steps<Op>(k) : k / Op::kPack;
    if constexpr (!kAcross) {
      // The next block begins on as many cache lines as it has rows, wherever the panel goes on.
      const Stored* next = left + piece.block_stride;
      const Element* next_right = panel + piece.inner[e + 1 < count ? e + 1 : e] * inner.steps * width;
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) __builtin_prefetch(next + i * ld);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) __builtin_prefetch(next_right + j * lanes);
    }
#pragma GCC unroll 1
    for (int64_t p = 0; p < whole; ++p, right += width) {
      decltype(Op::load_vector(right)) vector[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) vector[j] = Op::load_vector(right + j * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const Stored* at = kAcross ? left + p * ld + i : left + i * ld + p * kNumbers;
        auto one = Op::broadcast(reinterpret_cast<const Element*>(at));
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = Op::fma(one, vector[j], acc[i][j]);
      }
    }
    if constexpr (!kAcross && Op::kPack == 2) {
      if (k % 2 == 0) continue;
      // The last number of a row stands alone: its neighbour belongs to the next row, or to nothing.
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const Element alone = pair_bits(left[i * ld + k - 1], Stored{});
        auto one = Op::broadcast(&alone);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = Op::fma(one, Op::load_vector(right + j * lanes), acc[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(sums + i * width + j * lanes, acc[i][j]);
}

// The outputs [tokens, size] of one direction, in blocks of which each meets the inputs' blocks other[start[b]] to
// other[start[b + 1]].
template <class T, bool kAcross, class Source, class Epilogue>
struct Sweep {
  using Op = Operand<T>;
  using Element = typename Op::Element;
  using C = Compute<T>;
  using V = Vec<C>;
  // Where pairs lie across rows, or memory holds no operand, the left one is rearranged a group of rows at a time.
  static constexpr bool kPrepared = sizeof(T) == 2 && (kAcross || Op::kPack == 1);
  using Stored = std::conditional_t<kPrepared || Op::kPack == 1, Element, T>;
  using Piece = SweepPiece<Stored>;
  static constexpr int kLength = kLanes<C>, kVectors = 3, kRows = kTileRows<kVectors>;
  // Rows of outputs that are stored together: a cache line of each token.
  static constexpr int kLine = 64 / int(sizeof(T)), kGroup = kRows > kLine ? kRows : kLine;
  static constexpr int64_t kPanelBytes = 640 << 10;  // of the panels that share a pass over the blocks
  static constexpr int64_t kMostPanels = 8;

  int64_t tokens, size, block, inner_size, inner_block;
  const int32_t *start, *other, *slot;  // slot: null where blocks are stored in this order
  const T* values;
  Source source;
  Epilogue epilogue;

  int64_t inner_blocks, groups, inner_steps;
  SweepInner inner;

  struct Side {
    int64_t size, block;
  };
  Sweep(int64_t tokens, Side outputs, Side inputs, const int32_t* start, const int32_t* other, const int32_t* slot,
        const T* values, const Source& source, const Epilogue& epilogue)
      : tokens(tokens),
        size(outputs.size),
        block(outputs.block),
        inner_size(inputs.size),
        inner_block(inputs.block),
        start(start),
        other(other),
        slot(slot),
        values(values),
        source(source),
        epilogue(epilogue),
        inner_blocks(ceil_div(inner_size, inner_block)),
        groups(ceil_div(size, kGroup)) {
    inner = {inner_block, inner_blocks - 1, inner_size - (inner_blocks - 1) * inner_block, steps<Op>(inner_block)};
    inner_steps = inner_blocks * inner.steps;
  }

  // Scratch of one thread.
  struct Workspace {
    Element* left;
    C* sums;
  };
  Workspace place(Arena& arena) const {
    Workspace w;
    w.left = arena.take<Element>(kPrepared ? kGroup * inner_steps : 0);
    w.sums = arena.take<C>(kGroup * kVectors * kLength);
    return w;
  }

  static int64_t count_panels(int64_t vectors) { return ceil_div(vectors, kVectors); }
  // The first vector of panel `i` of all `panels` that `vectors` are shared out to.
  static int64_t panel_begin(int64_t vectors, int64_t panels, int64_t i) { return vectors * i / panels; }
  int64_t panels_together() const {
    const int64_t bytes = inner_steps * kVectors * kLength * int64_t(sizeof(Element));
    return smaller(kMostPanels, larger(1, kPanelBytes / bytes));
  }

  // Packs the blocks [begin, end) of the input for the vectors of tokens [first, first + vectors).
  __attribute__((noinline)) void pack(Element* panel, int64_t first, int64_t vectors, int64_t begin,
                                      int64_t end) const {
    const int64_t width = vectors * kLength;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t token = (first + v) * kLength, count = smaller(kLength, tokens - token);
      auto pack_some = [&](int64_t from, int64_t k) {
        pack_tokens<T>(panel + from / inner_block * inner.steps * width + v * kLength, width, source, token, count,
                       from, k);
      };
      const int64_t from = begin * inner_block, to = smaller(end * inner_block, inner_size);
      if (inner_block % Op::kPack == 0) {
        pack_some(from, to - from);
      } else {
        for (int64_t at = from; at < to; at += inner_block) pack_some(at, smaller(inner_block, to - at));
      }
    }
  }

  // The pieces of a group of rows of outputs.
  __attribute__((noinline)) int make_pieces(int64_t group, const Workspace& w, Piece* pieces) const {
    const int64_t end = smaller(size, (group + 1) * kGroup);
    int made = 0;
    Element* left = w.left;
    for (int64_t o = group * kGroup; o < end;) {
      const int64_t b = o / block, r = o % block, room = smaller(block - r, end - o);
      const int rows = room >= kRows ? kRows : room >= kRows / 2 ? kRows / 2 : 1;
      Piece& piece = pieces[made++];
      const int64_t begin = start[b];
      piece.count = start[b + 1] - begin;
      piece.inner = other + begin;
      piece.rows = rows;
      piece.first = int(o - group * kGroup);
      piece.slot = slot ? slot + begin : nullptr;
      if constexpr (kPrepared) {
        prepare_left(left, piece.slot, begin, piece, r, rows);
        piece.base = left;
        piece.slot = nullptr;
        piece.ld = kAcross ? rows : inner_block;
        piece.block_stride = rows * (kAcross ? inner.steps : inner_block);
        left += piece.count * piece.block_stride;
      } else {
        piece.block_stride = block * inner_block;
        piece.ld = kAcross ? block : inner_block;
        piece.base = reinterpret_cast<const Stored*>(values + (slot ? 0 : begin * piece.block_stride) +
                                                     (kAcross ? r : r * inner_block));
      }
      o += rows;
    }
    return made;
  }

  // Rows [r, r + rows) of outputs of every block of a piece as operand elements.
  void prepare_left(Element* to, const int32_t* slots, int64_t begin, const Piece& piece, int64_t r, int rows) const {
    for (int64_t e = 0; e < piece.count; ++e) {
      const T* from = values + (slots ? slots[e] : begin + e) * block * inner_block;
      const int64_t k = piece.inner[e] == inner.last ? inner.last_k : inner_block;
      if constexpr (!kAcross) {
        const int64_t count = rows * inner_block;
        for (int64_t i = 0; i < count; i += kLength)
          store_first(to + i, load_first(from + r * inner_block + i, count - i), count - i);
        to += count;
      } else {
        const int64_t whole = k / Op::kPack;
        if (rows == kRows) {
          for (int64_t p = 0; p < whole; ++p) pair_rows<kRows>(to + p * kRows, from + p * Op::kPack * block + r, kRows);
        } else {
          for (int64_t p = 0; p < whole; ++p) pair_rows<0>(to + p * rows, from + p * Op::kPack * block + r, rows);
        }
        // An odd row stands alone.
        if constexpr (Op::kPack == 2)
          for (int i = 0; k % 2 && i < rows; ++i) to[whole * rows + i] = pair_bits(from[(k - 1) * block + r + i], T{});
        to += inner.steps * rows;
      }
    }
  }

  // One step of K of `count` (kCount, unless that is 0) neighbouring outputs.
  template <int kCount>
  PYEFF_INLINE void pair_rows(Element* to, const T* from, int count) const {
    for (int i = 0; i < (kCount ? kCount : count); ++i) {
      if constexpr (Op::kPack == 1)
        to[i] = widen(from[i]);
      else
        to[i] = pair_bits(from[i], from[block + i]);
    }
  }

  template <int MR>
  void run_piece(const Workspace& w, const Piece& piece, const Element* panel, int64_t vectors) const {
    C* sums = w.sums + piece.first * vectors * kLength;
    if (vectors == 3) return sweep_tile<Op, Stored, kAcross, MR, 3>(sums, piece, inner, panel);
    if (vectors == 2) return sweep_tile<Op, Stored, kAcross, MR, 2>(sums, piece, inner, panel);
    sweep_tile<Op, Stored, kAcross, MR, 1>(sums, piece, inner, panel);
  }

  // One group of rows for one panel: the sums, turned so that outputs are neighbours, and stored.
  __attribute__((noinline)) void run(const Workspace& w, const Piece* pieces, int count, int64_t group,
                                     const Element* panel, int64_t first, int64_t vectors) const {
    for (int i = 0; i < count; ++i) {
      if (pieces[i].rows == kRows)
        run_piece<kRows>(w, pieces[i], panel, vectors);
      else if (pieces[i].rows == kRows / 2)
        run_piece<kRows / 2>(w, pieces[i], panel, vectors);
      else
        run_piece<1>(w, pieces[i], panel, vectors);
    }
    const int64_t width = vectors * kLength, column = group * kGroup;
    constexpr int squares = kGroup / kLength;
    for (int64_t v = 0; v < vectors; ++v) {
      V square[squares][kLength];
#pragma GCC unroll 4
      for (int s = 0; s < squares; ++s) {
#pragma GCC unroll 16
        for (int i = 0; i < kLength; ++i) square[s][i] = load(w.sums + (s * kLength + i) * width + v * kLength);
        transpose<C>(square[s]);
      }
      const int64_t token = (first + v) * kLength, there = smaller(kLength, tokens - token);
      for (int64_t t = 0; t < there; ++t)
        for (int s = 0; s < squares && column + s * kLength < size; ++s)
          epilogue(token + t, column + s * kLength, square[s][t], size - column - s * kLength);
    }
  }

  // The groups of rows [begin, end) for consecutive panels of all that `vectors` from `first` on are shared out to.
  void run_groups(const Workspace& w, int64_t begin, int64_t end, const Element* packed, int64_t first, int64_t vectors,
                  int64_t panels, int64_t from, int64_t to) const {
    Piece pieces[kGroup];
    for (int64_t group = begin; group < end; ++group) {
      const int count = make_pieces(group, w, pieces);
      for (int64_t panel = from; panel < to; ++panel) {
        const int64_t at = panel_begin(vectors, panels, panel), next = panel_begin(vectors, panels, panel + 1);
        const int64_t offset = (at - panel_begin(vectors, panels, from)) * kLength * inner_steps;
        run(w, pieces, count, group, packed + offset, first + at, next - at);
      }
    }
  }

  bool operator()(const Parallel& parallel) const {
    const int64_t vectors = ceil_div(tokens, kLength), threads = larger(1, parallel.threads);
    return vectors >= 4 * threads || threads == 1 ? run_by_tokens(parallel, vectors, smaller(threads, vectors))
                                                  : run_by_rows(parallel, vectors, threads);
  }

  // Each thread packs and computes the tokens that are its own; what it has packed stays in its second-level cache.
  bool run_by_tokens(const Parallel& parallel, int64_t vectors, int64_t parts) const {
    const int64_t together = panels_together();
    Arena layout(nullptr);
    place(layout);
    layout.take<Element>(together * kVectors * kLength * inner_steps);
    const int64_t each = layout.used + 64;
    Scratch scratch(parts * each);
    if (!scratch.block) return false;
    for_each_task(parallel, parts, [&](int64_t part) {
      Arena arena(static_cast<char*>(scratch.block) + part * each);
      const Workspace w = place(arena);
      Element* packed = arena.template take<Element>(together * kVectors * kLength * inner_steps);
      clear(w);
      const int64_t first = vectors * part / parts, mine = vectors * (part + 1) / parts - first;
      const int64_t panels = count_panels(mine);
      for (int64_t from = 0; from < panels; from += together) {
        const int64_t to = smaller(panels, from + together);
        pack_panels(packed, first, mine, panels, from, to, 0, inner_blocks);
        run_groups(w, 0, groups, packed, first, mine, panels, from, to);
      }
      epilogue.end();
    });
    return true;
  }

  // Where tokens are few, all are packed first, by all threads; then each has rows that are its own.
  bool run_by_rows(const Parallel& parallel, int64_t vectors, int64_t threads) const {
    const int64_t panels = count_panels(vectors), together = panels_together();
    const int64_t parts = smaller(threads, groups);
    Arena layout(nullptr);
    place(layout);
    const int64_t each = layout.used + 64;
    Arena shared_layout(nullptr);
    shared_layout.take<Element>(vectors * kLength * inner_steps);
    shared_layout.take<int64_t>(groups + 1);
    const int64_t shared = (shared_layout.used + 127) / 64 * 64;
    Scratch scratch(shared + parts * each);
    if (!scratch.block) return false;
    Arena arena(scratch.block);
    Element* packed = arena.template take<Element>(vectors * kLength * inner_steps);
    int64_t* work = arena.template take<int64_t>(groups + 1);
    count_work(work);
    const int64_t strips = smaller(inner_blocks, larger(1, ceil_div(2 * threads, panels)));
    for_each_task(parallel, panels * strips, [&](int64_t task) {
      const int64_t panel = task / strips, strip = task % strips;
      pack_panels(packed + panel_begin(vectors, panels, panel) * kLength * inner_steps, 0, vectors, panels, panel,
                  panel + 1, inner_blocks * strip / strips, inner_blocks * (strip + 1) / strips);
    });
    for_each_task(parallel, parts, [&](int64_t part) {
      Arena arena(static_cast<char*>(scratch.block) + shared + part * each);
      const Workspace w = place(arena);
      clear(w);
      const int64_t begin = first_group(work, part, parts), end = first_group(work, part + 1, parts);
      for (int64_t from = 0; from < panels; from += together)
        run_groups(w, begin, end, packed + panel_begin(vectors, panels, from) * kLength * inner_steps, 0, vectors,
                   panels, from, smaller(panels, from + together));
      epilogue.end();
    });
    return true;
  }

  void pack_panels(Element* packed, int64_t first, int64_t vectors, int64_t panels, int64_t from, int64_t to,
                   int64_t begin, int64_t end) const {
    for (int64_t panel = from; panel < to; ++panel) {
      const int64_t at = panel_begin(vectors, panels, panel), next = panel_begin(vectors, panels, panel + 1);
      pack(packed + (at - panel_begin(vectors, panels, from)) * kLength * inner_steps, first + at, next - at, begin,
           end);
    }
  }

  // Lanes past the last row are turned and dropped; they must hold some number.
  void clear(const Workspace& w) const { std::memset(w.sums, 0, kGroup * kVectors * kLength * sizeof(C)); }

  // work[g]: what comes before group g, in blocks' rows, and something for the stores.
  void count_work(int64_t* work) const {
    work[0] = 0;
    for (int64_t group = 0; group < groups; ++group) {
      int64_t sum = 2 * kGroup;
      const int64_t end = smaller(size, (group + 1) * kGroup);
      for (int64_t o = group * kGroup; o < end;) {
        const int64_t b = o / block, rows = smaller(block - o % block, end - o);
        sum += rows * (start[b + 1] - start[b]);
        o += rows;
      }
      work[group + 1] = work[group] + sum;
    }
  }
  int64_t first_group(const int64_t* work, int64_t part, int64_t parts) const {
    if (part == parts) return groups;
    const int64_t before = work[groups] * part / parts;
    int64_t low = 0, high = groups;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work[middle] < before)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
