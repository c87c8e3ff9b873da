// The multimask loss on the GPU, both directions.
#include "cuda/multimask_loss.cuh"
#include "cuda/scratch.h"

namespace pyeff::gpu {
namespace {

bool loss_by_vectors(const MultimaskLoss& p) {
  const int64_t size = size_of(p.sizes.number), width = p.sizes.width;
  return vectors(p.pred, width, size) && vectors(p.dpred, width, size) && vectors(p.target, width, 4) &&
         vectors(p.dtarget, width, 4);
}

// Which kernels a call takes, and their grids.
struct LossPlan {
  bool vector, tokens, channels, moments, resident = false;
  int columns = 0, threads = 0;
  int64_t units = 0;
  Grid of_channels{0}, of_tokens{0};
  double *of_loss = nullptr, *of_moments = nullptr;

  LossPlan(const MultimaskLoss& p, const Machine& machine, Scratch& scratch) : vector(loss_by_vectors(p)) {
    const MultimaskSizes& s = p.sizes;
    const int64_t rows = s.batch * s.tokens;
    const bool wanted = p.loss || p.dpred || p.dtarget;
    tokens = wanted && (p.kind == MultimaskKind::cosine || (p.loss && p.by_token));
    moments = p.moments != nullptr, channels = moments || (wanted && !tokens);
    units = div_up(s.width, vector && !moments ? 16 / size_of(s.number) : int64_t{4});
    if (tokens) {
      resident = s.width <= kWarp * 32;
      of_tokens = {resident ? div_up(rows, int64_t{kThreads / kWarp}) : rows};
    }
    if (channels) {
      columns = static_cast<int>(units < kThreads ? units : kThreads);
      const int lanes = kThreads / columns;
      threads = div_up(columns * lanes, kWarp) * kWarp;
      const int64_t across = div_up(units, int64_t{columns}), most = div_up(rows, int64_t{lanes});
      // Blocks that keep moments have many sums to write at their end.
      int64_t blocks = div_up(moments ? int64_t{3} * machine.processors : int64_t{8} * machine.processors, across);
      if (!moments && blocks < div_up(most, int64_t{8})) blocks = div_up(most, int64_t{8});
      of_channels = {blocks < most ? blocks : most, across};
    }
    if (p.loss && !p.by_token) {
      const int64_t blocks = tokens ? of_tokens.x : of_channels.x * of_channels.y;
      of_loss = scratch.take<double>(blocks * 8);
    }
    if (moments) of_moments = scratch.take<double>(of_channels.x * (1 + 4 * s.width) * 8);
  }
};

MultimaskLossParams loss_params(const MultimaskLoss& p, const LossPlan& plan) {
  MultimaskLossParams q{};
  const MultimaskSizes& s = p.sizes;
  q.pred = p.pred, q.target = p.target, q.inverse = p.inverse, q.lengths = p.lengths, q.count = p.count;
  q.grad = p.grad, q.dpred = p.dpred, q.dtarget = p.dtarget, q.by_token = p.by_token ? p.loss : nullptr;
  q.partial = plan.of_loss, q.batch = s.batch, q.tokens = s.tokens, q.scale = p.scale;
  q.masks = static_cast<int>(s.masks), q.width = static_cast<int>(s.width), q.units = static_cast<int>(plan.units);
  q.columns = plan.columns, q.beta = p.beta, q.kind = p.kind, q.grad_by_token = p.by_token;
  return q;
}

template <class T, bool Vector>
void run_loss(Launches& launches, const LossPlan& plan, const MultimaskLossParams& all) {
  if (plan.tokens) {
    if (plan.resident) {
      launches.run("multimask_loss_tokens", multimask_loss_tokens<T, Vector, true>, plan.of_tokens, kThreads,
                   kLossShared, all);
    } else {
      launches.run("multimask_loss_tokens", multimask_loss_tokens<T, Vector, false>, plan.of_tokens, kThreads,
                   TokenTile<T, Vector, false>::kShared + kLossShared, all);
    }
  }
  if (!plan.channels) return;
  MultimaskLossParams p = all;
  p.moments = plan.of_moments;
  if (plan.tokens) p.partial = nullptr, p.dpred = nullptr, p.dtarget = nullptr;
  if (plan.moments) {
    const int shared = plan.threads * kLossChunk<T, Vector, true> * static_cast<int>(sizeof(double));
    launches.run("multimask_loss_channels", multimask_loss_channels<T, Vector, true>, plan.of_channels, plan.threads,
                 shared > kLossShared ? shared : kLossShared, p);
  } else {
    launches.run("multimask_loss_channels", multimask_loss_channels<T, Vector, false>, plan.of_channels, plan.threads,
                 kLossShared, p);
  }
}

}  // namespace

int64_t multimask_loss_scratch(const MultimaskLoss& p, const Machine& machine) {
  Scratch scratch(nullptr);
  LossPlan(p, machine, scratch);
  return scratch.used();
}

const char* multimask_loss(const MultimaskLoss& p, void* base, const Machine& machine, void* stream) {
  Scratch scratch(base);
  const LossPlan plan(p, machine, scratch);
  Launches launches(stream);
  with_chunks(p.sizes.number, plan.vector, [&](auto type, auto by_vectors) {
    run_loss<decltype(type), decltype(by_vectors)::value>(launches, plan, loss_params(p, plan));
  });
  if (plan.of_loss) {
    const int64_t blocks = plan.tokens ? plan.of_tokens.x : plan.of_channels.x * plan.of_channels.y;
    const MultimaskTotalParams total{plan.of_loss, p.count, p.loss, blocks, 1, p.scale};
    launches.run("multimask_loss_total", multimask_loss_total<double>, {1}, kThreads, kLossShared, total);
  }
  if (plan.moments) {
    const int64_t width = 1 + 4 * p.sizes.width;
    const MultimaskTotalParams total{plan.of_moments, nullptr, p.moments, plan.of_channels.x, width, 1.0};
    launches.run("multimask_loss_moments", multimask_loss_moments<double>, {div_up(width, int64_t{kWarp})}, kThreads,
                 kMomentsShared, total);
  }
  return launches.error;
}

}  // namespace pyeff::gpu
