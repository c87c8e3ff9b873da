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

// With few processors the sums over the tokens are split in few parts.
Machine machine_with(Random& random) {
  Machine machine;
  const int processors[] = {2, 5, 132};
  machine.processors = random.pick(processors);
  machine.wgmma = random.coin();
  return machine;
}

ReadOptions random_options(Random& random, Cell cell) {
  ReadOptions o;
  for (bool* option : {&o.b_ih, &o.b_hh, &o.norm_weight, &o.norm_bias, &o.h0, &o.c0, &o.wide_phi})
    *option = random.coin();
  const Begin begins[] = {Begin::number, Begin::pair, Begin::vector};
  o.begin = random.pick(begins);
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
void check_call(const ReadGpuCall& call, const Machine& machine, bool save_gates, const ReadTruth& truth,
                const ReadTruth& same_type) {
  const char* who = machine.wgmma ? "cuda with wgmma" : "cuda without wgmma";
  const ForwardOutputs first = call.forward(machine, true, save_gates);
  call.check(who, first, truth, same_type);
  const BackwardOutputs first_back = call.backward(machine, first);
  call.check(who, first_back, truth, same_type);
  {
    const Order other("12345");
    const ForwardOutputs outputs = call.forward(machine, true, save_gates);
    CHECK(same(first, outputs) && same(first_back, call.backward(machine, outputs)));
  }
  CHECK(first.out.same(call.forward(machine, false, false).out));
  if (call.sizes.tokens <= 128) return;
  Machine turns = machine;
  turns.scratch_limit = 1;
  const ForwardOutputs outputs = call.forward(turns, true, save_gates);
  CHECK(same(first, outputs));
  CHECK(first.out.same(call.forward(turns, false, false).out));
  const BackwardOutputs gradients = call.backward(turns, outputs);
  CHECK(same_tokens(first_back, gradients));
  call.check(who, gradients, truth, same_type);
}

void check_call(Random& random, const ReadGpuCall& call) {
  check_call(call, machine_with(random), random.coin(), truth_of(call), same_type_of(call));
}

}  // namespace

TEST(read_on_the_gpu_is_right_for_every_cell_norm_reduction_and_type) {
  const int64_t tokens[] = {1, 2, 13, 63, 97, 130}, ranks[] = {5, 33, 64, 70, 130}, widths[] = {5, 33, 70, 64, 136};
  uint64_t seed = 20000;
  for (int sample = 0; sample < (kSanitized ? 1 : 2); ++sample)
    for (Number number : kGpuNumbers)
      for (Cell cell : kCells)
        for (Norm norm : kNorms)
          for (Reduce reduce : kReductions) {
            Random random(++seed);
            if (!taken(seed, 2, 4)) continue;
            const ReadOptions o = random_options(random, cell);
            const ReadSizes sizes{
                cell, norm, reduce, 1 + random.below(4), random.pick(tokens), random.pick(widths), random.pick(ranks)};
            check_call(random, ReadGpuCall(number, sizes, o, seed));
          }
}

// The ranks that have kernels of their own, in several tiles of tokens, with a warpgroup's matrix tiles and without.
TEST(read_on_the_gpu_is_right_for_ranks_that_fit_on_chip) {
  const int64_t tokens[] = {1, 63, 129, 200, 260}, widths[] = {64, 70, 136, 300};
  uint64_t seed = 21000;
  for (Number number : {Number::bf16, kHalf})
    for (Cell cell : kCells)
      for (int64_t rank : {64, 128, 256}) {
        Random random(++seed);
        // Of the largest rank one: the definition takes its time, too.
        if (kSanitized && rank == 256 && (number != Number::bf16 || cell != Cell::gru)) continue;
        if (!taken(seed, rank == 256 ? 1 : 2, rank == 256 ? 1 : 2)) continue;
        const int64_t layers = 1 + random.below(rank == 256 ? 2 : 3);
        const ReadSizes sizes{cell,   random.pick(kNorms), random.pick(kReductions),
                              layers, random.pick(tokens), random.pick(widths),
                              rank};
        const ReadGpuCall call(number, sizes, random_options(random, cell), seed);
        const ReadTruth truth = truth_of(call), same_type = same_type_of(call);
        for (bool wgmma : {true, false}) {
          if (kSanitized && !wgmma) continue;
          Machine machine = machine_with(random);
          machine.wgmma = wgmma;
          check_call(call, machine, random.coin(), truth, same_type);
        }
      }
}

// More layers than one launch is told of; once with tokens for two turns.
TEST(read_on_the_gpu_takes_more_layers_than_a_launch) {
  uint64_t seed = 22000;
  for (Number number : kGpuNumbers)
    for (Cell cell : kCells) {
      Random random(++seed);
      if (!taken(seed, 4, 4)) continue;  // each type and each cell once
      const bool many = number == Number::bf16 && cell == Cell::lstm && !kSanitized;
      const ReadOptions o = random_options(random, cell);
      // The mean: from the last layer alone nothing but denormal numbers would reach the first.
      const ReadSizes sizes{cell, random.pick(kNorms), Reduce::mean, many ? 66 : 70, many ? 131 : 5, many ? 136 : 6, 5};
      check_call(random, ReadGpuCall(number, sizes, o, seed));
    }
}

// What is not wanted is not computed, and what is comes out as if all were.
TEST(every_output_of_the_gpu_can_be_wanted_alone) {
  uint64_t seed = 23000;
  for (Number number : kGpuNumbers)
    for (Cell cell : kCells)
      for (Norm norm : kNorms) {
        Random random(++seed);
        if (!taken(seed, 4, 4)) continue;
        ReadOptions o = random_options(random, cell);
        o.grad_out = true;
        const ReadSizes sizes{cell, norm, random.pick(kReductions), 1 + random.below(2), 19, 23, 11};
        const ReadGpuCall call(number, sizes, o, seed);
        const Machine machine = machine_with(random);
        const bool save_gates = random.coin();
        const ForwardOutputs saved = call.forward(machine, true, save_gates);
        for (int64_t only = 0; only < 4; ++only) {
          const ForwardOutputs one = call.forward(machine, true, save_gates, {only});
          CHECK(one.out.same(saved.out) && one.c_last.same(saved.c_last));
          const auto a = saved.all(), b = one.all();
          for (int64_t i = 0; i < 4; ++i)
            CHECK(i == only ? a[size_t(i + 2)]->same(*b[size_t(i + 2)]) : b[size_t(i + 2)]->count() == 0);
        }
        const BackwardOutputs all = call.backward(machine, saved);
        for (int64_t only = 0; only < call.gradients(); ++only) {
          const BackwardOutputs one = call.backward(machine, saved, {only});
          const auto a = all.all(), b = one.all();
          for (int64_t i = 0; i < call.gradients(); ++i)
            CHECK(i == only ? a[size_t(i)]->same(*b[size_t(i)]) : b[size_t(i)]->count() == 0);
        }
      }
}

// Layer outputs of every size, and gradients that are small: half precision has few exponents.
TEST(read_on_the_gpu_is_right_for_large_and_small_numbers) {
  uint64_t seed = 24000;
  for (Number number : kGpuNumbers)
    for (Norm norm : {Norm::rms, Norm::layer})
      for (int64_t width : {40, 136}) {
        const struct {
          double mean, range, grad;
        } cases[] = {{0, 1000, 1e-3}, {0, 1e-2, 30}, {100, 10, 1}};
        for (const auto& numbers : cases) {
          Random random(++seed);
          if (!taken(seed, 4, 4)) continue;
          ReadOptions o = random_options(random, Cell::gru);
          o.phi_mean = numbers.mean, o.phi_range = numbers.range, o.grad_range = numbers.grad;
          const ReadSizes sizes{Cell::gru, norm, Reduce::mean, 2, 63, width, 33};
          check_call(random, ReadGpuCall(number, sizes, o, seed));
        }
      }
}
