// The product with lines of small blocks on sm_90a: a block keeps 128 tokens of the rows in shared memory, all of their
// width, and each of its warpgroups takes lines of its own, whose blocks of values stream through a ring. So the rows
// are loaded once for many lines, where a tile would load them again for every 16 or 32 columns.
#pragma once

#include "cuda/ticket_common.cuh"

namespace pyeff::gpu {

// N: columns of a line, 16, 32 or 64. A group is a warpgroup that has all tokens; with 64 columns it is two, each with
// half of the tokens, because there is no room for two rings.
template <int N>
struct TicketResident {
  static constexpr int kTokens = 128, kStages = 4, kGroup = N > 32 ? 2 * kWarpgroup : kWarpgroup;
  static constexpr int kTiles = kTokens / 64 / (kGroup / kWarpgroup);  // of 64 tokens, for each warpgroup
  static constexpr int kThreads = 512, kMostGroups = kThreads / kGroup, kLeastGroups = 256 / kGroup;
  static constexpr int kPanel = kTokens * kRowBytes;  // of 64 columns of the rows
  static constexpr int kStage = N * kRowBytes;        // 64 steps of the depth, either way round
  // Behind the panels the stages of each group; then, for each, where the rows are multiplied: four places a stage.
  static constexpr int kRing = kStages * kStage, kPlaces = kStages * 4 * static_cast<int>(sizeof(int32_t));
  static constexpr int panels(int64_t width) { return static_cast<int>((width + 63) / 64); }
  static constexpr int shared(int64_t width, int groups) { return panels(width) * kPanel + groups * (kRing + kPlaces); }
  // Groups that there is room for; 0 where they are too few to be worth it.
  static constexpr int groups(int64_t width, int most_bytes) {
    int groups = kMostGroups;
    while (groups > 0 && (panels(width) > 64 || shared(width, groups) > most_bytes)) --groups;
    return groups < kLeastGroups ? 0 : groups;
  }
};

// A walk over the stages of all lines that a group takes, line after line.
struct TicketWalk {
  TicketLine line;
  int rank, step, at, stage = 0, stages = 0;

  PYEFF_DEVICE TicketWalk(const TicketProductParams& p, int first, int step_) : rank(first - step_), step(step_) {
    next_line(p);
  }
  PYEFF_DEVICE bool there(const TicketProductParams& p) const { return rank < p.side.lines; }
  PYEFF_DEVICE bool last() const { return stage + 1 == stages; }
  PYEFF_DEVICE void next(const TicketProductParams& p) {
    if (++stage == stages) next_line(p);
  }

 private:
  PYEFF_DEVICE void next_line(const TicketProductParams& p) {
    stage = 0;
    for (rank += step; rank < p.side.lines; rank += step) {
      at = line_at(p.side, rank);
      if (at < 0) continue;
      line = TicketLine(p.side, at);
      // A line without blocks has its outputs, too.
      stages = line.count ? div_up(line.count * p.depth, 64) : 1;
      return;
    }
  }
};

template <class T, bool Transposed, int N>
class TicketResidentGroup {
 public:
  using Sizes = TicketResident<N>;

  PYEFF_DEVICE TicketResidentGroup(const TicketProductParams& p, int64_t token0, int own)
      : p_(p),
        token0_(token0),
        rows_(shared_memory()),
        own_(own),
        ring_(rows_ + Sizes::panels(p.width) * Sizes::kPanel + own * Sizes::kRing),
        places_(rows_ + Sizes::panels(p.width) * Sizes::kPanel + block_size() / Sizes::kGroup * Sizes::kRing +
                own * Sizes::kPlaces),
        thread_(thread_index() % Sizes::kGroup),
        first_(Sizes::kTiles == 1 ? shuffle(warp() / 4, 0) % 2 * 64 : 0) {}

  PYEFF_DEVICE void run(int first, int step) {
    TicketWalk ahead(p_, first, step), now = ahead;
    for (int i = 0; i < Sizes::kStages - 1; ++i) fill(ahead, i);
    for (int i = 0; now.there(p_); ++i) {
      // This stage has arrived, and all products with the one before are done, so that it can be filled again.
      copy_async_wait<Sizes::kStages - 2>();
      async_proxy_fence();
      wgmma_wait<0>();
      named_barrier(1 + own_, Sizes::kGroup);
      multiply_stage(now, i % Sizes::kStages);
      fill(ahead, i + Sizes::kStages - 1);
      if (now.last()) finish(now);
      now.next(p_);
    }
    copy_async_wait<0>();
  }

 private:
  PYEFF_DEVICE char* stage(int i) const { return ring_ + i % Sizes::kStages * Sizes::kStage; }
  PYEFF_DEVICE int32_t* places(int i) const { return reinterpret_cast<int32_t*>(places_) + i % Sizes::kStages * 4; }

  PYEFF_DEVICE void fill(TicketWalk& walk, int i) {
    if (walk.there(p_)) {
      const int k = walk.stage * 64;
      if (thread_ < 4) {
        const TicketStep at(p_.side, walk.line, k + thread_ * 16, p_.depth, p_.width);
        store_shared(places(i) + thread_, at.left > 0 ? at.at : -1);
      }
      if constexpr (Transposed) {
        fill_across(walk.line, stage(i), k);
      } else {
        fill_along(walk.line, stage(i), k + thread_ % 8 * 8);
      }
      walk.next(p_);
    }
    copy_async_commit();
  }

  // Rows of the panel are the columns of the line.
  PYEFF_DEVICE void fill_along(const TicketLine& line, char* panel, int k) const {
    const TicketStep at(p_.side, line, k, p_.depth, p_.width);
    const int chunk = thread_ % 8;
    const T* values = static_cast<const T*>(p_.values);
    const T* from = values + at.slot * p_.columns * p_.depth + at.inner;
    PYEFF_UNROLL
    for (int i = 0; i < N / (Sizes::kGroup / 8); ++i) {
      const int row = thread_ / 8 + Sizes::kGroup / 8 * i;
      const bool there = row < p_.columns && at.left > 0;
      const T* source = from + row * p_.depth;
      if (at.left <= 0 || at.left >= 8) {
        copy_async16(panel + chunk_at(row, chunk), there ? source : values, there);
      } else {
        gather_chunk<T>(panel + chunk_at(row, chunk),
                        [&](int j) { return there && j < at.left ? source + j : nullptr; });
      }
    }
  }

  // Rows of the panel are along the depth, as long as the line is wide.
  PYEFF_DEVICE void fill_across(const TicketLine& line, char* panel, int k) const {
    constexpr int kAcross = N / 8;
    const T* values = static_cast<const T*>(p_.values);
    PYEFF_UNROLL
    for (int i = 0; i < 64 * kAcross / Sizes::kGroup; ++i) {
      const int item = thread_ + i * Sizes::kGroup, row = item / kAcross, chunk = item % kAcross;
      const TicketStep at(p_.side, line, k + row, p_.depth, p_.width);
      const bool there = at.left > 0 && chunk * 8 < p_.columns;
      copy_async16(panel + row * (N * 2) + ((chunk ^ (row % 8 / (64 / N))) << 4),
                   there ? values + (at.slot * p_.depth + at.inner) * p_.columns + chunk * 8 : values, there);
    }
  }

  PYEFF_DEVICE void multiply_stage(const TicketWalk& walk, int slot) {
    constexpr int kRow = Transposed ? N * 2 : kRowBytes, kStep = Transposed ? 16 * kRow : 32;
    const int left = walk.line.count * p_.depth - walk.stage * 64, steps = left < 64 ? left / 16 : 4;
    pin();
    wgmma_fence();
    PYEFF_NO_UNROLL
    for (int s = 0; s < steps; ++s) {
      const int at = load_shared(places(slot) + s);
      // Past the end of the rows: there is nothing to multiply zeros with.
      if (at < 0) continue;
      const char* rows = rows_ + at / 64 * Sizes::kPanel + first_ * kRowBytes + at % 64 * 2;
      const uint64_t b = wgmma_descriptor(stage(slot) + s * kStep, 16, 8 * kRow, kRow);
      PYEFF_UNROLL
      for (int m = 0; m < Sizes::kTiles; ++m)
        wgmma<T, N, Transposed>(sums_[m], wgmma_descriptor(rows + m * 64 * kRowBytes, 16, 8 * kRowBytes), b, true);
    }
    wgmma_commit();
  }

  PYEFF_DEVICE void pin() {
    PYEFF_UNROLL
    for (int m = 0; m < Sizes::kTiles; ++m) wgmma_pin(sums_[m]);
  }

  // The outputs of a line.
  PYEFF_DEVICE void finish(const TicketWalk& walk) {
    wgmma_wait<0>();
    pin();
    const int at0 = walk.at * p_.columns;
    const int most = p_.columns < p_.across - at0 ? p_.columns : p_.across - at0;
    PYEFF_UNROLL
    for (int j = 0; j < N / 8; ++j) {
      const int column = j * 8 + 2 * (lane() % 4);
      float bias[2] = {0.0f, 0.0f};
      if (p_.bias) load_two(bias, static_cast<const T*>(p_.bias) + at0 + column, most - column, false);
      PYEFF_UNROLL
      for (int i = 0; i < 2 * Sizes::kTiles; ++i) {
        float* pair = sums_[i / 2] + j * 4 + i % 2 * 2;
        const int64_t token = token0_ + first_ + i / 2 * 64 + warp() % 4 * 16 + i % 2 * 8 + lane() / 4;
        const float low = pair[0] + bias[0], high = pair[1] + bias[1];
        pair[0] = pair[1] = 0.0f;
        if (token >= p_.tokens || column >= most) continue;
        const int64_t to = token * p_.across + at0 + column;
        const int count = most - column < 2 ? 1 : 2;
        if (p_.kept) store_two(static_cast<T*>(p_.kept) + to, low, high, count, p_.to_aligned);
        store_two(static_cast<T*>(p_.to) + to, activated(low, p_.activation), activated(high, p_.activation), count,
                  p_.to_aligned);
      }
    }
  }

  const TicketProductParams& p_;
  const int64_t token0_;
  char* const rows_;
  const int own_;
  char *const ring_, *const places_;
  const int thread_;
  const int first_;  // token of the tile that this warpgroup begins with
  float sums_[Sizes::kTiles][N / 2] = {};
};

// A tile of tokens (x) and a share of the lines (y) for each block.
template <class T, bool Transposed, int N>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(TicketResident<N>::kThreads, 1)
    ticket_resident(const PYEFF_GRID_CONSTANT TicketProductParams p) {
  if constexpr (kHasWgmma) {
    using Sizes = TicketResident<N>;
    const int64_t token0 = int64_t{block_index_x()} * Sizes::kTokens;
    const int panels = Sizes::panels(p.width);
    const T* rows = static_cast<const T*>(p.rows);
    for (int i = thread_index(); i < panels * Sizes::kTokens * 8; i += block_size()) {
      const int chunk = i % 8, row = i / 8 % Sizes::kTokens, panel = i / (8 * Sizes::kTokens);
      const int left = p.width - panel * 64 - chunk * 8;
      char* to = shared_memory() + panel * Sizes::kPanel + chunk_at(row, chunk);
      const T* from = rows + (token0 + row) * p.stride + panel * 64 + chunk * 8;
      const bool there = left > 0 && token0 + row < p.tokens;
      if (left <= 0 || left >= 8) {
        copy_async16(to, there ? from : rows, there);
      } else {
        gather_chunk<T>(to, [&](int j) { return there && j < left ? from + j : nullptr; });
      }
    }
    copy_async_commit();
    copy_async_wait<0>();
    async_proxy_fence();
    barrier();
    const int groups = block_size() / Sizes::kGroup, own = shuffle(thread_index() / Sizes::kGroup, 0);
    TicketResidentGroup<T, Transposed, N>(p, token0, own).run(block_index_y() * groups + own, grid_size_y() * groups);
  } else {
    trap();
  }
}

}  // namespace pyeff::gpu
