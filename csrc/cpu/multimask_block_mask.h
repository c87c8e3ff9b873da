// Masks of blocks, bit for bit those of pyeff/reference/block_mask.py: integers, but for two counts that are the floor
// of one product of doubles.
#pragma once

#include "multimask.h"
#include "multimask_copy.h"
#include "philox.h"

namespace pyeff {
namespace PYEFF_ISA {

// What the second word of a counter says beside the number of a mask.
constexpr uint32_t kCentres = uint32_t(1) << 30, kScores = uint32_t(2) << 30;

// Draws the masks of one sample after the other, in memory for one.
class BlockMaskRow {
 public:
  BlockMaskRow(const MultimaskProblem& p, const MultimaskNoise& noise, const BlockMasks& masks)
      : p_(p), noise_(noise), masks_(masks), philox_(noise.seed) {
    while (bits_ < 16 && (int64_t(1) << bits_) < p.tokens) ++bits_;
    const int64_t steps = (p.tokens + kPhiloxStep - 1) / kPhiloxStep * kPhiloxStep;
    const int64_t words = 4 * (steps + kCentresAtOnce + (int64_t(1) << bits_) + p.tokens);
    memory_ = static_cast<char*>(scratch_allocate(words + p.tokens));
    scores_ = reinterpret_cast<uint32_t*>(memory_);
    centres_ = scores_ + steps;
    counts_ = centres_ + kCentresAtOnce;
    tied_ = reinterpret_cast<int32_t*>(counts_ + (int64_t(1) << bits_));
    kind_ = reinterpret_cast<uint8_t*>(memory_ + words);
  }
  ~BlockMaskRow() { scratch_free(memory_); }
  BlockMaskRow(const BlockMaskRow&) = delete;
  BlockMaskRow& operator=(const BlockMaskRow&) = delete;

  bool ready() const { return memory_; }

  void operator()(int64_t r) {
    const int64_t masks = p_.rows / p_.batch, b = r / masks, length = p_.lengths[b];
    const uint32_t mask = uint32_t(r % masks);
    const uint64_t sample = uint64_t(noise_.sample_ids ? noise_.sample_ids[b] : b);
    __builtin_memset(kind_, 0, size_t(p_.tokens));
    const int64_t centres = int64_t(double(length) * masks_.share);
    draw_blocks({mask + kCentres, sample}, centres, length);
    for (int64_t at = 0; at < p_.tokens; at += kPhiloxStep)
      philox_step(philox_, uint32_t(at / 4), {mask + kScores, sample}, scores_ + at);
    const int64_t kept = int64_t(double(length) * masks_.keep);
    take(at_most(length, at_least(0, masks_.of_kept ? kept : length - kept)), length);
    write(r, length);
  }

 private:
  // A multiple of every step.
  static constexpr int64_t kCentresAtOnce = 1024;
  static constexpr uint8_t kInBlock = 1, kTaken = 2;

  void draw_blocks(const PhiloxRow& row, int64_t count, int64_t length) {
    for (int64_t from = 0; from < count; from += kCentresAtOnce) {
      const int64_t here = at_most(kCentresAtOnce, count - from);
      for (int64_t at = 0; at < here; at += kPhiloxStep) {
        philox_step(philox_, uint32_t((from + at) / 4), row, centres_ + at);
      }
      for (int64_t i = 0; i < here; ++i) widen_block(int64_t((uint64_t(centres_[i]) * uint64_t(length)) >> 32));
    }
  }

  // The block around a centre, cut off at the borders of the sequence or the grid.
  void widen_block(int64_t centre) {
    const int64_t width = masks_.grid_width ? masks_.grid_width : p_.tokens, height = p_.tokens / width;
    const int64_t before = masks_.length / 2, after = masks_.length - 1 - before;
    const int64_t y = centre / width, x = centre % width;
    const int64_t left = at_least(0, x - before), right = at_most(width - 1, x + after);
    const int64_t top = masks_.grid_width ? at_least(0, y - before) : y;
    const int64_t bottom = masks_.grid_width ? at_most(height - 1, y + after) : y;
    for (int64_t row = top; row <= bottom; ++row)
      for (int64_t column = left; column <= right; ++column) kind_[row * width + column] = kInBlock;
  }

  // The first `count` of the tokens in blocks, then of the others, by their scores from the highest on; among equals
  // the first.
  void take(int64_t count, int64_t length) {
    int64_t in_block = 0;
    for (int64_t t = 0; t < length; ++t) in_block += kind_[t];
    const uint8_t chosen_from = count < in_block ? kInBlock : 0;
    if (count >= in_block)
      for (int64_t t = 0; t < length; ++t) kind_[t] |= uint8_t(kind_[t] << 1);
    int64_t left = count < in_block ? count : count - in_block;
    if (left == 0) return;
    // Scores are uniform: few have the same leading bits.
    const int shift = 32 - bits_;
    __builtin_memset(counts_, 0, sizeof(uint32_t) << bits_);
    for (int64_t t = 0; t < length; ++t) counts_[scores_[t] >> shift] += kind_[t] == chosen_from;
    uint32_t edge = (uint32_t(1) << bits_) - 1;
    for (; left > int64_t(counts_[edge]); --edge) left -= counts_[edge];
    int64_t tied = 0;
    for (int64_t t = 0; t < length; ++t) {
      if (kind_[t] != chosen_from) continue;
      const uint32_t bin = scores_[t] >> shift;
      if (bin > edge) kind_[t] |= kTaken;
      if (bin == edge) tied_[tied++] = int32_t(t);
    }
    for (; left > 0; --left) {
      int64_t best = 0;
      for (int64_t i = 1; i < tied; ++i)
        if (scores_[tied_[i]] > scores_[tied_[best]]) best = i;
      kind_[tied_[best]] |= kTaken;
      // What is behind moves up, so that the first of equals stays the first.
      --tied;
      for (int64_t i = best; i < tied; ++i) tied_[i] = tied_[i + 1];
    }
  }

  void write(int64_t r, int64_t length) const {
    int32_t* ids = masks_.ids_keep + r * p_.slots;
    int32_t* inverse = masks_.inverse + r * p_.tokens;
    int64_t kept = 0;
    for (int64_t t = 0; t < p_.tokens; ++t) {
      const bool keep = t < length && bool(kind_[t] & kTaken) == masks_.of_kept && kept < p_.slots;
      inverse[t] = keep ? int32_t(kept) : -1;
      if (keep) ids[kept++] = int32_t(t);
    }
    masks_.keep_len[r] = int32_t(kept);
    for (; kept < p_.slots; ++kept) ids[kept] = 0;
  }

  const MultimaskProblem& p_;
  const MultimaskNoise& noise_;
  const BlockMasks& masks_;
  Philox<7> philox_;
  int bits_ = 8;  // of a score, by which they are sorted into bins
  char* memory_;
  uint32_t *scores_, *centres_, *counts_;
  int32_t* tied_;
  uint8_t* kind_;
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
