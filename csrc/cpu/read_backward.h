// READ's backward: chunks of tokens pass through both phases while their gate gradients are still in the cache.
#pragma once

#include "read_outer.h"

namespace pyeff {
namespace PYEFF_ISA {

template <class T, class CellT>
bool run_read_backward(const ReadProblem& p, const ReadBackward& out, const Parallel& parallel) {
  using Shape = ReverseShape<T, CellT>;
  using Outer = ReadOuter<T, CellT>;
  using Reverse = ReverseBlock<T, CellT>;
  using C = typename Shape::C;
  const Shape s(p);
  const int64_t threads = larger(parallel.threads, 1);
  const bool recompute = CellT::kSaved && !out.gates;
  bool with_dphi = false;
  for (int64_t i = 0; i < s.layers; ++i) with_dphi |= out.dphi[i] != nullptr;

  // Enough tokens at once to occupy every thread in the first phase.
  const int64_t unit = Outer::kUnit;
  const int64_t chunk = smaller(ceil_div(s.tokens, 8) * 8, unit * ceil_div(threads * kReadBlock, unit));
  const int64_t row_panels = Outer::count_row_panels(s), bias_row = Segments<CellT>::kCount * s.rank_pad;
  const int64_t x_panels = out.dw_ih || out.dnorm_weight || out.dnorm_bias ? s.width_panels : 0;
  const int64_t h_panels = out.dw_hh ? s.rank_panels : 0;
  const int64_t panels = x_panels + h_panels, sums_size = panels * row_panels * Outer::kTile;

  struct Shared {
    ReverseWeights<T, CellT> reverse;
    ReadWeights<T, CellT> forward;
    typename Shape::D* da;
    C *bias, *bias_total, *sums;
  } shared;
  auto place = [&](Arena& arena) {
    shared.reverse.place(arena, s, with_dphi);
    if (recompute) shared.forward.place(arena, s);
    shared.da = arena.take<typename Shape::D>(s.layers * chunk * s.da_stride);
    shared.bias = arena.take<C>(ceil_div(chunk, 8) * bias_row);
    shared.bias_total = arena.take<C>(bias_row);
    shared.sums = arena.take<C>(sums_size);
  };
  auto place_own = [&](Arena& arena, typename Reverse::Workspace& reverse, typename Outer::Workspace& outer) {
    reverse.place(arena, s, with_dphi, recompute);
    outer.place(arena);
  };
  typename Reverse::Workspace reverse_size;
  typename Outer::Workspace outer_size;
  Arena counter(nullptr), own_counter(nullptr);
  place(counter);
  place_own(own_counter, reverse_size, outer_size);
  const int64_t each = own_counter.used + 64;
  Scratch scratch(counter.used + 64 + threads * each);
  if (!scratch.block) return false;
  Arena arena(scratch.block);
  place(arena);
  char* own = static_cast<char*>(scratch.block) + (arena.used + 63) / 64 * 64;

  for (int64_t i = 0; i < Shape::kColumns; ++i) shared.reverse.zeros[i] = T{};
  for (int64_t i = 0; i < bias_row; ++i) shared.bias_total[i] = 0;
  for_each_task(parallel, s.rank_panels + (with_dphi ? s.width_panels : 0),
                [&](int64_t panel) { shared.reverse.pack(p, s, panel); });
  if (recompute) for_each_task(parallel, s.panels, [&](int64_t panel) { shared.forward.pack(p, s, panel); });
  const Outer outer{p, out, s, shared.da, shared.sums, shared.bias_total, row_panels, x_panels, h_panels};
  for (int64_t chunk_first = 0; chunk_first < s.tokens; chunk_first += chunk) {
    const int64_t tokens = smaller(chunk, s.tokens - chunk_first);
    for_each_task(parallel, threads, [&](int64_t i) {
      Arena mine(own + i * each);
      typename Reverse::Workspace w;
      typename Outer::Workspace unused;
      place_own(mine, w, unused);
      Reverse block{p, out, s, shared.reverse, &shared.forward, w, shared.da, shared.bias, chunk_first, chunk};
      int64_t begin, end;
      token_range(tokens, i, threads, begin, end);
      for (int64_t first = begin; first < end; first += kReadBlock)
        block.run(chunk_first + first, smaller(kReadBlock, end - first));
    });
    for (int64_t group = 0; group < ceil_div(tokens, 8); ++group)
      for (int64_t i = 0; i < bias_row; i += Shape::kUnits)
        store(shared.bias_total + i, load(shared.bias_total + i) + load(shared.bias + group * bias_row + i));
    for_each_task(parallel, threads, [&](int64_t i) {
      Arena mine(own + i * each);
      typename Reverse::Workspace unused;
      typename Outer::Workspace w;
      place_own(mine, unused, w);
      const int64_t begin = panels * i / threads, end = panels * (i + 1) / threads;
      for (int64_t first = 0; first < tokens; first += unit)
        outer.accumulate(w, chunk_first, chunk, chunk_first + first, smaller(unit, tokens - first), begin, end);
    });
  }
  for_each_task(parallel, panels, [&](int64_t panel) { outer.finish(panel); });
  outer.finish_bias();
  return true;
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
