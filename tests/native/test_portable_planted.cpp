// Planted bugs that the emulation itself must complain about, or that must show in the results, and their right twins.
#include "planted/barriers.cuh"
#include "planted/edges.cuh"
#include "planted/stages.cuh"
#include "portable.h"

using namespace check;
using namespace planted;
using pyeff::gpu::emulate::Buffers;

namespace {

constexpr int kThreads = 128;

// Memory for one run: input, and output full of NaN.
struct Memory {
  std::vector<float> in, out;
  explicit Memory(int count) : in(static_cast<size_t>(count)), out(in.size()) {
    Random random(static_cast<uint64_t>(count));
    for (auto& x : in) x = static_cast<float>(random.uniform());
    std::memset(out.data(), 0xff, out.size() * 4);
  }
  bool written() const {
    for (float x : out)
      if (x != x) return false;
    return true;
  }
  void allow(Buffers& buffers) {
    buffers.reads(in.data(), in.size() * 4, "in");
    buffers.writes(out.data(), out.size() * 4, "out");
  }
};

template <class P>
void run_row(void (*kernel)(P), const pyeff::gpu::Launch& how, int n, std::initializer_list<const char*> words) {
  Memory m(kThreads);
  Buffers buffers;
  m.allow(buffers);
  const P p{m.in.data(), m.out.data(), n};
  if (words.size() != 0)
    refused(kernel, how, p, words);
  else
    run(kernel, how, p);
}

}  // namespace

TEST(planted_divergence) {
  const auto how = blocks(1, kThreads, kThreads * 4);
  run_row(early_end<true>, how, 64, {});
  run_row(early_end<false>, how, 64,
          {"kernel planted::Row", "block (0, 0, 0)", "threads 0-63 wait at barrier (",
           "barriers.cuh:", "threads 64-127 have ended"});
  run_row(early_end<false>, how, 33, {"threads 0-32 wait at barrier (", "threads 33-127 have ended"});
  run_row(barrier_in_branch<true>, how, 40, {});
  run_row(barrier_in_branch<false>, how, 40, {"divergence: it comes to barrier while others wait at barrier ("});
  run_row(shuffle_in_branch<true>, how, 0, {});
  run_row(shuffle_in_branch<false>, how, 0,
          {"threads 0-15, 32-47, 64-79, 96-111 wait at shuffle (", "threads 16-31, 48-63, 80-95, 112-127 have ended"});
  run_row(wrong_count<true>, how, 0, {});
  run_row(wrong_count<false>, how, 0, {"threads 0-63 wait at named_barrier 3 (", "threads 64-127 have ended"});
  run_row(crossed_barriers<true>, how, 0, {});
  run_row(crossed_barriers<false>, how, 0,
          {"threads 0-63 wait at named_barrier 1 (", "threads 64-127 wait at named_barrier 2 ("});
  // What went wrong before leaves nothing behind.
  run_row(early_end<true>, how, 64, {});
}

TEST(planted_edges) {
  constexpr int n = 100;
  const auto with = [](auto kernel, int grid, int shared_bytes, int in, int out, bool right,
                       std::initializer_list<const char*> words) {
    std::vector<float> memory(2048, 1.0f);
    float *from = memory.data() + 256, *to = memory.data() + 1024;
    Buffers buffers;
    buffers.reads(from, static_cast<size_t>(in) * 4, "in");
    buffers.writes(to, static_cast<size_t>(out) * 4, "out");
    const Edge p{from, to, n};
    if (right)
      run(kernel, blocks(grid, 64, shared_bytes), p);
    else
      refused(kernel, blocks(grid, 64, shared_bytes), p, words);
  };
  with(load_past_edge<true>, 2, 0, n, n, true, {});
  with(load_past_edge<false>, 2, 0, n, n, false,
       {"block (1, 0, 0), thread 36 (warp 1, lane 4)", "edges.cuh:", "a load of 4 bytes",
        "nearest, in (400 bytes), ends 0 bytes before it"});
  with(store_past_edge<true>, 2, 0, n, n, true, {});
  with(store_past_edge<false>, 2, 0, n, n, false, {"thread 36", "a store of 4 bytes", "out (400 bytes), ends 0 bytes"});
  const auto shared = [&](auto kernel, int count, bool right, std::initializer_list<const char*> words) {
    std::vector<float> in(64, 1.0f), out(64);
    const Edge p{in.data(), out.data(), count};
    if (right)
      run(kernel, blocks(1, 64, count * 4), p);
    else
      refused(kernel, blocks(1, 64, count * 4), p, words);
  };
  shared(shared_load_past_edge<true>, 50, true, {});
  shared(shared_load_past_edge<false>, 50, false, {"thread 49", "a load of 4 bytes at offset 200 of shared memory"});
  shared(shared_store_past_edge<true>, 50, true, {});
  shared(shared_store_past_edge<false>, 50, false, {"thread 50", "a store of 4 bytes at offset 200 of shared memory"});
  shared(writes_input<true>, 50, true, {});
  with(writes_input<false>, 1, 0, n, n, false, {"a store into in, which is only to be read"});
}

TEST(planted_alignment_and_copies) {
  alignas(16) static float in[1024], out[1024];
  Buffers buffers;
  buffers.reads(in, 25 * 4 * 4, "in");
  buffers.writes(out, sizeof out, "out");
  run(copy_past_edge<true>, blocks(1, 64, 64 * 16), Edge{in, out, 100});
  refused(copy_past_edge<false>, blocks(1, 64, 64 * 16), Edge{in, out, 100},
          {"thread 25", "a load of 16 bytes", "in (400 bytes), ends 0 bytes before it"});
  buffers.reads(in, sizeof in, "in");
  run(misaligned<true>, blocks(1, 32), Edge{in, out, 7});
  refused(misaligned<false>, blocks(1, 32), Edge{in, out, 7}, {"an access of 16 bytes", "misaligned"});
}

TEST(planted_unwritten_output) {
  for (bool right : {true, false}) {
    Memory m(1000);
    Buffers buffers;
    m.allow(buffers);
    run(right ? forgotten_rest<true> : forgotten_rest<false>, blocks(1, 64), Edge{m.in.data(), m.out.data(), 1000});
    CHECK(m.written() == right);
  }
}

namespace {

std::vector<uint16_t> factors() {
  Random random(77);
  std::vector<uint16_t> x(2 * 64 * 64);
  for (auto& v : x) v = pyeff::gpu::from_float<pyeff::gpu::bf16>(static_cast<float>(random.uniform())).bits;
  return x;
}

template <ProductBug Bug>
void run_product(std::initializer_list<const char*> words) {
  alignas(16) static uint16_t x[2 * 64 * 64];
  const auto from = factors();
  std::memcpy(x, from.data(), sizeof x);
  std::vector<float> out(64 * 64, -1.0f);
  Buffers buffers;
  buffers.reads(x, sizeof x, "factors");
  buffers.writes(out.data(), out.size() * 4, "out");
  const Factors p{reinterpret_cast<char*>(x), reinterpret_cast<char*>(x + 64 * 64), out.data()};
  const auto how = blocks(1, 128, 2 * 64 * 128);
  if (words.size() != 0) return refused(product<Bug>, how, p, words);
  run(product<Bug>, how, p);
  int wrong = 0;
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 64; ++j) {
      double truth = 0;
      for (int k = 0; k < 64; ++k) truth += of_bf16(x[i * 64 + k]) * of_bf16(x[(64 + j) * 64 + k]);
      wrong += !(std::fabs(out[static_cast<size_t>(i * 64 + j)] - truth) <= 64 * 0x1p-24 * 64);
    }
  // What is seen too early is NaN everywhere.
  CHECK(wrong == (Bug == ProductBug::none ? 0 : 64 * 64));
}

}  // namespace

TEST(planted_products) {
  run_product<ProductBug::none>({});
  run_product<ProductBug::no_proxy_fence>({"wrote without an async_proxy_fence after it"});
  run_product<ProductBug::late_write>({"wgmma reads b", "wrote without an async_proxy_fence after it"});
  run_product<ProductBug::no_wait>({});
  run_product<ProductBug::no_commit>({"ends without a wgmma_wait for its last wgmma"});
  run_product<ProductBug::no_fence>({"wgmma without a wgmma_fence since the last wait"});
#ifndef __SANITIZE_THREAD__  // which ends the process: see test_portable_races.cpp
  run_product<ProductBug::overwritten>({"changed while it was under way"});
  run_product<ProductBug::early>({"changed while it was under way"});
#endif
  run_product<ProductBug::wrong_stride>({"wgmma reads b, row 32", "of which there are 16384 bytes"});
}

namespace {

template <ClusterBug Bug>
void run_exchange(std::initializer_list<const char*> words) {
  Memory m(4 * 64);
  Buffers buffers;
  m.allow(buffers);
  const Exchange p{m.in.data(), m.out.data()};
  if (words.size() != 0) return refused(exchange<Bug>, blocks(4, 64, 64 * 4, 2), p, words);
  run(exchange<Bug>, blocks(4, 64, 64 * 4, 2), p);
  for (size_t i = 0; i < 256; ++i) CHECK(m.out[i] == m.in[i ^ 64]);
}

}  // namespace

TEST(planted_clusters) {
  run_exchange<ClusterBug::none>({});
  run_exchange<ClusterBug::no_first>({"may not have begun: no cluster_barrier came before"});
  run_exchange<ClusterBug::no_last>({"may have ended before block", "no cluster_barrier comes after", "stages.cuh:"});
}
