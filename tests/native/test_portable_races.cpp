// Planted races. In the ordinary run they must show in the results, under ThreadSanitizer they must be reported,
// whatever the order of the threads. There each wrong kernel runs in a process of its own, which the report ends.
#include <unistd.h>

#include <functional>

#include "planted/barriers.cuh"
#include "planted/edges.cuh"
#include "planted/stages.cuh"
#include "portable.h"

using namespace check;
using namespace planted;

namespace {

constexpr int kThreads = 128, kSteps = 6, kCount = kSteps * kThreads;

struct Memory {
  alignas(16) float in[4 * kCount], out[4 * kCount];
};

// Runs a kernel on small whole numbers; true if each result is what `truth` says.
template <class P, class F>
bool right(void (*kernel)(P), const pyeff::gpu::Launch& how, int n, int count, F&& truth) {
  static Memory m;
  for (int i = 0; i < 4 * kCount; ++i) m.in[i] = static_cast<float>(i + 1);
  std::memset(m.out, 0xff, sizeof m.out);
  P p;
  if constexpr (std::is_same<P, Tiles>::value)
    p = {reinterpret_cast<char*>(m.in), reinterpret_cast<char*>(m.out), n};
  else if constexpr (std::is_same<P, Exchange>::value)
    p = {m.in, m.out};
  else
    p = {m.in, m.out, n};
  run(kernel, how, p);
  for (int i = 0; i < count; ++i)
    if (m.out[i] != truth(i)) return false;
  return true;
}

template <bool Right>
bool one_barrier() {
  return right(missing_barrier<Right>, blocks(1, kThreads, kThreads * 4), 0, kThreads,
               [](int i) { return static_cast<float>(kThreads - i); });
}
template <bool Right>
bool two_barriers() {
  return right(missing_second_barrier<Right>, blocks(1, kThreads, kThreads * 4), kSteps, kCount,
               [](int i) { return static_cast<float>(i + 1 + i / kThreads * kThreads + (i + 1) % kThreads + 1); });
}
template <bool Right>
bool twice_summed() {
  return right(two_sums<Right>, blocks(1, kThreads, kThreads / 8), 0, 2 * kThreads,
               [](int i) { return static_cast<float>((1 + i / kThreads) * (kThreads * (kThreads + 1) / 2)); });
}
template <bool Right>
bool in_a_warp() {
  return right(shuffle_for_warp_barrier<Right>, blocks(1, kThreads, kThreads * 4), 0, kThreads,
               [](int i) { return static_cast<float>((i ^ 1) + 1); });
}
template <StageBug Bug>
bool stages() {
  return right(two_stages<Bug>, blocks(1, kThreads, 2 * kThreads * 16), kSteps, 4 * kCount,
               [](int i) { return static_cast<float>(i + 1); });
}
template <ClusterBug Bug>
bool neighbours() {
  return right(exchange<Bug>, blocks(4, 64, 64 * 4, 2), 0, 256, [](int i) { return static_cast<float>((i ^ 64) + 1); });
}
template <bool Right>
bool between_blocks() {
  return right(blocks_collide<Right>, blocks(4, kThreads), 0, 4 * kThreads,
               [](int i) { return static_cast<float>(i + 1); });
}

// Ones times twos.
template <ProductBug Bug>
bool factors() {
  alignas(16) static uint16_t ones[64 * 64], twos[64 * 64];
  static float out[64 * 64];
  for (int i = 0; i < 64 * 64; ++i) {
    ones[i] = bf16_of(1);
    twos[i] = bf16_of(2);
  }
  run(product<Bug>, blocks(1, 128, 2 * 64 * 128),
      Factors{reinterpret_cast<char*>(ones), reinterpret_cast<char*>(twos), out});
  for (float x : out)
    if (x != 128) return false;
  return true;
}

// In how many orders of the threads the results are wrong.
constexpr int kSeeds = 20;
int shown(bool (*once)()) {
  int wrong = 0;
  for (int seed = 1; seed <= kSeeds; ++seed) {
    setenv("PYEFF_EMULATE_SEED", std::to_string(seed).c_str(), 1);
    wrong += !once();
  }
  unsetenv("PYEFF_EMULATE_SEED");
  return wrong;
}

// What the process says, and how it ends.
[[maybe_unused]] std::pair<std::string, int> say(const char* child) {
  char self[4096];
  const ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
  CHECK(length > 0);
  self[length] = '\0';
  FILE* pipe = popen(("'" + std::string(self) + "' --child " + child + " 2>&1").c_str(), "r");
  CHECK(pipe != nullptr);
  std::string all;
  char some[4096];
  while (size_t count = std::fread(some, 1, sizeof some, pipe)) all.append(some, count);
  return {all, pclose(pipe)};
}

[[maybe_unused]] void reported(const char* child, const char* word) {
  const auto [text, status] = say(child);
  if (text.find(word) == std::string::npos || status == 0) {
    std::fprintf(stderr, "%s: expected '%s', got status %d and: %s\n", child, word, status, text.c_str());
    std::exit(1);
  }
}

}  // namespace

CHILD(missing_barrier) { one_barrier<false>(); }
CHILD(missing_second_barrier) { two_barriers<false>(); }
CHILD(two_sums) { twice_summed<false>(); }
CHILD(shuffle_for_warp_barrier) { in_a_warp<false>(); }
CHILD(early_overwrite) { stages<StageBug::early_overwrite>(); }
CHILD(no_barrier_after_wait) { stages<StageBug::no_barrier>(); }
CHILD(no_cluster_barrier) { neighbours<ClusterBug::no_middle>(); }
CHILD(blocks_collide) { between_blocks<false>(); }
CHILD(factor_overwritten) { factors<ProductBug::overwritten>(); }
CHILD(factor_not_there) { factors<ProductBug::early>(); }
CHILD(unchecked) {
  float in[64], out[64];
  run(unchecked<false>, blocks(1, 64, 200), Edge{in, out, 50});
}

TEST(planted_races_right_twins) {
  for (int seed : {1, 2, 3}) {
    setenv("PYEFF_EMULATE_SEED", std::to_string(seed).c_str(), 1);
    CHECK(one_barrier<true>() && two_barriers<true>() && twice_summed<true>() && in_a_warp<true>() &&
          stages<StageBug::none>() && neighbours<ClusterBug::none>() && between_blocks<true>() &&
          factors<ProductBug::none>());
    float in[64], out[64];
    run(unchecked<true>, blocks(1, 64, 200), Edge{in, out, 50});
  }
  unsetenv("PYEFF_EMULATE_SEED");
}

// No race, but nothing is there yet.
TEST(planted_missing_waits_show_in_the_results) {
  CHECK(shown(stages<StageBug::no_wait>) == kSeeds);
  CHECK(shown(stages<StageBug::short_wait>) == kSeeds);
}

// A shuffle that should have been a barrier of the warp is not here: in an ordinary run it happens to be one.
#ifdef __SANITIZE_THREAD__
TEST(planted_races_are_reported) {
  for (const char* child :
       {"missing_barrier", "missing_second_barrier", "two_sums", "shuffle_for_warp_barrier", "early_overwrite",
        "no_barrier_after_wait", "no_cluster_barrier", "blocks_collide", "factor_overwritten", "factor_not_there"})
    reported(child, "ThreadSanitizer: data race");
}
#else
TEST(planted_races_show_in_the_results) {
  CHECK(shown(one_barrier<false>) == kSeeds);
  CHECK(shown(two_barriers<false>) == kSeeds);
  // Those in which one warp is far ahead.
  CHECK(shown(twice_summed<false>) >= kSeeds / 3);
  CHECK(shown(stages<StageBug::early_overwrite>) == kSeeds);
  CHECK(shown(stages<StageBug::no_barrier>) == kSeeds);
  CHECK(shown(neighbours<ClusterBug::no_middle>) == kSeeds);
}
#endif

#ifdef __SANITIZE_ADDRESS__
TEST(planted_unchecked_access_past_shared_memory_is_reported) { reported("unchecked", "AddressSanitizer"); }
#endif
