// Masks of blocks, a row of the plan a block of threads: integers alone, but for two products that count.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/multimask_plan.h"
#include "cuda/philox.cuh"

namespace pyeff::gpu {

constexpr int kDrawWarps = kThreads / kWarp;
constexpr int kDrawCentres = 4 * kThreads;  // that lie in shared memory at once
// Bytes of shared memory beside the scores: centres, and what sums over the block need.
constexpr int kDrawShared = 4 * kDrawCentres + 4 * 2 * kDrawWarps;
constexpr int kDrawToken = 5;  // bytes: a word, and whether the token lies in a block

// A thread owns as many neighbouring tokens; an odd number, so that those of a warp lie in different banks.
inline int draw_tokens(int64_t tokens) { return static_cast<int>(div_up(tokens, int64_t{kThreads}) | 1); }

struct MultimaskDrawParams {
  const int64_t *seed, *sample_ids;
  const int32_t* lengths;
  int32_t *ids_keep, *keep_len, *kept_slot;
  char* scratch;  // of rows whose scores shared memory does not hold
  double keep, share;
  int64_t slots;
  int masks, tokens, grid_width, below, above, own;  // of a block about its centre; tokens of a thread
  bool inverse;
};

// The scores of a row: where they lie.
template <bool Shared>
struct DrawScores {
  uint32_t* words;
  uint8_t* blocks;

  PYEFF_DEVICE DrawScores(char* base, int room)
      : words(reinterpret_cast<uint32_t*>(base)), blocks(reinterpret_cast<uint8_t*>(base + 4 * int64_t{room})) {}
  PYEFF_DEVICE void set(int t, uint32_t word) const {
    if constexpr (Shared) {
      store_shared(words + t, word);
    } else {
      store(words + t, word);
    }
  }
  PYEFF_DEVICE void mark(int t, uint8_t block) const {
    if constexpr (Shared) {
      store_shared(blocks + t, block);
    } else {
      store(blocks + t, block);
    }
  }
  PYEFF_DEVICE uint64_t get(int t) const {
    if constexpr (Shared) {
      return uint64_t{load_shared(blocks + t)} << 32 | load_shared(words + t);
    } else {
      return uint64_t{load(blocks + t)} << 32 | load(words + t);
    }
  }
};

PYEFF_DEVICE int warp_count(int x) {
  PYEFF_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The sum over the block, for every thread; `turn` alternates, so that one barrier is enough.
PYEFF_DEVICE int block_count(int x, int* shared, int turn) {
  x = warp_count(x);
  int* of_warps = shared + (turn & 1) * kDrawWarps;
  if (lane() == 0) store_shared(of_warps + warp(), x);
  barrier();
  int sum = 0;
  for (int w = 0; w < kDrawWarps; ++w) sum += load_shared(of_warps + w);
  return sum;
}

// What the threads before this one have, and in `total` all of them.
PYEFF_DEVICE int block_before(int x, int* shared, int turn, int* total) {
  int before = x;
  PYEFF_UNROLL
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = shuffle(before, lane() >= step ? lane() - step : lane());
    if (lane() >= step) before += other;
  }
  int* of_warps = shared + (turn & 1) * kDrawWarps;
  if (lane() == kWarp - 1) store_shared(of_warps + warp(), before);
  barrier();
  before -= x, *total = 0;
  for (int w = 0; w < kDrawWarps; ++w) {
    const int count = load_shared(of_warps + w);
    if (w < warp()) before += count;
    *total += count;
  }
  return before;
}

// Marks those of a thread's tokens [first, last) that lie in the block about a centre.
template <bool Shared>
PYEFF_DEVICE void mark_block(const DrawScores<Shared>& scores, const MultimaskDrawParams& p, int centre, int first,
                             int last) {
  if (p.grid_width == 0) {
    const int begin = centre - p.below > first ? centre - p.below : first;
    const int stop = centre + p.above + 1 < last ? centre + p.above + 1 : last;
    for (int t = begin; t < stop; ++t) scores.mark(t, 1);
    return;
  }
  const int y = centre / p.grid_width, x = centre - y * p.grid_width, height = p.tokens / p.grid_width;
  const int left = x > p.below ? x - p.below : 0, right = x + p.above < p.grid_width ? x + p.above + 1 : p.grid_width;
  const int top = y > p.below ? y - p.below : 0, bottom = y + p.above < height ? y + p.above + 1 : height;
  if (bottom * p.grid_width <= first || top * p.grid_width >= last) return;
  for (int line = top; line < bottom; ++line) {
    const int begin = line * p.grid_width + left > first ? line * p.grid_width + left : first;
    const int stop = line * p.grid_width + right < last ? line * p.grid_width + right : last;
    for (int t = begin; t < stop; ++t) scores.mark(t, 1);
  }
}

template <bool Shared>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 2)
    multimask_draw_kernel(const PYEFF_GRID_CONSTANT MultimaskDrawParams p) {
  const int64_t row = block_index_x();
  const int sample = static_cast<int>(row / p.masks);
  const uint32_t mask = static_cast<uint32_t>(row - int64_t{sample} * p.masks);
  const int64_t seed = load(p.seed), name = p.sample_ids ? load(p.sample_ids + sample) : sample;
  int length = load(p.lengths + sample);
  length = length < 0 ? 0 : length > p.tokens ? p.tokens : length;
  int* centres = reinterpret_cast<int*>(shared_memory());
  int* sums = centres + kDrawCentres;
  const int room = p.own * kThreads;
  const DrawScores<Shared> scores(Shared ? shared_memory() + kDrawShared : p.scratch + row * room * int64_t{kDrawToken},
                                  room);

  // A thread's own tokens.
  const int first = thread_index() * p.own < length ? thread_index() * p.own : length;
  const int last = first + p.own < length ? first + p.own : length;
  for (int t = first; t < last; ++t) {
    // Four tokens share a counter, and mostly a thread.
    const PhiloxWords words = philox_of_sample(seed, name, mask, kPhiloxScores, static_cast<uint32_t>(t / 4));
    scores.mark(t, 0);
    scores.set(t, t % 4 == 0 ? words.x[0] : t % 4 == 1 ? words.x[1] : t % 4 == 2 ? words.x[2] : words.x[3]);
  }
  const double wanted = static_cast<double>(length) * p.share;
  const int64_t count = static_cast<int64_t>(wanted);
  for (int64_t begin = 0; begin < count; begin += kDrawCentres) {
    barrier();  // the centres before have been looked at
    const PhiloxWords words =
        philox_of_sample(seed, name, mask, kPhiloxCentres, static_cast<uint32_t>(begin / 4 + thread_index()));
    PYEFF_UNROLL
    for (int i = 0; i < 4; ++i)
      store_shared(centres + 4 * thread_index() + i,
                   static_cast<int>(uint64_t{words.x[i]} * static_cast<uint32_t>(length) >> 32));
    barrier();
    const int here = count - begin < kDrawCentres ? static_cast<int>(count - begin) : kDrawCentres;
    for (int i = 0; i < here; ++i) mark_block(scores, p, load_shared(centres + i), first, last);
  }

  // The score of the last one that is drawn, bit by bit.
  int64_t kept_count = static_cast<int64_t>(static_cast<double>(length) * p.keep);
  kept_count = kept_count < 0 ? 0 : kept_count > length ? length : kept_count;
  const int drawn = static_cast<int>(p.inverse ? kept_count : length - kept_count);
  uint64_t least = 0;
  int turn = 0;
  for (int bit = 32; bit >= 0; --bit, ++turn) {
    const uint64_t higher = least | uint64_t{1} << bit;
    int found = 0;
    for (int t = first; t < last; ++t) found += scores.get(t) >= higher;
    if (block_count(found, sums, turn) >= drawn) least = higher;
  }
  int larger = 0, equal = 0;
  for (int t = first; t < last; ++t) {
    const uint64_t score = scores.get(t);
    larger += score > least, equal += score == least;
  }
  // Where none is drawn, no score is as large as all bits together, or it does not count.
  const int left = drawn > 0 ? drawn - block_count(larger, sums, turn++) : 0;
  int total = 0;
  const int before = block_before(equal, sums, turn++, &total);
  int kept = 0, seen = before;
  for (int t = first; t < last; ++t) {
    const uint64_t score = scores.get(t);
    const bool taken = drawn > 0 && (score > least || (score == least && seen++ < left));
    scores.mark(t, taken == p.inverse);
    kept += taken == p.inverse;
  }
  int64_t slot = block_before(kept, sums, turn++, &total);
  int32_t* ids = p.ids_keep + row * p.slots;
  int32_t* slots = p.kept_slot + row * p.tokens;
  for (int t = first; t < last; ++t) {
    const bool here = scores.get(t) >> 32 != 0 && slot < p.slots;
    store(slots + t, here ? static_cast<int32_t>(slot) : -1);
    if (here) store(ids + slot, t);
    slot += here;
  }
  for (int t = length + thread_index(); t < p.tokens; t += kThreads) store(slots + t, -1);
  const int64_t filled = total < p.slots ? total : p.slots;
  for (int64_t k = filled + thread_index(); k < p.slots; k += kThreads) store(ids + k, 0);
  if (thread_index() == 0) store(p.keep_len + row, static_cast<int32_t>(filled));
}

}  // namespace pyeff::gpu
