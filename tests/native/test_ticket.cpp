// A ticket's kernels against their definition, and their promises: nothing depends on the number of threads, on what
// lies in the scratch, on how outputs are stored or on what else is asked for; no index leads out of the tensors.
#include <algorithm>
#include <string>

#include "cpu/memory.h"
#include "dev/threads.h"
#include "ticket_call.h"

using namespace check;
using pyeff::dev::Threads;

namespace {

constexpr Activation kActivations[] = {Activation::none, Activation::relu, Activation::gelu};

const pyeff::Parallel& threads(int i) {
  static Threads one(1), two(2), five(5);
  static const pyeff::Parallel all[] = {one.parallel(), two.parallel(), five.parallel()};
  return all[i];
}

// Everything about one call: right in every instruction set, and the same on 1, 2 and 5 threads, with scratch that is
// poisoned or not.
void check_call(const TicketCall& call) {
  const TicketTruth truth = call.truth();
  for_each_usable_isa([&](int isa) {
    const std::string where = std::string(pyeff::isa_name(isa)) + " " + call.name();
    std::pair<Output, Output> first;
    TicketGradients gradients;
    for (int i = 0; i < 3; ++i) {
      pyeff::poison_scratch(i > 0);
      auto outputs = call.forward(isa, threads(i), i < 2);
      auto found = call.backward(isa, threads(i));
      if (i == 0) {
        truth.y.check("y", outputs.first, where);
        truth.z.check("z", outputs.second, where);
        truth.dx.check("dx", found.dx, where);
        truth.dvalues.check("dvalues", found.dvalues, where);
        truth.dbias.check("dbias", found.dbias, where);
        first = std::move(outputs), gradients = std::move(found);
        continue;
      }
      CHECK(outputs.first.guarded() && outputs.first.same(first.first));
      CHECK(outputs.second.count() == 0 || outputs.second.same(first.second));
      CHECK(found.same(gradients));
    }
    pyeff::poison_scratch(false);
  });
}

struct Block {
  int64_t bo, bi;
};
constexpr Block kBlocks[] = {{8, 8},  {16, 16}, {32, 32}, {64, 64}, {1, 1},  {3, 5},
                             {16, 1}, {1, 32},  {7, 9},   {12, 20}, {5, 16}, {24, 8}};

}  // namespace

TEST(tickets_of_every_block_are_right) {
  uint64_t seed = 0;
  for (int sample = 0; sample < (kSanitized ? 1 : 2); ++sample)
    for (const Block& block : kBlocks)
      for (Number number : kNumbers)
        for (int64_t tokens : {1, 6, 8, 50, 131}) {
          Random random(++seed);
          if (!taken(seed)) continue;
          TicketOptions o;
          o.activation = random.pick(kActivations), o.bias = random.coin(), o.strided = random.coin();
          o.density = random.coin() ? 0.3 : 0.8;
          // Neither side is a multiple of its block, but for some.
          const int64_t in = block.bi * 3 + random.below(block.bi + 20);
          const int64_t out = block.bo * 2 + random.below(block.bo + 30);
          check_call(TicketCall(number, {tokens, in, out, block.bo, block.bi}, o, seed));
        }
}

// More tokens than a chunk of the values' gradient and than a pass of the panels; one block that reaches past both ends
// of the weight; no block at all; all of them.
TEST(tickets_take_sizes_beyond_every_block) {
  uint64_t seed = 1000;
  for (Number number : kNumbers) {
    TicketOptions o;
    o.activation = kActivations[++seed % 3];
    check_call(TicketCall(number, {kSanitized ? 520 : 1300, 20, 18, 8, 16}, o, ++seed));
    check_call(TicketCall(number, {40, 3, 5, 128, 64}, o, ++seed));
    if (!kSanitized) check_call(TicketCall(number, {70, 900, 40, 32, 32}, o, ++seed));
    for (double density : {0.0, 1.0})
      for (int64_t tokens : {2, 33}) {
        o.density = density, o.bias = !o.bias;
        o.activation = kActivations[++seed % 3];
        check_call(TicketCall(number, {tokens, 40, 37, 16, 8}, o, ++seed));
      }
  }
}

TEST(every_gradient_of_a_ticket_can_be_wanted_alone) {
  uint64_t seed = 2000;
  for (Number number : kNumbers)
    for (Activation activation : kActivations)
      for (int64_t tokens : {5, 300}) {
        TicketOptions o;
        o.activation = activation;
        const TicketCall call(number, {tokens, 40, 22, 8, 16}, o, ++seed);
        for_each_usable_isa([&](int isa) {
          const TicketGradients all = call.backward(isa, threads(1));
          CHECK(call.backward(isa, threads(0), TicketCall::dx).dx.same(all.dx));
          CHECK(call.backward(isa, threads(2), TicketCall::dvalues).dvalues.same(all.dvalues));
          CHECK(call.backward(isa, threads(1), TicketCall::dbias).dbias.same(all.dbias));
        });
      }
}

// What is stored past the caches is the same.
TEST(tickets_outputs_may_pass_the_caches_by) {
  struct Aligned {
    explicit Aligned(int64_t bytes) : memory(static_cast<size_t>(bytes + 64)), bytes(bytes) {}
    void* data() { return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64); }
    std::vector<char> memory;
    int64_t bytes;
  };
  uint64_t seed = 3000;
  for (Number number : kNumbers)
    for (Activation activation : kActivations) {
      TicketOptions o;
      o.activation = activation;
      const TicketCall call(number, {50, 64, 96, 16, 8}, o, ++seed);
      const int64_t bytes = 50 * 96 * size_of(number), dx_bytes = 50 * 64 * size_of(number);
      for_each_usable_isa([&](int isa) {
        Aligned y[2] = {Aligned(bytes), Aligned(bytes)}, z[2] = {Aligned(bytes), Aligned(bytes)};
        Aligned dx[2] = {Aligned(dx_bytes), Aligned(dx_bytes)};
        for (int i = 0; i < 2; ++i) {
          const int64_t from = i ? 0 : INT64_MAX;
          CHECK(PYEFF_ALL_OF(ticket_forward)
                    .of[isa](call.problem(), {call.bias.data(), y[i].data(), z[i].data(), from}, threads(1)));
          CHECK(PYEFF_ALL_OF(ticket_backward)
                    .of[isa](
                        call.problem(),
                        {call.grad.data(), call.grad_stride, call.saved.maybe(), dx[i].data(), nullptr, nullptr, from},
                        threads(1)));
        }
        CHECK(std::memcmp(y[0].data(), y[1].data(), static_cast<size_t>(bytes)) == 0);
        CHECK(std::memcmp(z[0].data(), z[1].data(), static_cast<size_t>(bytes)) == 0);
        CHECK(std::memcmp(dx[0].data(), dx[1].data(), static_cast<size_t>(dx_bytes)) == 0);
      });
    }
}

// An index is determined by its blocks, and every number in it twice over: one that is changed shows.
TEST(a_wrong_index_is_refused) {
  for (uint64_t seed = 1; seed < 6; ++seed) {
    TicketCall call(Number::f32, {2, 40 + int64_t(seed), 50, 8, 16}, {}, seed);
    for_each_usable_isa([&](int isa) {
      const auto error = PYEFF_ALL_OF(ticket_index_error).of[isa];
      CHECK(error(call.problem()) == nullptr);
      for (int32_t& number : call.index) {
        const int32_t right = number;
        for (int32_t wrong : {right + 1, right - 1, right + 1000, INT32_MAX, INT32_MIN}) {
          number = wrong;
          CHECK(error(call.problem()) != nullptr);
        }
        number = right;
      }
      // Two that are swapped, too.
      for (size_t i = 1; i < call.index.size(); ++i) {
        if (call.index[i] == call.index[i - 1]) continue;
        std::swap(call.index[i], call.index[i - 1]);
        CHECK(error(call.problem()) != nullptr);
        std::swap(call.index[i], call.index[i - 1]);
      }
    });
  }
}
