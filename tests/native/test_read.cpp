// READ's kernels against their definition, and their promises: nothing depends on the number of threads, on what lies
// in the scratch, or on what else is asked for.
#include "cpu/memory.h"
#include "dev/threads.h"
#include "read_call.h"

using namespace check;
using pyeff::Cell;
using pyeff::Norm;
using pyeff::Reduce;
using pyeff::dev::Threads;

namespace {

constexpr Cell kCells[] = {Cell::rnn, Cell::gru, Cell::lstm};
constexpr Norm kNorms[] = {Norm::rms, Norm::layer, Norm::none};
constexpr Reduce kReductions[] = {Reduce::mean, Reduce::last};

const pyeff::Parallel& threads(int i) {
  static Threads one(1), two(2), five(5);
  static const pyeff::Parallel all[] = {one.parallel(), two.parallel(), five.parallel()};
  return all[i];
}

Layout layout_for(Random& random, Norm norm) {
  const Layout layout = random.pick(kLayouts);
  // The layer norm of equal numbers is nothing but rounding errors.
  return norm == Norm::layer && layout == Layout::broadcast_width ? Layout::strided : layout;
}

// Everything about one call: right in every instruction set, gates saved or computed again, on 1, 2 and 5 threads, with
// scratch that is poisoned or not.
void check_call(const ReadCall& call) {
  const ReadTruth truth = truth_of(call), same_type = same_type_of(call);
  for_each_usable_isa([&](int isa) {
    for (bool save_gates : {true, false}) {
      ForwardOutputs first;
      BackwardOutputs first_back;
      for (int i = 0; i < 3; ++i) {
        pyeff::poison_scratch(i > 0);
        ForwardOutputs outputs = call.forward(isa, threads(i), true, save_gates);
        BackwardOutputs gradients = call.backward(isa, threads(i), outputs);
        if (i == 0) {
          call.check(pyeff::isa_name(isa), outputs, truth, same_type);
          call.check(pyeff::isa_name(isa), gradients, truth, same_type);
          first = std::move(outputs);
          first_back = std::move(gradients);
        } else {
          CHECK(same(first, outputs) && same(first_back, gradients));
        }
      }
      pyeff::poison_scratch(true);
      const ForwardOutputs again = call.forward(isa, threads(0), true, save_gates);
      CHECK(same(first, again) && same(first_back, call.backward(isa, threads(0), again)));
      CHECK(first.out.same(call.forward(isa, threads(1), false, false).out));
      pyeff::poison_scratch(false);
    }
  });
}

}  // namespace

TEST(read_is_right_for_every_cell_norm_reduction_and_type) {
  const int64_t tokens[] = {1, 2, 13, 63, 97}, ranks[] = {5, 33, 70}, widths[] = {5, 33, 70, 6, 64};
  uint64_t seed = 0;
  for (int sample = 0; sample < (kSanitized ? 1 : 4); ++sample)
    for (Number number : kNumbers)
      for (Cell cell : kCells)
        for (Norm norm : kNorms)
          for (Reduce reduce : kReductions) {
            Random random(++seed);
            if (!taken(seed)) continue;
            ReadOptions o;
            for (bool* option : {&o.b_ih, &o.b_hh, &o.norm_weight, &o.norm_bias, &o.h0, &o.c0, &o.wide_phi})
              *option = random.coin();
            // Either gradient may be missing, not both.
            const int64_t which = random.below(3);
            o.grad_out = which != 0 || cell != Cell::lstm, o.grad_c = which != 1;
            for (Layout& layout : o.layouts) layout = layout_for(random, norm);
            const ReadSizes sizes{
                cell, norm, reduce, 1 + random.below(4), random.pick(tokens), random.pick(widths), random.pick(ranks)};
            check_call(ReadCall(number, sizes, o, seed));
          }
}

// Every size, with every layout of phi, the same in all layers and different ones: by a cell each.
TEST(read_takes_every_size_and_layout) {
  uint64_t seed = 5000;
  for (int64_t tokens : {1, 12, 16, 17, 60})
    for (Layout layout : kLayouts) {
      Random random(++seed);
      const Norm norm = layout == Layout::broadcast_width ? Norm::rms : random.pick(kNorms);
      // The layer norm of two numbers is 1 and -1: its gradient is nothing but rounding errors.
      ReadOptions o;
      o.wide_phi = random.coin();
      o.layouts[0] = layout, o.layouts[1] = random.coin() ? layout : Layout::dense, o.layouts[2] = layout;
      const ReadSizes sizes{random.pick(kCells), norm,   random.pick(kReductions),
                            1 + random.below(5), tokens, (norm == Norm::layer ? 3 : 1) + random.below(20),
                            1 + random.below(20)};
      check_call(ReadCall(random.pick(kNumbers), sizes, o, seed));
    }
}

// More tokens than one unit of the weights' sums and than one chunk, more columns than are packed together, and a small
// call whose steps are shared among the threads.
TEST(read_takes_sizes_beyond_every_block) {
  uint64_t pair = 0;
  for (Number number : kNumbers)
    for (Cell cell : kCells) {
      if (!taken(++pair)) continue;
      uint64_t seed = 6000 + 10 * pair;
      Random random(seed);
      ReadOptions o;
      o.wide_phi = cell == Cell::gru;
      for (Layout& layout : o.layouts) layout = random.coin() ? Layout::dense : Layout::padded;
      const Norm norm = random.pick(kNorms);
      const Reduce reduce = random.pick(kReductions);
      if (!kSanitized || cell == Cell::gru) {
        check_call(ReadCall(number, {cell, norm, reduce, 2, number == Number::bf16 ? 1100 : 610, 9, 5}, o, ++seed));
        check_call(ReadCall(number, {cell, norm, reduce, 2, 20, kSanitized ? 400 : 500, 7}, o, ++seed));
      }
      if (!kSanitized) check_call(ReadCall(number, {cell, norm, reduce, 3, 20, 11, 301}, o, ++seed));
      check_call(ReadCall(number, {cell, norm, reduce, 2, 13, 10, cell == Cell::rnn ? 128 : 70}, o, ++seed));
      // The mean: from the last layer alone nothing but denormal numbers would reach the first.
      check_call(ReadCall(number, {cell, norm, Reduce::mean, kSanitized ? 20 : 128, 3, 6, 4}, o, ++seed));
    }
}

// What is not wanted is not computed, and what is comes out as if all were.
TEST(every_gradient_can_be_wanted_alone) {
  uint64_t seed = 7000;
  for (Number number : kNumbers)
    for (Cell cell : kCells)
      for (Norm norm : kNorms)
        for (bool state : {false, true}) {
          Random random(++seed);
          ReadOptions o;
          o.h0 = o.c0 = state;
          o.wide_phi = random.coin();
          o.layouts[1] = Layout::strided;  // unequal inner strides among the layers
          const ReadSizes sizes{cell, norm, random.pick(kReductions), state ? 3 : 1 + random.below(2), 19, 23, 11};
          const ReadCall call(number, sizes, o, seed);
          for_each_usable_isa([&](int isa) {
            const bool save_gates = random.coin();
            const ForwardOutputs saved = call.forward(isa, threads(0), true, save_gates);
            const BackwardOutputs all = call.backward(isa, threads(0), saved);
            for (int64_t only = 0; only < call.gradients(); ++only) {
              pyeff::poison_scratch(only % 2);
              const BackwardOutputs one = call.backward(isa, threads(static_cast<int>(only % 3)), saved, {only});
              std::vector<const Output*> a, b;
              for (auto [from, to] : {std::pair{&all, &a}, std::pair{&one, &b}}) {
                for (const Output& dphi : from->dphi) to->push_back(&dphi);
                for (const Output* output : {&from->dw_ih, &from->dw_hh, &from->db_ih, &from->db_hh,
                                             &from->dnorm_weight, &from->dnorm_bias, &from->dh0, &from->dc0})
                  to->push_back(output);
              }
              for (int64_t i = 0; i < call.gradients(); ++i) CHECK(i == only ? a[i]->same(*b[i]) : b[i]->count() == 0);
            }
            pyeff::poison_scratch(false);
          });
        }
}
