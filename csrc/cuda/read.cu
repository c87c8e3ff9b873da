// READ's forward on the GPU: fold the norm into the weights, project all layers, run the recurrence.
#include "cuda/read.h"

#include "cuda/read_launch.cuh"
#include "cuda/read_project_wgmma.cuh"
#include "cuda/read_resident.cuh"

namespace pyeff::gpu {
namespace {

static_assert(ProjectTile<float>::kShared <= kSharedAnywhere && ProjectTile<bf16>::kShared <= kSharedAnywhere, "");
static_assert(RecurTile<Cell::gru>::kShared <= kSharedAnywhere && RecurTile<Cell::lstm>::kShared <= kSharedAnywhere,
              "");
static_assert(ProjectWgmmaTile::kShared <= kSharedHopper, "");
static_assert(ResidentTile<Cell::gru>::shared(256) <= kSharedHopper, "");
static_assert(ResidentTile<Cell::lstm>::shared(256) <= kSharedHopper, "");

// The arrays of a turn that are not outputs, cut from scratch.
struct ForwardScratch {
  void *pre = nullptr, *h = nullptr;
  float *total = nullptr, *rstd = nullptr, *mean = nullptr;

  ForwardScratch(const ReadProblem& p, const ReadForward& f, const ReadSizes& s, int64_t tokens, Scratch& scratch) {
    if (!f.gates) pre = scratch.take(s.layers * tokens * s.pre_ld() * s.bytes);
    if (!f.h) h = scratch.take(2 * tokens * s.rank * s.bytes);
    if (p.reduce == Reduce::mean && s.layers > 1) total = scratch.take<float>(tokens * s.rank * 4);
    if (!f.stats && p.number == Number::f32 && p.norm != Norm::none) {
      rstd = scratch.take<float>(s.layers * tokens * 4);
      if (p.norm == Norm::layer) mean = scratch.take<float>(s.layers * tokens * 4);
    }
  }
};

template <class Tile>
Grid tiles(const ReadSizes& s, const ForwardTurn& turn, int64_t layers) {
  return {div_up(s.rows, int64_t{Tile::kColumns}), div_up(turn.tokens, int64_t{Tile::kRows}), layers};
}

int64_t forward_turn(const ReadProblem& p, const ReadForward& f, const ReadSizes& s, const Machine& machine) {
  Scratch one(nullptr);
  // Of many tokens, so that rounding up to whole pieces does not count.
  ForwardScratch(p, f, s, 4096, one);
  return s.turn(one.used() / 4096, machine.scratch_limit);
}

}  // namespace

const char* fold(const ReadProblem& p, const FoldedWeights& folded, void* stream) {
  const ReadSizes s(p);
  const FoldParams params{p.w_ih,      p.norm_weight, p.norm_bias, p.b_ih, folded.weight,
                          folded.bias, folded.sums,   s.width,     s.ld};
  Launches launches(stream);
  with_number(p.number,
              [&](auto number) { launches.run("read_fold", read_fold<decltype(number)>, {s.rows}, 128, 16, params); });
  return launches.error;
}

const char* project(const ReadProblem& p, const FoldedWeights& folded, const ForwardTurn& turn, const Machine& machine,
                    void* stream) {
  const ReadSizes s(p);
  Launches launches(stream);
  for (int64_t first = 0; first < p.layers; first += kMaxLayers) {
    ProjectParams params{};
    const int64_t layers = take_layers(params.phi, p, first);
    params.weight = folded.weight, params.bias = folded.bias, params.sums = folded.sums;
    params.pre = shifted(turn.pre, first * turn.pre_stride, s);
    params.rstd = turn.rstd ? turn.rstd + first * turn.stats_stride : nullptr;
    params.mean = turn.mean ? turn.mean + first * turn.stats_stride : nullptr;
    params.pre_stride = turn.pre_stride, params.pre_ld = turn.pre_ld, params.stats_stride = turn.stats_stride;
    params.first = turn.first, params.tokens = turn.tokens, params.width = s.width, params.ld = s.ld;
    params.pre_aligned = turn.pre_ld * s.bytes % 16 == 0 && aligned_to(turn.pre, 16);
    params.columns = s.rows, params.eps = p.eps, params.norm = p.norm;
    if (p.number == Number::f32 && p.norm != Norm::none && !turn.stats_given) {
      const StatsParams stats{params.phi, params.rstd, params.mean, turn.stats_stride,
                              turn.first, turn.tokens, s.width,     p.eps};
      launches.run("read_stats", read_stats<float>, {div_up(turn.tokens, int64_t{kThreads / kWarp}), layers}, kThreads,
                   0, stats);
    }
    with_numbers(p, [&](auto number, auto phi) {
      using T = decltype(number);
      if constexpr (!std::is_same<T, float>::value) {
        // A warpgroup's tile is 256 columns: fewer than half of them, and the smaller tile is the better one.
        if (machine.wgmma && s.rows >= ProjectWgmmaTile::kColumns / 2) {
          using Tile = ProjectWgmmaTile;
          launches.run("read_project_wgmma", read_project_wgmma<T, decltype(phi)>, tiles<Tile>(s, turn, layers),
                       kThreads, Tile::kShared, params);
          return;
        }
      }
      using Tile = ProjectTile<T>;
      launches.run("read_project", read_project<T, decltype(phi)>, tiles<Tile>(s, turn, layers), kThreads,
                   Tile::kShared, params);
    });
  }
  return launches.error;
}

const char* recur(const ReadProblem& p, const ForwardTurn& turn, const Machine& machine, void* stream) {
  const ReadSizes s(p);
  RecurParams params{};
  params.pre = turn.pre, params.gates = turn.gates, params.pre_stride = turn.pre_stride, params.pre_ld = turn.pre_ld;
  params.w_hh = p.w_hh, params.b_hh = p.b_hh;
  params.h0 = shifted(p.h0, turn.first * s.rank, s), params.c0 = shifted(p.c0, turn.first * s.rank, s);
  params.h = turn.h, params.h_stride = turn.h_stride, params.h_period = turn.h_period;
  params.c = turn.c, params.c_last = turn.c_last, params.c_stride = turn.h_stride;
  params.out = turn.out, params.total = turn.total;
  params.layers = p.layers, params.tokens = turn.tokens, params.rank = s.rank;
  params.h_aligned = s.padded == s.rank && aligned_to(turn.h, 16);
  params.h0_aligned = s.padded == s.rank && aligned_to(params.h0, 16);
  params.w_aligned = s.padded == s.rank && aligned_to(p.w_hh, 16);
  params.pairs = s.rank % 2 == 0 && aligned_to(params.h0, 4) && aligned_to(params.c0, 4) && aligned_to(p.b_hh, 4);
  Launches launches(stream);
  with_number(p.number, [&](auto number) {
    with_cell(p.cell, [&](auto cell) {
      constexpr Cell kCell = decltype(cell)::value;
      if constexpr (!std::is_same<decltype(number), float>::value) {
        using Resident = ResidentTile<kCell>;
        if (machine.wgmma && resident_rank(s.rank) && params.pairs) {
          const int64_t blocks = s.rank / Resident::kUnits, tiles = div_up(turn.tokens, int64_t{Resident::kRows});
          Launch how;
          how.grid_x = how.cluster = static_cast<int>(blocks), how.threads = Resident::kThreads;
          how.shared_bytes = Resident::shared(s.rank);
          // As many clusters as run at once take all tiles in as few rounds as they can, and load R once. A device that
          // is shared may have no room for any.
          const int64_t at_once = clusters_at_once(read_resident<decltype(number), kCell>, how);
          if (at_once > 0) {
            const int64_t clusters = div_up(tiles, div_up(tiles, at_once));
            launches.run("read_resident", read_resident<decltype(number), kCell>, {clusters * blocks},
                         Resident::kThreads, how.shared_bytes, params, how.cluster);
            return;
          }
        }
      }
      using Tile = RecurTile<kCell>;
      launches.run("read_recur", read_recur<decltype(number), kCell>, {div_up(turn.tokens, int64_t{Tile::kRows})},
                   kThreads, Tile::kShared, params);
    });
  });
  return launches.error;
}

int64_t read_forward_scratch(const ReadProblem& p, const ReadForward& f, const Machine& machine) {
  const ReadSizes s(p);
  Scratch scratch(nullptr);
  FoldedWeights(s, scratch);
  ForwardScratch(p, f, s, forward_turn(p, f, s, machine), scratch);
  return scratch.used();
}

const char* read_forward(const ReadProblem& p, const ReadForward& f, void* base, const Machine& machine, void* stream) {
  const ReadSizes s(p);
  Scratch scratch(base);
  const FoldedWeights folded(s, scratch);
  const int64_t most = forward_turn(p, f, s, machine);
  const ForwardScratch local(p, f, s, most, scratch);
  if (const char* error = fold(p, folded, stream)) return error;
  for (int64_t first = 0; first < s.tokens; first += most) {
    ForwardTurn turn{};
    turn.first = first, turn.tokens = s.tokens - first < most ? s.tokens - first : most;
    turn.pre = f.gates ? shifted(f.gates, first * 4 * s.rank, s) : local.pre;
    turn.pre_ld = f.gates ? 4 * s.rank : s.pre_ld();
    turn.pre_stride = turn.pre_ld * (f.gates ? s.tokens : turn.tokens);
    turn.gates = f.gates ? turn.pre : nullptr;
    turn.stats_stride = f.stats ? s.tokens : turn.tokens;
    turn.rstd = f.stats ? f.stats + first : local.rstd;
    turn.mean = p.norm != Norm::layer ? nullptr : f.stats ? f.stats + s.layers * s.tokens + first : local.mean;
    turn.h = f.h ? shifted(f.h, first * s.rank, s) : local.h;
    turn.h_stride = s.rank * (f.h ? s.tokens : turn.tokens), turn.h_period = f.h ? s.layers : 2;
    turn.c = shifted(f.c, first * s.rank, s), turn.c_last = shifted(f.c_last, first * s.rank, s);
    turn.out = shifted(f.out, first * s.rank, s), turn.total = local.total;
    if (const char* error = project(p, folded, turn, machine, stream)) return error;
    if (const char* error = recur(p, turn, machine, stream)) return error;
  }
  return nullptr;
}

}  // namespace pyeff::gpu
