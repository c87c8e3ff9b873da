// The recurrence with R on the chip (sm_90a, 16-bit numbers, ranks of 64, 128 and 256): a cluster of rank / 64 blocks
// holds R in its shared memory, 64 units of every gate in each block, and serves 128 tokens at a time. Every block
// keeps the whole state of these tokens; after each layer the blocks send each other their 64 units of the new one.
#pragma once

#include "cuda/read_recur.cuh"

namespace pyeff::gpu {

template <Cell C>
struct ResidentTile {
  static constexpr int kRows = 128, kUnits = 64, kGates = gates_of(C), kColumns = kGates * kUnits;
  // Two warpgroups for the rows; for two or more gates twice that, each with half of the units, so that the sums leave
  // registers for the cell.
  static constexpr int kHalves = C == Cell::rnn ? 1 : 2, kThreads = kHalves * 2 * kWarpgroup;
  static constexpr int kOwn = kColumns / kHalves;  // columns of a warpgroup's product
  // Neighbouring units of one token that a thread computes: 2 rows by kAcross pairs.
  static constexpr int kAcross = kUnits / kHalves / 8, kPairs = 2 * kAcross;
  // Whether the input's share is asked for while the product runs: the LSTM's sums leave no registers for it.
  static constexpr bool kAhead = C != Cell::lstm;
  static constexpr int weight_bytes(int64_t rank) { return static_cast<int>(kColumns * 2 * rank); }
  static constexpr int shared(int64_t rank) { return weight_bytes(rank) + static_cast<int>(kRows * 2 * rank); }
};

// Whether the resident kernel serves a rank: whole blocks of 64 units, in clusters that exist.
constexpr bool resident_rank(int64_t rank) { return rank == 64 || rank == 128 || rank == 256; }

template <class T, Cell C>
class Resident {
 public:
  using Tile = ResidentTile<C>;

  PYEFF_DEVICE Resident(const RecurParams& params)
      : p_(params),
        cell_{params},
        weights_(shared_memory()),
        state_(shared_memory() + Tile::weight_bytes(params.rank)),
        panels_(static_cast<int>(params.rank / 64)),
        block_(cluster_rank()) {}

  // This block's rows of R, a panel for each 64 of the depth, a warpgroup's units of every gate side by side; once for
  // all tokens.
  PYEFF_DEVICE void load_weights() {
    constexpr int kHalf = Tile::kUnits / Tile::kHalves;
    const T* w = static_cast<const T*>(p_.w_hh);
    for (int panel = 0; panel < panels_; ++panel) {
      for (int i = thread_index(); i < Tile::kColumns * 8; i += Tile::kThreads) {
        const int row = i / 8, chunk = i % 8, half = row / Tile::kOwn, gate = row % Tile::kOwn / kHalf;
        const int64_t from = gate * p_.rank + block_ * Tile::kUnits + half * kHalf + row % kHalf;
        copy_chunk<T>(weights_ + panel * (Tile::kColumns * kRowBytes) + chunk_at(row, chunk),
                      w + from * p_.rank + panel * 64 + chunk * 8, 8, p_.w_aligned);
      }
    }
  }

  PYEFF_DEVICE void run(int64_t row0) {
    load_first(row0);
    for (int64_t l = 0; l < p_.layers; ++l) {
      // Kept for all layers, the addresses of all pairs would be spilled.
      thread_ = static_cast<int>(opaque(thread_index()));
      row0_ = row0 + row_in_tile(0);
      float sums[Tile::kOwn / 2];
      start(sums);
      uint32_t x[Tile::kPairs][Tile::kGates];
      if constexpr (Tile::kAhead) {
        PYEFF_UNROLL
        for (int i = 0; i < Tile::kPairs; ++i) ask(l, i, x[i]);
      }
      wgmma_wait<0>();
      wgmma_pin(sums);
      uint32_t states[Tile::kPairs];
      PYEFF_UNROLL
      for (int i = 0; i < Tile::kPairs; ++i) {
        float gates[Tile::kGates][2], h[2];
        if constexpr (!Tile::kAhead) ask(l, i, x[i]);
        PYEFF_UNROLL
        for (int g = 0; g < Tile::kGates; ++g) gates[g][0] = low_of<T>(x[i][g]), gates[g][1] = high_of<T>(x[i][g]);
        // The columns of a gate follow those of the one before.
        cell_.step(
            l, opaque(row(i)), opaque(unit(i)), gates,
            [&](int gate, int e) {
              return sums[(gate * Tile::kAcross + i % Tile::kAcross) * 4 + i / Tile::kAcross * 2 + e];
            },
            h);
        states[i] = pack2<T>(h[0], h[1]);
      }
      // Every block has read the old state by now.
      cluster_barrier();
      if (l + 1 < p_.layers) exchange(states);
    }
  }

 private:
  // Pair i of this thread: its token within the tile, its token and its first unit.
  PYEFF_DEVICE int row_in_tile(int i) const {
    return thread_ / kWarp % 8 * 16 + i / Tile::kAcross * 8 + thread_ % kWarp / 4;
  }
  PYEFF_DEVICE int unit_in_block(int i) const {
    return thread_ / (8 * kWarp) * (Tile::kUnits / 2) + i % Tile::kAcross * 8 + 2 * (thread_ % 4);
  }
  PYEFF_DEVICE int64_t row(int i) const { return row0_ + i / Tile::kAcross * 8; }
  PYEFF_DEVICE int64_t unit(int i) const { return block_ * Tile::kUnits + unit_in_block(i); }

  // The input's share of a pair.
  PYEFF_DEVICE void ask(int64_t l, int i, uint32_t (&x)[Tile::kGates]) const {
    const bool there = row(i) < p_.tokens;
    const T* from = static_cast<const T*>(p_.pre) + (there ? l * p_.pre_stride + row(i) * p_.pre_ld + unit(i) : 0);
    PYEFF_UNROLL
    for (int g = 0; g < Tile::kGates; ++g)
      x[g] = there ? load(reinterpret_cast<const uint32_t*>(from + g * p_.rank)) : 0u;
  }

  // What this block's threads copied is there, for the matrix units too.
  PYEFF_DEVICE void arrive() {
    copy_async_commit();
    copy_async_wait<0>();
    async_proxy_fence();
    barrier();
  }

  // The first state: what was given, or zeros.
  PYEFF_DEVICE void load_first(int64_t row0) {
    const T* h0 = static_cast<const T*>(p_.h0 ? p_.h0 : p_.w_hh);
    for (int panel = 0; panel < panels_; ++panel) {
      for (int i = thread_index(); i < Tile::kRows * 8; i += Tile::kThreads) {
        const int row = i / 8, chunk = i % 8;
        const bool there = p_.h0 && row0 + row < p_.tokens;
        copy_chunk<T>(state_ + panel * (Tile::kRows * kRowBytes) + chunk_at(row, chunk),
                      h0 + (there ? (row0 + row) * p_.rank + panel * 64 + chunk * 8 : 0), there ? 8 : 0, p_.h0_aligned);
      }
    }
    arrive();
  }

  // R h for 64 rows and this warpgroup's columns.
  PYEFF_DEVICE void start(float (&sums)[Tile::kOwn / 2]) {
    constexpr int kEightRows = 8 * kRowBytes;
    const char* rows = state_ + warp() / 4 % 2 * 64 * kRowBytes;
    const char* columns = weights_ + warp() / 8 * (Tile::kOwn * kRowBytes);
    wgmma_pin(sums);
    for (int panel = 0; panel < panels_; ++panel) {
      wgmma_fence();
      PYEFF_UNROLL
      for (int k = 0; k < 4; ++k) {
        wgmma<T, Tile::kOwn, false>(
            sums, wgmma_descriptor(rows + panel * (Tile::kRows * kRowBytes) + k * 32, 16, kEightRows),
            wgmma_descriptor(columns + panel * (Tile::kColumns * kRowBytes) + k * 32, 16, kEightRows),
            panel > 0 || k > 0);
      }
    }
    wgmma_commit();
  }

  // This block's units of the new state, to every block of the cluster.
  PYEFF_DEVICE void exchange(const uint32_t (&states)[Tile::kPairs]) {
    char* mine = state_ + block_ * (Tile::kRows * kRowBytes);
    PYEFF_UNROLL
    for (int i = 0; i < Tile::kPairs; ++i) {
      char* chunk = mine + chunk_at(row_in_tile(i), unit_in_block(i) / 8);
      store_shared(reinterpret_cast<uint32_t*>(chunk) + thread_ % 4, states[i]);
    }
    if (panels_ > 1) {
      barrier();
      for (int i = thread_; i < Tile::kRows * 8; i += Tile::kThreads) {
        char* from = mine + i * 16;
        const Vec16 v = load_shared16(from);
        for (int other = 1; other < panels_; ++other) store_cluster16(cluster_map(from, (block_ + other) % panels_), v);
      }
    }
    async_proxy_fence();
    cluster_barrier();
    // The other blocks' stores, too, come before what the matrix units read next.
    async_proxy_fence();
  }

  const RecurParams& p_;
  const RecurCell<T, C, true> cell_;
  char *weights_, *state_;
  const int panels_, block_;
  int thread_ = 0;
  int64_t row0_ = 0;
};

template <class T, Cell C>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(ResidentTile<C>::kThreads, 1)
    read_resident(const PYEFF_GRID_CONSTANT RecurParams p) {
  if constexpr (kHasWgmma) {
    Resident<T, C> resident(p);
    resident.load_weights();
    const int blocks = cluster_size();
    const int64_t step = grid_size_x() / blocks * int64_t{ResidentTile<C>::kRows};
    for (int64_t row0 = block_index_x() / blocks * int64_t{ResidentTile<C>::kRows}; row0 < p.tokens; row0 += step)
      resident.run(row0);
  } else {
    trap();
  }
}

}  // namespace pyeff::gpu
