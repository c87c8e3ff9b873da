// Which kernel multiplies tokens with lines of blocks, and how it is launched.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ticket_product.cuh"
#include "cuda/ticket_vector.cuh"

namespace pyeff::gpu {

// Fewer tokens than this are multiplied without matrix tiles.
constexpr int64_t kTicketFewTokens = 16;
// Tokens that are handed out together: with them the lines of a product are likely to find the rows in the cache.
constexpr int64_t kTicketGroup = 8192;

static_assert(TicketTile<float, 64>::kShared <= kSharedAnywhere && TicketTile<bf16, 128>::kShared <= kSharedAnywhere,
              "");

// The two sides of a problem's index.
inline TicketSide row_side(const TicketProblem& p) {
  const int64_t rows = p.rows(), columns = p.columns();
  const int32_t *start = p.index, *column = start + rows + 1, *order = column + 3 * p.blocks + columns + 1;
  return {start, column, nullptr, order, p.blocks, static_cast<int>(rows), static_cast<int>(columns)};
}
inline TicketSide column_side(const TicketProblem& p) {
  const int64_t rows = p.rows(), columns = p.columns();
  const int32_t *start = p.index + rows + 1 + p.blocks, *row = start + columns + 1, *slot = row + p.blocks;
  return {start, row, slot, slot + p.blocks + rows, p.blocks, static_cast<int>(columns), static_cast<int>(rows)};
}

inline int64_t bytes_of(Number number) { return number == Number::f32 ? 4 : 2; }

// The product of rows [tokens, width], `stride` apart, with the lines of blocks; `to` is [tokens, across].
template <class T, bool Transposed>
TicketProductParams ticket_params(const TicketProblem& p, const void* rows, int64_t stride, void* to) {
  const int64_t size = sizeof(T);
  TicketProductParams params{};
  params.rows = rows, params.values = p.values, params.to = to, params.stride = stride, params.tokens = p.tokens;
  params.side = Transposed ? column_side(p) : row_side(p);
  params.width = static_cast<int>(Transposed ? p.out : p.width);
  params.across = static_cast<int>(Transposed ? p.width : p.out);
  params.depth = static_cast<int>(Transposed ? p.block_out : p.block_in);
  params.columns = static_cast<int>(Transposed ? p.block_in : p.block_out);
  params.whole = params.depth % kChunk<T> == 0;
  params.rows_aligned = params.whole && aligned_to(rows, 16) && stride * size % 16 == 0;
  params.values_aligned = p.block_in % kChunk<T> == 0 && aligned_to(p.values, 16);
  return params;
}

template <class T, bool Transposed>
void run_ticket_product(TicketProductParams p, const Machine& machine, Launches& launches) {
  p.pairs =
      p.across % 2 == 0 && p.columns % 2 == 0 && aligned_to(p.to, 4) && aligned_to(p.kept, 4) && aligned_to(p.bias, 4);
  const int64_t lines = p.side.lines, block_in = Transposed ? p.columns : p.depth;
  const bool chunks = Transposed || (p.rows_aligned && p.width % kChunk<T> == 0);
  if (p.tokens < kTicketFewTokens && p.values_aligned && chunks && (Transposed || block_in <= kWarp * kChunk<T>)) {
    TicketVectorParams v{p, vector_lanes<T>(block_in, Transposed)};
    v.p.parts = div_up(p.columns, Transposed ? v.lanes * kChunk<T> : kWarp / v.lanes);
    v.p.group = 1;
    const int64_t tiles = div_up(p.tokens, int64_t{TicketVector::kTokens});
    launches.run("ticket_vector", ticket_vector<T, Transposed>, {tiles * lines * v.p.parts}, kThreads,
                 TicketVector::kShared, v);
    return;
  }
  constexpr int kNarrow = sizeof(T) == 2 ? 64 : 32, kWide = 2 * kNarrow;
  const int n = p.columns <= kNarrow ? kNarrow : kWide;
  constexpr int64_t kRows = TicketTile<T, kNarrow>::kRows;
  p.parts = div_up(p.columns, n);
  p.group = static_cast<int>(kTicketGroup / kRows);
  // A grid has no more than 2^31 blocks: more tokens take several launches.
  const int64_t most = ((int64_t{1} << 30) / (lines * p.parts) + 1) * kRows, all = p.tokens, size = sizeof(T);
  for (int64_t first = 0; first < all; first += most) {
    TicketProductParams part = p;
    part.tokens = all - first < most ? all - first : most;
    part.rows = static_cast<const char*>(p.rows) + first * p.stride * size;
    part.to = static_cast<char*>(p.to) + first * p.across * size;
    if (p.kept) part.kept = static_cast<char*>(p.kept) + first * p.across * size;
    const Grid grid{div_up(part.tokens, kRows) * lines * p.parts};
    if (n == kNarrow) {
      launches.run("ticket_product", ticket_product<T, Transposed, kNarrow>, grid, kThreads,
                   TicketTile<T, kNarrow>::kShared, part);
    } else {
      launches.run("ticket_product", ticket_product<T, Transposed, kWide>, grid, kThreads,
                   TicketTile<T, kWide>::kShared, part);
    }
  }
  (void)machine;
}

}  // namespace pyeff::gpu
