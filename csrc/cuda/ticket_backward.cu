// The ticket's backward on the GPU: the gradient before the activation, then the products with it.
#include "cuda/scratch.h"
#include "cuda/ticket_launch.cuh"

namespace pyeff::gpu {
namespace {

static_assert(TicketOuterTile<bf16, 128>::kShared <= kSharedAnywhere, "");
static_assert(TicketOuterTile<float, 64>::kShared <= kSharedAnywhere, "");
static_assert(TicketOuterWgmmaTile<64>::kShared <= kSharedHopper, "");
static_assert(2 * TicketOuterWgmmaTile<128>::kShared <= kSharedHopper, "");

// The gradient of the values: tiles and parts.
struct OuterPlan {
  bool wgmma;
  int64_t rows, columns, parts, tiles, splits;

  OuterPlan(const TicketProblem& p, const Machine& machine) : wgmma(machine.wgmma && bytes_of(p.number) == 2) {
    const int64_t narrow = bytes_of(p.number) == 2 ? 64 : 32;
    rows = p.block_out <= narrow ? narrow : 2 * narrow;
    columns = wgmma && rows == 64 ? TicketOuterWgmmaTile<64>::kColumns : TicketOuterTile<bf16, 128>::kColumns;
    parts = div_up(p.block_out, rows);
    tiles = div_up(p.columns() * p.block_in, columns);
    // About as many tiles have work; and a part should have a few stages.
    const int64_t live = div_up(p.blocks * p.block_in, columns) * parts, steps = div_up(p.tokens, int64_t{256});
    splits = best_splits(live > 0 ? live : 1, machine.processors);
    const int64_t of_a_part = count(p) * 4, room = of_a_part ? machine.scratch_limit / of_a_part : 1;
    if (splits > steps) splits = steps;
    if (splits > room) splits = room;
    if (splits < 1) splits = 1;
  }
  static int64_t count(const TicketProblem& p) { return p.blocks * p.block_out * p.block_in; }
};

// What the backward cuts from its scratch.
struct TicketScratch {
  bool prepared;  // the gradient is written anew
  int64_t stride, splits;
  void* grad = nullptr;
  float *bias = nullptr, *partial = nullptr;

  TicketScratch(const TicketProblem& p, const TicketBackward& b, const OuterPlan& plan, const Machine& machine,
                Scratch& scratch)
      : prepared(p.activation != TicketActivation::none && (b.dx || b.dvalues)) {
    const int64_t bytes = bytes_of(p.number), chunk = 16 / bytes;
    stride = div_up(p.out, chunk) * chunk;
    // It only moves memory: as many blocks as a multiprocessor holds.
    splits = best_splits(div_up(p.out, int64_t{kGradientColumns}), 8 * machine.processors);
    const int64_t steps = div_up(p.tokens, int64_t{64});
    if (splits > steps) splits = steps;
    if (splits < 1) splits = 1;
    if (prepared) grad = scratch.take(p.tokens * stride * bytes);
    if (b.dbias) bias = scratch.take<float>(splits * p.out * 4);
    if (b.dvalues && plan.splits > 1) partial = scratch.take<float>(plan.splits * OuterPlan::count(p) * 4);
  }
};

template <class T>
void sum_parts(Launches& launches, const float* partial, void* to, int64_t count, int64_t splits) {
  const TicketSumParams params{partial, to, count, static_cast<int>(splits)};
  const int64_t blocks = div_up(count, int64_t{kThreads});
  launches.run("ticket_sum", ticket_sum<T>, {blocks < (1 << 20) ? blocks : 1 << 20}, kThreads, 0, params);
}

template <class T, int Rows>
void run_outer_tile(Launches& launches, const TicketOuterParams& params, bool wgmma) {
  using Tile = TicketOuterTile<T, Rows>;
  const Grid grid{int64_t{params.side.lines} * params.parts * params.tiles, params.splits};
  if constexpr (sizeof(T) == 2) {
    if (wgmma) {
      launches.run("ticket_outer_wgmma", ticket_outer_wgmma<T, Rows>, grid, kThreads,
                   TicketOuterWgmmaTile<Rows>::kShared, params);
      return;
    }
  }
  launches.run("ticket_outer", ticket_outer<T, Rows>, grid, kThreads, Tile::kShared, params);
}

template <class T>
void run_outer(Launches& launches, const TicketProblem& p, const TicketBackward& b, const OuterPlan& plan,
               const TicketScratch& local, const void* grad, int64_t grad_stride) {
  const int64_t size = sizeof(T);
  TicketOuterParams params{};
  params.grad = grad, params.x = p.x, params.to = b.dvalues, params.partial = local.partial;
  params.side = row_side(p);
  params.grad_stride = grad_stride, params.x_stride = p.x_stride, params.tokens = p.tokens;
  params.out = static_cast<int>(p.out), params.width = static_cast<int>(p.width);
  params.block_out = static_cast<int>(p.block_out), params.block_in = static_cast<int>(p.block_in);
  params.parts = static_cast<int>(plan.parts), params.tiles = static_cast<int>(plan.tiles);
  params.splits = static_cast<int>(plan.splits);
  params.grad_aligned = p.block_out % kChunk<T> == 0 && aligned_to(grad, 16) && grad_stride * size % 16 == 0;
  params.x_aligned = p.block_in % kChunk<T> == 0 && aligned_to(p.x, 16) && p.x_stride * size % 16 == 0;
  params.pairs = p.block_in % 2 == 0 && aligned_to(b.dvalues, 4);
  constexpr int kNarrow = sizeof(T) == 2 ? 64 : 32;
  if (plan.rows == kNarrow) {
    run_outer_tile<T, kNarrow>(launches, params, plan.wgmma);
  } else {
    run_outer_tile<T, 2 * kNarrow>(launches, params, plan.wgmma);
  }
  if (plan.splits > 1) sum_parts<T>(launches, local.partial, b.dvalues, OuterPlan::count(p), plan.splits);
}

}  // namespace

int64_t ticket_backward_scratch(const TicketProblem& p, const TicketBackward& b, const Machine& machine) {
  Scratch scratch(nullptr);
  TicketScratch(p, b, OuterPlan(p, machine), machine, scratch);
  return scratch.used();
}

const char* ticket_backward(const TicketProblem& p, const TicketBackward& b, void* base, const Machine& machine,
                            void* stream) {
  Scratch scratch(base);
  const OuterPlan plan(p, machine);
  const TicketScratch local(p, b, plan, machine, scratch);
  Launches launches(stream);
  with_number(p.number, [&](auto number) {
    using T = decltype(number);
    const void* grad = local.prepared ? local.grad : b.grad;
    const int64_t stride = local.prepared ? local.stride : b.grad_stride;
    if (local.prepared || b.dbias) {
      TicketGradientParams params{b.grad,       b.saved,       local.grad,
                                  local.bias,   b.grad_stride, local.stride,
                                  p.tokens,     p.out,         static_cast<int>(local.splits),
                                  p.activation, false};
      params.pairs = p.out % 2 == 0 && b.grad_stride % 2 == 0 && aligned_to(b.grad, 4) && aligned_to(b.saved, 4);
      launches.run("ticket_gradient", ticket_gradient<T>, {div_up(p.out, int64_t{kGradientColumns}), local.splits},
                   kThreads, kGradientShared, params);
      if (b.dbias) sum_parts<T>(launches, local.bias, b.dbias, p.out, local.splits);
    }
    if (b.dx) {
      run_ticket_product<T, true>(ticket_params<T, true>(p, grad, stride, b.dx), machine, launches);
    }
    if (b.dvalues && p.blocks > 0) run_outer<T>(launches, p, b, plan, local, grad, stride);
  });
  return launches.error;
}

}  // namespace pyeff::gpu
