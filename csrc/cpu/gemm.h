// The matrix product that the CPU families share: C = epilogue(sum over terms of prologue(A) B), on the register tile.
//
// The right operand is packed once (pack_columns_nk or pack_columns_kn) and the left one is taken as it lies where it
// can be, else rearranged a block of rows at a time by its prologue. Both hooks are types, so that they are compiled
// into the loop. Families with an inner loop of their own take the tile and the prologues alone.
#pragma once

#include "arena.h"
#include "pack.h"
#include "parallel.h"

namespace pyeff {
namespace PYEFF_ISA {

PYEFF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYEFF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYEFF_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A left operand of stored type P for products in T: row i starts at base + index(i) * row_stride, or at pointers[i],
// and is multiplied by scale[i].
template <class T, class P = T>
struct RowSource {
  using Op = Operand<T>;
  using Element = typename Op::Element;

  const P* base;
  int64_t row_stride, inner_stride;
  int64_t k;
  const int64_t* index = nullptr;
  const P* const* pointers = nullptr;
  const Compute<T>* scale = nullptr;

  PYEFF_INLINE const P* row(int64_t i) const {
    return pointers ? pointers[i] : base + (index ? index[i] : i) * row_stride;
  }
  // Whether memory holds the operand as the tile reads it.
  bool in_place() const {
    return sizeof(Element) == sizeof(P) * Op::kPack && inner_stride == 1 && !scale && k % Op::kPack == 0;
  }
  // Steps [begin, end) of K of one row, as operand elements.
  PYEFF_INLINE void pack(int64_t i, int64_t begin, int64_t end, Element* out) const {
    const int64_t first = begin * Op::kPack, last = smaller(k, end * Op::kPack);
    pack_row<T>(out, row(i) + first * inner_stride, inner_stride, last - first, Compute<T>(0),
                scale ? scale[i] : Compute<T>(1));
  }
};

// One term of a batch-reduced product: a left operand, and its right operand packed in panels [K / pack][NV vectors].
template <class T, class P = T>
struct Term {
  RowSource<T, P> left;
  const typename Operand<T>::Element* right;
};

// C = alpha sum + bias + beta C in the type T, and `activation` on top. Any other epilogue has the same call.
template <class T, class Activation>
struct StoreEpilogue {
  using C = Compute<T>;
  T* out;
  int64_t row_stride;
  const T* bias;
  C alpha, beta;
  Activation activation;

  PYEFF_INLINE void operator()(int64_t row, int64_t column, Vec<C> sum, int64_t count) const {
    T* to = out + row * row_stride + column;
    Vec<C> value = sum * alpha;
    if (bias) value += load_first(bias + column, count);
    if (beta != C(0)) value += load_first(to, count) * beta;
    store_first(to, activation(value), count);
  }
};
struct Identity {
  template <class V>
  PYEFF_INLINE V operator()(V x) const {
    return x;
  }
};
struct Relu {
  template <class V>
  PYEFF_INLINE V operator()(V x) const {
    return x < 0 ? V{} : x;  // a NaN stays one
  }
};

// How C is cut: a task has a block of rows and a group of panels, and walks along K in chunks of which the rows and one
// panel fit the second-level cache.
template <class Op>
struct GemmBlocking {
  static constexpr int64_t kRows = 96, kPanels = 12, kSteps = 1024;
};

// C[i][j] = epilogue(i, j, sum of terms); a sum may be empty. Returns false when there is no memory for the scratch.
template <class T, int NV, class P, class Epilogue>
bool multiply(const Parallel& parallel, int64_t m, int64_t n, const Term<T, P>* terms, int count,
              const Epilogue& epilogue) {
  using Op = Operand<T>;
  using Element = typename Op::Element;
  using C = typename Op::Acc;
  using Block = GemmBlocking<Op>;
  constexpr int MR = kTileRows<NV>, kWidth = NV * kLanes<C>;
  constexpr int64_t kStride = Block::kSteps + 64 / int64_t(sizeof(Element));

  if (m <= 0 || n <= 0) return true;
  const int64_t panels = ceil_div(n, kWidth), row_blocks = ceil_div(m, Block::kRows);
  int64_t groups = ceil_div(panels, Block::kPanels);
  // Enough tasks that no thread waits long for the last one.
  while (groups < panels && row_blocks * groups < 16 * parallel.threads) ++groups;
  if (row_blocks < parallel.threads) groups = smaller(panels, ceil_div(groups, parallel.threads) * parallel.threads);

  int64_t chunks = 0;
  bool packs = false;
  for (int t = 0; t < count; ++t) {
    chunks += ceil_div(steps<Op>(terms[t].left.k), Block::kSteps);
    packs |= !terms[t].left.in_place();
  }
  if (chunks == 0) {  // an empty sum has an epilogue, too
    for_each_task(parallel, m, [&](int64_t row) {
      for (int64_t column = 0; column < n; column += kLanes<C>) epilogue(row, column, Vec<C>{}, n - column);
    });
    return true;
  }
  const int64_t group_panels = ceil_div(panels, groups);
  Arena layout(nullptr);
  auto place = [&](Arena& arena, Element*& packed, C*& sums) {
    packed = arena.take<Element>(packs ? Block::kRows * kStride : 0);
    sums = arena.take<C>(chunks > 1 ? ceil_div(Block::kRows, MR) * group_panels * MR * kWidth : 0);
  };
  Element* packed;
  C* sums;
  place(layout, packed, sums);
  const int64_t each = layout.used + 64, parts = smaller(larger(parallel.threads, 1), row_blocks * groups);
  Scratch scratch(parts * each);
  if (!scratch.block) return false;

  for_each_task(parallel, parts, [&](int64_t part) {
    Arena arena(static_cast<char*>(scratch.block) + part * each);
    Element* packed;
    C* sums;
    place(arena, packed, sums);
    const Element* rows[Block::kRows];
    const int64_t tasks = row_blocks * groups;
    for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; ++task) {
      const int64_t first = task / groups * Block::kRows, height = smaller(Block::kRows, m - first);
      const int64_t group = task % groups, begin = panels * group / groups, end = panels * (group + 1) / groups;
      int64_t chunk = 0;
      for (int t = 0; t < count; ++t) {
        const RowSource<T, P>& left = terms[t].left;
        const int64_t total = steps<Op>(left.k);
        for (int64_t k0 = 0; k0 < total; k0 += Block::kSteps, ++chunk) {
          const int64_t k1 = smaller(total, k0 + Block::kSteps);
          for (int64_t i = 0; i < height; ++i) {
            if (left.in_place()) {
              rows[i] = reinterpret_cast<const Element*>(left.row(first + i)) + k0;
            } else {
              left.pack(first + i, k0, k1, packed + i * kStride);
              rows[i] = packed + i * kStride;
            }
          }
          for (int64_t panel = begin; panel < end; ++panel)
            for (int64_t i = 0; i < height; i += MR) {
              const int64_t valid = smaller(MR, height - i);
              LeftRows<Element, MR> tile_rows;
              for (int r = 0; r < MR; ++r) tile_rows.row[r] = rows[i + smaller(r, valid - 1)];
              Tile<Op, MR, NV> tile;
              C* kept =
                  chunks > 1 ? sums + ((panel - begin) * ceil_div(Block::kRows, MR) + i / MR) * MR * kWidth : nullptr;
              if (chunk == 0)
                tile.zero();
              else
                __builtin_memcpy(tile.acc, kept, sizeof tile.acc);
              tile.multiply(tile_rows, terms[t].right + (panel * total + k0) * kWidth, k1 - k0);
              if (chunk + 1 < chunks) {
                __builtin_memcpy(kept, tile.acc, sizeof tile.acc);
                continue;
              }
              for (int r = 0; r < valid; ++r)
                for (int v = 0; v < NV; ++v) {
                  const int64_t column = panel * kWidth + v * kLanes<C>;
                  if (column < n) epilogue(first + i + r, column, tile.acc[r][v], n - column);
                }
            }
        }
      }
    }
  });
  return true;
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
