// The loss of many students against one target: the target of a token is read once and stays for all masks, predictions
// that are not hidden are not read, and the derivative is written where they are.
#pragma once

#include "cuda/multimask_token.cuh"

namespace pyeff::gpu {

struct MultimaskLossParams {
  MultimaskRows pred, target;
  const int32_t *inverse, *lengths;
  const int64_t* count;  // or null
  const float* grad;     // from above: a number, [R, T], or null
  void* dpred;
  float* dtarget;
  float* by_token;  // [R, T]: the loss; or null, and then
  double* partial;  // its sum for each block; or null
  double* moments;  // [blocks along x, 1 + 4 D], or null
  int64_t batch, tokens;
  double scale;
  int masks, width, units, columns;  // columns: chunks that a block has side by side
  float beta;
  MultimaskKind kind;
  bool grad_by_token;
};

// What the loss and its derivatives are multiplied with, but for what comes from above.
PYEFF_DEVICE double loss_factor(const int64_t* count, double scale) {
  return count ? scale / static_cast<double>(load(count)) : scale;
}
PYEFF_DEVICE float loss_gradient(const MultimaskLossParams& p, float factor, int64_t at) {
  return p.grad ? factor * load(p.grad + (p.grad_by_token ? at : 0)) : factor;
}

// What a difference counts, and the slope there; NaN stays NaN.
PYEFF_DEVICE float distance_of(float d, MultimaskKind kind, float beta) {
  if (kind == MultimaskKind::l2) return d * d;
  const float size = fabsf(d);
  if (kind == MultimaskKind::smooth_l1 && beta > 0.0f) return size < beta ? 0.5f * d * d / beta : size - 0.5f * beta;
  return size;
}
PYEFF_DEVICE float slope_of(float d, MultimaskKind kind, float beta) {
  if (kind == MultimaskKind::l2) return 2.0f * d;
  if (kind == MultimaskKind::smooth_l1 && fabsf(d) < beta) return d / beta;
  return d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : d;
}

PYEFF_DEVICE bool is_hidden(const MultimaskLossParams& p, int64_t row, int64_t token) {
  return load(p.inverse + row * p.tokens + token) < 0;
}

// Adds over the block, in a fixed order; the first thread gets the sum. `shared` has a place for each warp.
PYEFF_DEVICE double block_total(double x, double* shared) {
  PYEFF_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  if (lane() == 0) store_shared(shared + warp(), x);
  barrier();
  double sum = 0.0;
  for (int i = 0; i < block_size() / kWarp && thread_index() == 0; ++i) sum += load_shared(shared + i);
  barrier();
  return sum;
}

constexpr int kLossShared = kThreads / kWarp * static_cast<int>(sizeof(double));

// What a thread has of a token's channels: with moments half as many, for their sums to stay in registers.
template <class T, bool Vector, bool WithMoments>
constexpr int kLossChunk = WithMoments ? 4 : kMaskChunk<T, Vector>;

// Blocks on an SM at least; the compilers for newer machines want more registers for the same text than half of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kLossBlocks = 1;
#else
constexpr int kLossBlocks = 2;
#endif

// Every kind of which elements do not need each other. A thread has a chunk of channels of every so manieth token, so
// that it can keep their moments; in double precision, which no mean is too large for.
template <class T, bool Vector, bool WithMoments>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, kLossBlocks)
    multimask_loss_channels(const PYEFF_GRID_CONSTANT MultimaskLossParams p) {
  constexpr int N = kLossChunk<T, Vector, WithMoments>, kAhead = 8;
  const int lanes = block_size() / p.columns, of_lanes = thread_index() / p.columns;
  const int unit = block_index_y() * p.columns + thread_index() % p.columns, column = unit * N, left = p.width - column;
  const bool mine = of_lanes < lanes && unit < p.units, measured = p.partial || p.dpred || p.dtarget;
  const float factor = static_cast<float>(loss_factor(p.count, p.scale));
  double total = 0.0, hidden = 0.0, sums[WithMoments ? 4 : 1][N] = {};
  const int64_t rows = p.batch * p.tokens, step = int64_t{grid_size_x()} * lanes;
  for (int64_t i = int64_t{block_index_x()} * lanes + of_lanes; i < rows && mine; i += step) {
    const int64_t sample = i / p.tokens, token = i - sample * p.tokens, row0 = sample * p.masks;
    const bool here = token < clamped_length(p.lengths, sample, p.tokens);
    float y[N] = {}, dy[N] = {}, sum[N / 4] = {};
    int of_token = 0;
    if (here) read_floats<N, Vector>(y, token_of<float>(p.target, sample, token) + column, left);
    for (int first = 0; first < p.masks; first += kAhead) {
      bool read[kAhead];
      Piece<T, Vector, N> piece[kAhead];
      PYEFF_UNROLL
      for (int m = 0; m < kAhead; ++m) read[m] = here && first + m < p.masks && is_hidden(p, row0 + first + m, token);
      PYEFF_UNROLL
      for (int m = 0; m < kAhead; ++m)
        if (read[m]) piece[m].read(token_of<T>(p.pred, row0 + first + m, token) + column, left);
      PYEFF_UNROLL
      for (int m = 0; m < kAhead; ++m) {
        if (first + m >= p.masks) continue;
        const int64_t at = (row0 + first + m) * p.tokens + token;
        float x[N], dx[N] = {};
        piece[m].numbers(x);
        if (read[m] && measured) {
          const float gradient = loss_gradient(p, factor, at);
          PYEFF_UNROLL
          for (int j = 0; j < N; ++j) {
            // Past the end of a row both are zero, and so is what that counts.
            const float d = x[j] - y[j];
            sum[j / 4] += distance_of(d, p.kind, p.beta);
            dx[j] = gradient * slope_of(d, p.kind, p.beta);
            if constexpr (!WithMoments) dy[j] -= dx[j];
          }
        }
        if constexpr (WithMoments) {
          if (read[m]) {
            ++of_token;
            PYEFF_UNROLL
            for (int j = 0; j < N; ++j) {
              const double wide = x[j];
              sums[2][j] += wide, sums[3][j] += wide * wide;
            }
          }
        }
        if (p.dpred) {
          Piece<T, Vector, N> to;
          to.set(dx);
          to.write(static_cast<T*>(p.dpred) + at * p.width + column, left);
        }
      }
    }
    if constexpr (!WithMoments) {
      if (p.dtarget) write_floats<N, Vector>(p.dtarget + i * p.width + column, dy, left);
    }
    // By fours, so that the loss is the same with moments.
    PYEFF_UNROLL
    for (int j = 0; j < N / 4; ++j) total += sum[j];
    if constexpr (WithMoments) {
      // What is hidden from nobody may be anything.
      if (of_token == 0) continue;
      const double count = of_token;
      hidden += count;
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) {
        const double wide = y[j];
        sums[0][j] += count * wide, sums[1][j] += count * wide * wide;
      }
    }
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  if (p.partial) {
    total = block_total(total, shared);
    if (thread_index() == 0) store(p.partial + int64_t{block_index_y()} * grid_size_x() + block_index_x(), total);
  }
  if constexpr (WithMoments) {
    double* to = p.moments + block_index_x() * (1 + 4 * int64_t{p.width});
    hidden = block_total(mine && unit == 0 ? hidden : 0.0, shared);
    if (thread_index() == 0 && block_index_y() == 0) store(to, hidden);
    // The lanes in their order, one sum after the other.
    PYEFF_UNROLL
    for (int s = 0; s < 4; ++s) {
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) store_shared(shared + j * block_size() + thread_index(), sums[s][j]);
      barrier();
      if (mine && of_lanes == 0) {
        PYEFF_UNROLL
        for (int j = 0; j < N; ++j) {
          double sum = 0.0;
          for (int l = 0; l < lanes; ++l)
            sum += load_shared(shared + j * block_size() + l * p.columns + thread_index());
          if (j < left) store(to + 1 + s * int64_t{p.width} + column + j, sum);
        }
      }
      barrier();
    }
  }
}

// Every kind, with the sum over a token's channels: for the cosine, and for losses by token. A warp, or for long tokens
// a block, has a token of all masks.
constexpr float kCosineLeast = 1e-16f;  // the square of the length below which a vector has no direction

template <class T, bool Vector, bool Resident>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, Vector && sizeof(T) == 2 ? kLossBlocks : 1)
    multimask_loss_tokens(const PYEFF_GRID_CONSTANT MultimaskLossParams p) {
  using Tile = TokenTile<T, Vector, Resident>;
  using Row = TokenRow<T, Vector, Resident>;
  constexpr int N = Tile::kNumbers, C = Tile::kChunks;
  const int64_t i = Tile::token();
  const bool mine = i < p.batch * p.tokens, cosine = p.kind == MultimaskKind::cosine;
  const float factor = static_cast<float>(loss_factor(p.count, p.scale));
  double total = 0.0;
  if (mine) {
    const int64_t sample = i / p.tokens, token = i - sample * p.tokens;
    const bool here = token < clamped_length(p.lengths, sample, p.tokens);
    const float* target = token_of<float>(p.target, sample, token);
    float* dtarget = p.dtarget ? p.dtarget + i * p.width : nullptr;
    float kept[C][N] = {}, dy[C][N] = {};
    float yy = 0.0f;
    for (int c = 0, column = Row::column_of(0); column < p.width; ++c, column += Tile::kMembers * N) {
      float y[N] = {};
      if (here) read_floats<N, Vector>(y, target + column, p.width - column);
      PYEFF_UNROLL
      for (int j = 0; j < N; ++j) yy = fmaf(y[j], y[j], yy);
      if constexpr (!Resident) {
        if (dtarget) write_floats<N, Vector>(dtarget + column, dy[0], p.width - column);
      }
    }
    if constexpr (Resident) {
      PYEFF_UNROLL
      for (int c = 0; c < C; ++c)
        if (here && Row::column_of(c) < p.width)
          read_floats<N, Vector>(kept[c], target + Row::column_of(c), p.width - Row::column_of(c));
    }
    const auto of_target = [&](int c, int column, float (&y)[N]) {
      if constexpr (Resident) {
        PYEFF_UNROLL
        for (int j = 0; j < N; ++j) y[j] = kept[c][j];
      } else {
        read_floats<N, Vector>(y, target + column, p.width - column);
      }
    };
    if (cosine) yy = Tile::sum(yy);
    for (int m = 0; m < p.masks; ++m) {
      const int64_t row = sample * p.masks + m, at = row * p.tokens + token;
      T* dpred = p.dpred ? static_cast<T*>(p.dpred) + at * p.width : nullptr;
      if (!here || !is_hidden(p, row, token)) {
        for (int column = Row::column_of(0); dpred && column < p.width; column += Tile::kMembers * N)
          Piece<T, Vector>().write(dpred + column, p.width - column);
        if (p.by_token && Tile::member() == 0) store(p.by_token + at, 0.0f);
        continue;
      }
      Row pred;
      pred.open(token_of<T>(p.pred, row, token), p.width);
      float sum = 0.0f, xx = 0.0f;
      pred.each([&](int c, int column, const float (&x)[N]) {
        float y[N];
        of_target(c, column, y);
        PYEFF_UNROLL
        for (int j = 0; j < N; ++j) {
          if (cosine) {
            sum = fmaf(x[j], y[j], sum), xx = fmaf(x[j], x[j], xx);
          } else {
            sum += distance_of(x[j] - y[j], p.kind, p.beta);
          }
        }
      });
      sum = Tile::sum(sum);
      float cos = 0.0f, share = 0.0f, of_x = 0.0f, of_y = 0.0f;
      if (cosine) {
        xx = Tile::sum(xx);
        // As numbers that are NaN should stay.
        const float nx = xx < kCosineLeast ? kCosineLeast : xx, ny = yy < kCosineLeast ? kCosineLeast : yy;
        share = 1.0f / (sqrtf(nx) * sqrtf(ny));
        cos = sum * share, sum = 1.0f - cos;
        of_x = xx < kCosineLeast ? 0.0f : cos / xx, of_y = yy < kCosineLeast ? 0.0f : cos / yy;
      }
      if (p.by_token && Tile::member() == 0) store(p.by_token + at, sum * factor);
      if (Tile::member() == 0) total += sum;
      if (!dpred && !dtarget) continue;
      const float gradient = loss_gradient(p, factor, at);
      pred.each([&](int c, int column, const float (&x)[N]) {
        const int left = p.width - column;
        float y[N], dx[N], more[N] = {};
        of_target(c, column, y);
        if constexpr (!Resident) {
          if (dtarget) read_floats<N, Vector>(more, dtarget + column, left);
        }
        PYEFF_UNROLL
        for (int j = 0; j < N; ++j) {
          if (cosine) {
            dx[j] = gradient * (x[j] * of_x - y[j] * share);
            more[j] += gradient * (y[j] * of_y - x[j] * share);
          } else {
            dx[j] = gradient * slope_of(x[j] - y[j], p.kind, p.beta);
            more[j] -= dx[j];
          }
          if constexpr (Resident) dy[c][j] += more[j];
        }
        if constexpr (!Resident) {
          if (dtarget) write_floats<N, Vector>(dtarget + column, more, left);
        }
        if (dpred) {
          Piece<T, Vector> to;
          to.set(dx);
          to.write(dpred + column, left);
        }
      });
    }
    if constexpr (Resident) {
      PYEFF_UNROLL
      for (int c = 0; c < C; ++c) {
        const int column = Row::column_of(c);
        if (dtarget && column < p.width) write_floats<N, Vector>(dtarget + column, dy[c], p.width - column);
      }
    }
  }
  if (p.partial) {
    total = block_total(total, reinterpret_cast<double*>(shared_memory() + Tile::kShared));
    if (thread_index() == 0) store(p.partial + block_index_x(), total);
  }
}

struct MultimaskTotalParams {
  const double* partial;  // [count], or [count, width]
  const int64_t* of;
  void* to;
  int64_t count, width;
  double scale;
};

// The blocks' sums in a fixed order.
template <class Sum>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1)
    multimask_loss_total(const PYEFF_GRID_CONSTANT MultimaskTotalParams p) {
  Sum sum = 0;
  for (int64_t i = thread_index(); i < p.count; i += kThreads) sum += load(p.partial + i);
  sum = block_total(sum, reinterpret_cast<double*>(shared_memory()));
  if (thread_index() == 0) store(static_cast<float*>(p.to), static_cast<float>(sum * loss_factor(p.of, p.scale)));
}

constexpr int kMomentsShared = kThreads * static_cast<int>(sizeof(double));

// A lane for each moment, a warp for each share of the blocks.
template <class Sum>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(kThreads, 1)
    multimask_loss_moments(const PYEFF_GRID_CONSTANT MultimaskTotalParams p) {
  constexpr int kWarps = kThreads / kWarp;
  const int64_t at = int64_t{block_index_x()} * kWarp + lane();
  Sum sum = 0;
  for (int64_t i = p.count * warp() / kWarps; i < p.count * (warp() + 1) / kWarps && at < p.width; ++i)
    sum += load(p.partial + i * p.width + at);
  double* shared = reinterpret_cast<double*>(shared_memory());
  store_shared(shared + thread_index(), sum);
  barrier();
  if (warp() > 0 || at >= p.width) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += load_shared(shared + w * kWarp + lane());
  store(static_cast<double*>(p.to) + at, sum);
}

}  // namespace pyeff::gpu
