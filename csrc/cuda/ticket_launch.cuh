// Which kernel multiplies tokens with lines of blocks, and how it is launched.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ticket_product.cuh"
#include "cuda/ticket_resident.cuh"
#include "cuda/ticket_vector.cuh"
#include "cuda/ticket_wgmma.cuh"

namespace pyeff::gpu {

// Fewer tokens than this are multiplied without matrix tiles.
constexpr int64_t kTicketFewTokens = 16;
// From this many on, tokens are kept on the chip for the lines of small blocks: each tile of them is loaded as a whole.
constexpr int64_t kTicketManyTokens = 512;
// Tokens that are handed out together: with them the lines of a product are likely to find the rows in the cache.
constexpr int64_t kTicketGroup = 8192;

static_assert(TicketTile<float, 64>::kShared <= kSharedAnywhere && TicketTile<bf16, 128>::kShared <= kSharedAnywhere,
              "");
static_assert(2 * TicketWgmmaTile<128, 64>::kShared <= kSharedHopper, "");
static_assert(2 * TicketWgmmaTile<128, 128>::kShared <= kSharedHopper, "");
static_assert(TicketWgmmaTile<256, 128>::kShared <= kSharedHopper, "");

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
  params.rows_aligned = params.depth % kChunk<T> == 0 && aligned_to(rows, 16) && stride * size % 16 == 0;
  params.values_aligned = p.block_in % kChunk<T> == 0 && aligned_to(p.values, 16);
  return params;
}

template <class T, bool Transposed, int N>
void run_ticket_tile(TicketProductParams p, const Machine& machine, Launches& launches) {
  p.parts = div_up(p.columns, N);
  const auto grid = [&](int rows) {
    p.group = static_cast<int>(kTicketGroup / rows);
    return Grid{div_up(p.tokens, int64_t{rows}) * p.side.lines * p.parts};
  };
  if constexpr (sizeof(T) == 2) {
    using Tile = TicketWgmmaTile<128, N>;
    if constexpr (N == 128) {
      using Large = TicketWgmmaTile<256, N>;
      // The larger tile reads less; there must be one for each multiprocessor.
      if (machine.wgmma && p.tokens > Tile::kRows && grid(Large::kRows).x >= machine.processors) {
        launches.run("ticket_product_wgmma", ticket_product_wgmma<T, Transposed, Large::kRows, N>, grid(Large::kRows),
                     kThreads, Large::kShared, p);
        return;
      }
    }
    if (machine.wgmma) {
      launches.run("ticket_product_wgmma", ticket_product_wgmma<T, Transposed, Tile::kRows, N>, grid(Tile::kRows),
                   kThreads, Tile::kShared, p);
      return;
    }
  }
  using Tile = TicketTile<T, N>;
  launches.run("ticket_product", ticket_product<T, Transposed, N>, grid(Tile::kRows), kThreads, Tile::kShared, p);
}

template <class T, bool Transposed, int N>
bool run_ticket_resident(const TicketProductParams& p, const Machine& machine, Launches& launches) {
  using Sizes = TicketResident<N>;
  const int groups = Sizes::groups(p.width, kSharedHopper);
  if (p.columns > N || groups == 0) return false;
  const int64_t tiles = div_up(p.tokens, int64_t{Sizes::kTokens}), most = p.side.lines / groups;
  int64_t shares = best_splits(tiles, machine.processors);
  if (shares > most) shares = most > 0 ? most : 1;
  launches.run("ticket_resident", ticket_resident<T, Transposed, N>, {tiles, shares}, groups * Sizes::kGroup,
               Sizes::shared(p.width, groups), p);
  return true;
}

template <class T, bool Transposed>
void run_ticket_tiles(const TicketProductParams& p, const Machine& machine, Launches& launches) {
  if constexpr (sizeof(T) == 2) {
    if (machine.wgmma && p.tokens >= kTicketManyTokens && p.depth % 16 == 0 && p.rows_aligned && p.values_aligned) {
      if (run_ticket_resident<T, Transposed, 16>(p, machine, launches)) return;
      if (run_ticket_resident<T, Transposed, 32>(p, machine, launches)) return;
      if (run_ticket_resident<T, Transposed, 64>(p, machine, launches)) return;
    }
  }
  constexpr int kNarrow = sizeof(T) == 2 ? 64 : 32;
  if (p.columns <= kNarrow) {
    run_ticket_tile<T, Transposed, kNarrow>(p, machine, launches);
  } else {
    run_ticket_tile<T, Transposed, 2 * kNarrow>(p, machine, launches);
  }
}

template <class T, bool Transposed>
bool run_ticket_vector(const TicketProductParams& p, Launches& launches) {
  const int64_t block_in = Transposed ? p.columns : p.depth;
  const bool chunks = Transposed || (p.rows_aligned && p.width % kChunk<T> == 0 && block_in <= kWarp * kChunk<T>);
  if (p.tokens >= kTicketFewTokens || !p.values_aligned || !chunks) return false;
  TicketVectorParams v{p, vector_lanes<T>(block_in, Transposed)};
  v.p.parts = div_up(p.columns, Transposed ? v.lanes * kChunk<T> : kWarp / v.lanes);
  v.p.group = 1;
  const Grid grid{div_up(p.tokens, int64_t{TicketVector::kTokens}) * p.side.lines * v.p.parts};
  launches.run("ticket_vector", ticket_vector<T, Transposed>, grid, kThreads, TicketVector::kShared, v);
  return true;
}

template <class T, bool Transposed>
void run_ticket_product(TicketProductParams p, const Machine& machine, Launches& launches) {
  const int64_t size = sizeof(T);
  p.to_aligned =
      p.across * size % 16 == 0 && p.columns * size % 16 == 0 && aligned_to(p.to, 16) && aligned_to(p.kept, 16);
  if (run_ticket_vector<T, Transposed>(p, launches)) return;
  // A grid has no more than 2^31 blocks: more tokens take several launches. No line has more parts than columns.
  constexpr int64_t kRows = 128;
  const int64_t most = ((int64_t{1} << 30) / (int64_t{p.side.lines} * div_up(p.columns, 32)) + 1) * kRows;
  const int64_t all = p.tokens;
  for (int64_t first = 0; first < all; first += most) {
    TicketProductParams part = p;
    part.tokens = all - first < most ? all - first : most;
    part.rows = static_cast<const char*>(p.rows) + first * p.stride * size;
    part.to = static_cast<char*>(p.to) + first * p.across * size;
    if (p.kept) part.kept = static_cast<char*>(p.kept) + first * p.across * size;
    run_ticket_tiles<T, Transposed>(part, machine, launches);
  }
}

}  // namespace pyeff::gpu
