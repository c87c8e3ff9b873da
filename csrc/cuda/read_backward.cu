// READ's backward on the GPU: the gates again where they were not kept, the recurrence backwards, the long products.
#include <initializer_list>

#include "cuda/read_dphi.cuh"
#include "cuda/read_launch.cuh"
#include "cuda/read_norm.cuh"
#include "cuda/read_outer_wgmma.cuh"
#include "cuda/read_reverse.cuh"

namespace pyeff::gpu {
namespace {

static_assert(ReverseTile<float>::kShared <= kSharedAnywhere && DphiTile<float>::kShared <= kSharedAnywhere, "");
static_assert(OuterTile<bf16>::kShared <= kSharedAnywhere && OuterTile<float>::kShared <= kSharedAnywhere, "");
static_assert(OuterWgmmaTile::kShared <= kSharedHopper, "");

// One of the two long products: its partial sums, and how often it is split.
struct OuterSpace {
  int64_t width, splits;
  bool wide;  // by the tiles of a warpgroup
  float *partial, *bias;

  int64_t columns() const { return wide ? OuterWgmmaTile::kColumns : 128; }

  OuterSpace(const ReadSizes& s, int64_t width_, int64_t turn, const Machine& machine, Scratch& scratch)
      : width(width_), wide(machine.wgmma && s.bytes == 2 && width_ >= OuterWgmmaTile::kColumns / 2) {
    // As many blocks as run at once, one on a processor, but no split without work.
    const int64_t rows = s.gates * s.padded;
    const int64_t tiles = div_up(rows, int64_t{128}) * div_up(width, columns());
    const int64_t steps = div_up(turn * s.layers, int64_t{256});
    splits = best_splits(tiles, machine.processors);
    if (splits > steps) splits = steps;
    if (splits < 1) splits = 1;
    partial = scratch.take<float>(splits * rows * width * 4);
    bias = scratch.take<float>(splits * rows * 4);
  }
};

struct BackwardScratch {
  FoldedWeights folded;
  int64_t groups;
  float *dgamma, *dbeta;
  int64_t most;  // tokens of a turn
  OuterSpace input, recurrent;
  void *da, *gates = nullptr, *h = nullptr, *c_last = nullptr;
  float *carry_h, *carry_c;

  BackwardScratch(const ReadProblem& p, const ReadBackward& b, const ReadSizes& s, const Machine& machine,
                  Scratch& scratch)
      : folded(s, scratch),
        groups(div_up(s.rows, int64_t{kFinishRows})),
        dgamma(scratch.take<float>(groups * s.width * 4)),
        dbeta(scratch.take<float>(groups * s.width * 4)),
        most(turn(p, b, s, machine)),
        input(s, s.width, most, machine, scratch),
        recurrent(s, s.rank, most, machine, scratch),
        da(scratch.take(s.layers * most * s.derivatives * s.padded * s.bytes)),
        carry_h(scratch.take<float>(most * s.rank * 4)),
        carry_c(scratch.take<float>(most * s.rank * 4)) {
    if (again(p, b)) {
      gates = scratch.take(s.layers * most * 4 * s.rank * s.bytes);
      h = scratch.take(2 * most * s.rank * s.bytes);
      c_last = scratch.take(most * s.rank * s.bytes);
    }
  }

  static bool again(const ReadProblem& p, const ReadBackward& b) { return !b.gates && p.cell != Cell::rnn; }

  static int64_t turn(const ReadProblem& p, const ReadBackward& b, const ReadSizes& s, const Machine& machine) {
    int64_t bytes = s.layers * s.derivatives * s.padded * s.bytes + 8 * s.rank;
    if (again(p, b)) bytes += (s.layers * 4 + 3) * s.rank * s.bytes;
    return s.turn(bytes, machine.scratch_limit);
  }
};

class Backward {
 public:
  Backward(const ReadProblem& p, const ReadBackward& b, const BackwardScratch& local, const Machine& machine,
           void* stream)
      : p_(p), b_(b), s_(p), local_(local), machine_(machine), stream_(stream), launches_(stream) {}

  const char* run() {
    const bool input = b_.dw_ih || b_.db_ih || b_.dnorm_weight || b_.dnorm_bias, recurrent = b_.dw_hh || b_.db_hh;
    bool dphi = false;
    for (int64_t l = 0; l < s_.layers; ++l) dphi = dphi || b_.dphi[l];
    if (dphi || BackwardScratch::again(p_, b_)) launches_.error = fold(p_, local_.folded, stream_);
    for (first_ = 0; first_ < s_.tokens; first_ += local_.most) {
      tokens_ = s_.tokens - first_ < local_.most ? s_.tokens - first_ : local_.most;
      gates_again();
      reverse();
      if (input) input_product();
      if (recurrent) recurrent_product();
      if (dphi) input_gradient();
    }
    if (input) finish_input();
    if (recurrent) finish(local_.recurrent, nullptr, nullptr, nullptr, b_.dw_hh, b_.db_hh, nullptr, nullptr);
    return launches_.error;
  }

 private:
  int64_t da_ld() const { return s_.derivatives * s_.padded; }
  int64_t da_stride() const { return tokens_ * da_ld(); }
  const float* rstd() const { return b_.stats ? b_.stats + first_ : nullptr; }
  const float* mean() const { return p_.norm == Norm::layer ? b_.stats + s_.layers * s_.tokens + first_ : nullptr; }

  void gates_again() {
    if (!BackwardScratch::again(p_, b_) || launches_.error) return;
    ForwardTurn turn{};
    turn.first = first_, turn.tokens = tokens_;
    turn.pre = turn.gates = local_.gates, turn.pre_ld = 4 * s_.rank, turn.pre_stride = turn.pre_ld * tokens_;
    // Products of 16-bit numbers make the statistics anew; those of float are given what was saved.
    turn.stats_stride = s_.tokens, turn.stats_given = true;
    if (p_.number == Number::f32 && p_.norm != Norm::none)
      turn.rstd = const_cast<float*>(rstd()), turn.mean = const_cast<float*>(mean());
    turn.h = local_.h, turn.h_stride = s_.rank * tokens_, turn.h_period = 2, turn.c_last = local_.c_last;
    launches_.error = project(p_, local_.folded, turn, machine_, stream_);
    if (!launches_.error) launches_.error = recur(p_, turn, machine_, stream_);
  }

  void reverse() {
    ReverseParams r{};
    const int64_t state = first_ * s_.rank;
    r.grad_out = shifted(b_.grad_out, state, s_), r.grad_c = shifted(b_.grad_c, state, s_);
    r.w_hh = p_.w_hh, r.h0 = shifted(p_.h0, state, s_), r.c0 = shifted(p_.c0, state, s_);
    r.h = shifted(b_.h, state, s_), r.c = shifted(b_.c, state, s_), r.state_stride = s_.tokens * s_.rank;
    r.gates = b_.gates ? shifted(b_.gates, 4 * state, s_) : local_.gates;
    r.gates_stride = 4 * s_.rank * (b_.gates ? s_.tokens : tokens_);
    r.da = local_.da, r.da_stride = da_stride(), r.carry_h = local_.carry_h, r.carry_c = local_.carry_c;
    r.dh0 = shifted(b_.dh0, state, s_), r.dc0 = shifted(b_.dc0, state, s_);
    r.layers = s_.layers, r.tokens = tokens_, r.rank = s_.rank, r.padded = s_.padded;
    r.last_only = p_.reduce == Reduce::last;
    r.share = r.last_only ? 1.0f : 1.0f / static_cast<float>(s_.layers);
    r.pairs = s_.rank % 2 == 0;
    for (const void* given : {r.grad_out, r.h0, r.c0}) r.pairs = r.pairs && aligned_to(given, 4);
    r.w_aligned = s_.padded == s_.rank && aligned_to(p_.w_hh, 16);
    with_number(p_.number, [&](auto number) {
      with_cell(p_.cell, [&](auto cell) {
        using Tile = ReverseTile<decltype(number)>;
        launches_.run("read_reverse", read_reverse<decltype(number), decltype(cell)::value>,
                      {div_up(tokens_, int64_t{Tile::kRows})}, kThreads, Tile::kShared, r);
      });
    });
  }

  OuterParams outer(const OuterSpace& space, int64_t first_layer, int64_t layers) const {
    OuterParams o{};
    o.da = shifted(static_cast<const void*>(local_.da), first_layer * da_stride(), s_);
    o.partial = space.partial, o.bias = space.bias;
    o.da_stride = da_stride(), o.da_ld = da_ld(), o.stats_stride = s_.tokens;
    o.layers = layers, o.tokens = tokens_, o.first = first_, o.width = space.width, o.padded = s_.padded;
    o.gates = static_cast<int>(s_.gates), o.splits = static_cast<int>(space.splits);
    o.accumulate = first_layer > 0 || first_ > 0;
    return o;
  }

  template <class T, class From>
  void run_outer(const OuterSpace& space, const OuterParams& o) {
    const Grid grid{div_up(o.width, space.columns()), div_up(o.gates * o.padded, int64_t{128}), o.splits};
    if constexpr (!std::is_same<T, float>::value) {
      if (space.wide) {
        launches_.run("read_outer_wgmma", read_outer_wgmma<T, From>, grid, kThreads, OuterWgmmaTile::kShared, o);
        return;
      }
    }
    launches_.run("read_outer", read_outer<T, From>, grid, kThreads, OuterTile<T>::kShared, o);
  }

  void input_product() {
    for (int64_t first_layer = 0; first_layer < s_.layers; first_layer += kMaxLayers) {
      Layers rows{};
      OuterParams o = outer(local_.input, first_layer, take_layers(rows, p_, first_layer));
      o.rows = rows;
      o.rstd = rstd() ? rstd() + first_layer * s_.tokens : nullptr;
      o.mean = mean() ? mean() + first_layer * s_.tokens : nullptr;
      with_numbers(p_, [&](auto number, auto phi) { run_outer<decltype(number), decltype(phi)>(local_.input, o); });
    }
  }

  void recurrent_product() {
    for (int64_t first_layer = 0; first_layer < s_.layers; first_layer += kMaxLayers) {
      const int64_t left = s_.layers - first_layer;
      OuterParams o = outer(local_.recurrent, first_layer, left < kMaxLayers ? left : kMaxLayers);
      for (int64_t i = 0; i < o.layers; ++i) {
        const int64_t l = first_layer + i;
        const void* before = l == 0 ? p_.h0 : shifted(b_.h, (l - 1) * s_.tokens * s_.rank, s_);
        o.rows.layer[i] = {before, 0, s_.rank, s_.tokens, s_.padded == s_.rank && aligned_to(before, 16)};
      }
      o.recurrent_n = p_.cell == Cell::gru;
      with_number(p_.number, [&](auto number) { run_outer<decltype(number), decltype(number)>(local_.recurrent, o); });
    }
  }

  void input_gradient() {
    for (int64_t first_layer = 0; first_layer < s_.layers; first_layer += kMaxLayers) {
      NormBackwardParams norm{};
      DphiParams d{};
      const int64_t layers = take_layers(norm.phi, p_, first_layer);
      for (int64_t i = 0; i < layers; ++i) d.dphi[i] = norm.dphi[i] = b_.dphi[first_layer + i];
      d.da = shifted(static_cast<const void*>(local_.da), first_layer * da_stride(), s_);
      d.weight = local_.folded.weight, d.da_stride = da_stride(), d.da_ld = da_ld();
      d.tokens = tokens_, d.first = first_, d.width = s_.width, d.ld = s_.ld, d.rank = s_.rank, d.padded = s_.padded;
      d.gates = static_cast<int>(s_.gates);
      norm.rstd = rstd() ? rstd() + first_layer * s_.tokens : nullptr;
      norm.mean = mean() ? mean() + first_layer * s_.tokens : nullptr;
      norm.stride = s_.tokens, norm.first = first_, norm.tokens = tokens_, norm.width = s_.width, norm.norm = p_.norm;
      with_numbers(p_, [&](auto number, auto phi) {
        using Tile = DphiTile<decltype(number)>;
        launches_.run("read_dphi", read_dphi<decltype(number)>,
                      {div_up(s_.width, int64_t{Tile::kColumns}), div_up(tokens_, int64_t{Tile::kRows}), layers},
                      kThreads, Tile::kShared, d);
        if (p_.norm != Norm::none) {
          launches_.run("read_norm_backward", read_norm_backward<decltype(number), decltype(phi)>,
                        {div_up(tokens_, int64_t{kThreads / kWarp}), layers}, kThreads, 0, norm);
        }
      });
    }
  }

  void finish_input() {
    finish(local_.input, p_.norm_weight, p_.norm_bias, p_.w_ih, b_.dw_ih, b_.db_ih,
           b_.dnorm_weight ? local_.dgamma : nullptr, b_.dnorm_bias ? local_.dbeta : nullptr);
    if (!b_.dnorm_weight && !b_.dnorm_bias) return;
    const NormGradParams n{b_.dnorm_weight ? local_.dgamma : nullptr,
                           b_.dnorm_bias ? local_.dbeta : nullptr,
                           b_.dnorm_weight,
                           b_.dnorm_bias,
                           local_.groups,
                           s_.width};
    with_number(p_.number, [&](auto number) {
      launches_.run("read_norm_grads", read_norm_grads<decltype(number)>, {div_up(s_.width, int64_t{kThreads})},
                    kThreads, 0, n);
    });
  }

  void finish(const OuterSpace& space, const void* gamma, const void* beta, const void* w, void* dw, void* db,
              float* dgamma, float* dbeta) {
    const FinishParams f{space.partial,
                         space.bias,
                         gamma,
                         beta,
                         w,
                         dw,
                         db,
                         dgamma,
                         dbeta,
                         s_.rank,
                         s_.padded,
                         space.width,
                         static_cast<int>(s_.gates),
                         static_cast<int>(space.splits)};
    with_number(p_.number, [&](auto number) {
      launches_.run("read_finish", read_finish<decltype(number)>,
                    {div_up(space.width, int64_t{kThreads}), local_.groups}, kThreads, 0, f);
    });
  }

  const ReadProblem& p_;
  const ReadBackward& b_;
  const ReadSizes s_;
  const BackwardScratch& local_;
  const Machine& machine_;
  void* stream_;
  Launches launches_;
  int64_t first_ = 0, tokens_ = 0;
};

}  // namespace

int64_t read_backward_scratch(const ReadProblem& p, const ReadBackward& b, const Machine& machine) {
  Scratch scratch(nullptr);
  BackwardScratch(p, b, ReadSizes(p), machine, scratch);
  return scratch.used();
}

const char* read_backward(const ReadProblem& p, const ReadBackward& b, void* base, const Machine& machine,
                          void* stream) {
  Scratch scratch(base);
  const BackwardScratch local(p, b, ReadSizes(p), machine, scratch);
  return Backward(p, b, local, machine, stream).run();
}

}  // namespace pyeff::gpu
