// How a call of READ is cut into turns over the tokens, and where its scratch lies. Host code.
#pragma once

#include <cstdint>

#include "cuda/read.h"
#include "cuda/scratch.h"

namespace pyeff::gpu {

// The sizes that every part of a call needs.
struct ReadSizes {
  int64_t bytes;  // of a number
  int64_t gates, derivatives;
  int64_t rows;    // gates * rank
  int64_t padded;  // the rank, up to whole chunks of 16 bytes
  int64_t ld;      // the width, likewise
  int64_t layers, tokens, width, rank;

  explicit ReadSizes(const ReadProblem& p)
      : bytes(p.number == Number::f32 ? 4 : 2),
        gates(p.cell == Cell::rnn   ? 1
              : p.cell == Cell::gru ? 3
                                    : 4),
        derivatives(p.cell == Cell::rnn ? 1 : 4),
        rows(gates * p.rank),
        padded(whole_chunks(p.rank)),
        ld(whole_chunks(p.width)),
        layers(p.layers),
        tokens(p.tokens),
        width(p.width),
        rank(p.rank) {}

  int64_t whole_chunks(int64_t n) const { return (n * bytes + 15) / 16 * 16 / bytes; }
  // Columns of a row of pre-activations in scratch: even, so that two neighbours lie in one word.
  int64_t pre_ld() const { return whole_chunks(rows); }

  // Tokens of one turn when each needs this much scratch: a multiple of the kernels' tiles.
  int64_t turn(int64_t bytes_a_token, int64_t limit) const {
    constexpr int64_t kTile = 128, kMost = int64_t{1} << 22;  // the grid's second dimension ends at 65535 tiles
    int64_t most = bytes_a_token > 0 ? limit / bytes_a_token / kTile * kTile : kMost;
    if (most < kTile) most = kTile;
    if (most > kMost) most = kMost;
    if (tokens <= most) return tokens;
    // Turns of about the same size.
    const int64_t turns = (tokens + most - 1) / most;
    return ((tokens + turns - 1) / turns + kTile - 1) / kTile * kTile;
  }
};

// What the fold leaves behind.
struct FoldedWeights {
  void* weight;
  float *bias, *sums;
  FoldedWeights(const ReadSizes& s, Scratch& scratch)
      : weight(scratch.take(s.rows * s.ld * s.bytes)),
        bias(scratch.take<float>(s.rows * 4)),
        sums(scratch.take<float>(s.rows * 4)) {}
};

// One turn of the forward: tokens [first, first + tokens), and the arrays as this turn sees them.
struct ForwardTurn {
  int64_t first, tokens;
  void* pre;
  int64_t pre_stride, pre_ld;
  float *rstd, *mean;  // null where neither kept nor needed
  bool stats_given;    // they are there already, and are only read
  int64_t stats_stride;
  void* h;
  int64_t h_stride, h_period;
  void *c, *c_last, *gates, *out;
  float* total;
};

// The kernels' launches, one after another on a stream; the first error stops those that follow.
const char* fold(const ReadProblem&, const FoldedWeights&, void* stream);
const char* project(const ReadProblem&, const FoldedWeights&, const ForwardTurn&, const Machine&, void* stream);
const char* recur(const ReadProblem&, const ForwardTurn&, const Machine&, void* stream);

}  // namespace pyeff::gpu
