// READ's CUDA kernels, run by the emulation, against the definition; and their promises: nothing depends on the order
// of the threads, on what lies in the scratch, or on what else is asked for, and what belongs to a token does not
// depend on the turns in which the tokens are served.
#include <cstdlib>

#include "read_gpu_call.h"

using namespace check;
using pyeff::Cell;
using pyeff::Norm;
using pyeff::Reduce;
using pyeff::gpu::Machine;

namespace {

constexpr Cell kCells[] = {Cell::rnn, Cell::gru, Cell::lstm};
constexpr Norm kNorms[] = {Norm::rms, Norm::layer, Norm::none};
constexpr Reduce kReductions[] = {Reduce::mean, Reduce::last};

// Another order of the threads and blocks, as long as it lives.
class Order {
 public:
  explicit Order(const char* seed) { setenv("PYEFF_EMULATE_SEED", seed, 1); }
  ~Order() { unsetenv("PYEFF_EMULATE_SEED"); }
};

// Few processors, so that the sums over the tokens are split in few parts; a turn takes no more tokens than a tile.
Machine machine_with(bool wgmma, bool turns = false) {
  Machine machine;
  machine.processors = 5;
  machine.wgmma = wgmma;
  if (turns) machine.scratch_limit = 1;
  return machine;
}

ReadOptions random_options(Random& random, Cell cell) {
  ReadOptions o;
  for (bool* option : {&o.b_ih, &o.b_hh, &o.norm_weight, &o.norm_bias, &o.h0, &o.c0, &o.wide_phi, &o.aligned})
    *option = random.coin();
  // Either gradient may be missing, not both.
  const int64_t which = random.below(3);
  o.grad_out = which != 0 || cell != Cell::lstm, o.grad_c = which != 1;
  for (Layout& layout : o.layouts) layout = random.pick(kRowLayouts);
  return o;
}

// What belongs to a token.
bool same_tokens(const BackwardOutputs& a, const BackwardOutputs& b) {
  for (size_t i = 0; i < a.dphi.size(); ++i)
    if (!a.dphi[i].same(b.dphi[i])) return false;
  return a.dh0.same(b.dh0) && a.dc0.same(b.dc0);
}

// Right on a machine, with gates saved or computed again; and the same once more, in another order and in turns.
void check_call(const ReadGpuCall& call, bool wgmma, bool save_gates, bool again) {
  const ReadTruth truth = truth_of(call), same_type = same_type_of(call);
  const Machine machine = machine_with(wgmma);
  const char* who = wgmma ? "cuda with wgmma" : "cuda without wgmma";
  const ForwardOutputs first = call.forward(machine, true, save_gates);
  call.check(who, first, truth, same_type);
  const BackwardOutputs first_back = call.backward(machine, first);
  call.check(who, first_back, truth, same_type);
  if (!again) return;
  {
    const Order other("12345");
    const ForwardOutputs outputs = call.forward(machine, true, save_gates);
    CHECK(same(first, outputs) && same(first_back, call.backward(machine, outputs)));
  }
  CHECK(first.out.same(call.forward(machine, false, false).out));
  if (call.sizes.tokens <= 128) return;
  const Machine turns = machine_with(wgmma, true);
  const ForwardOutputs outputs = call.forward(turns, true, save_gates);
  CHECK(same(first, outputs));
  const BackwardOutputs gradients = call.backward(turns, outputs);
  CHECK(same_tokens(first_back, gradients));
  call.check(who, gradients, truth, same_type);
}

}  // namespace

TEST(read_on_the_gpu_is_right_for_every_cell_norm_reduction_and_type) {
  const int64_t tokens[] = {1, 2, 13, 63, 97, 130}, ranks[] = {5, 33, 64, 70, 130}, widths[] = {5, 33, 70, 64, 136};
  uint64_t seed = 20000;
  for (Number number : kGpuNumbers)
    for (Cell cell : kCells)
      for (Norm norm : kNorms)
        for (Reduce reduce : kReductions) {
          Random random(++seed);
          const ReadOptions o = random_options(random, cell);
          const ReadSizes sizes{
              cell, norm, reduce, 1 + random.below(4), random.pick(tokens), random.pick(widths), random.pick(ranks)};
          check_call(ReadGpuCall(number, sizes, o, seed), random.coin(), random.coin(), true);
        }
}
