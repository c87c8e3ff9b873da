#include <algorithm>
#include <chrono>
#include <cstring>
#include <sstream>
#include <string>

#include "support.h"
#if defined(PYEFF_KERNELS)
#include "cuda/emulate/machine.h"
#endif

// The sanitizers' allocators give up where others return null; one test asks for too much.
extern "C" const char* __asan_default_options();
extern "C" const char* __tsan_default_options();
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "allocator_may_return_null=1";
}
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "allocator_may_return_null=1";
}

namespace {

check::Test* running = nullptr;

// How many turns to go on by from that of PYEFF_TURN.
uint64_t further = 0;

void run(check::Test& test) {
  std::printf("%s\n", test.name);
  std::fflush(stdout);
  running = &test;
  const auto begin = std::chrono::steady_clock::now();
  test.body();
  test.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// The kernels that no test has launched, of all that the sources launch.
std::string left_out() {
  std::string names;
#if defined(PYEFF_KERNELS)
  std::istringstream all(PYEFF_KERNELS);
  for (std::string name; all >> name;)
    if (pyeff::gpu::emulate::launched().count(name) == 0) names += " " + name;
#endif
  return names;
}

// Whether a test is about the family of one of these kernels, by its name: that is what a kernel's begins with.
bool is_about(const check::Test& test, const std::string& kernels) {
  std::istringstream all(kernels);
  for (std::string name; all >> name;)
    if (std::strstr(test.name, name.substr(0, name.find('_')).c_str()) != nullptr) return true;
  return false;
}

// Cases of the next turns, the shortest tests first, until every kernel was launched; those of its family before all.
void fill_in() {
  std::vector<check::Test*> tests;
  for (auto& test : check::tests())
    if (test.in_turns) tests.push_back(&test);
  std::stable_sort(tests.begin(), tests.end(), [](auto* a, auto* b) { return a->seconds < b->seconds; });
  for (bool family : {true, false})
    for (further = 1; further < 16 * check::kTurns; ++further)
      for (check::Test* test : tests) {
        const std::string names = left_out();
        if (names.empty()) return;
        if (is_about(*test, names) != family) continue;
        std::printf("for%s also the turn in %d: ", names.c_str(), static_cast<int>(further));
        run(*test);
      }
}

// Where the time goes: a share of cases that takes much longer than the others' is to be divided further.
void print_slowest(size_t most) {
  std::vector<const check::Test*> tests;
  for (const auto& test : check::tests()) tests.push_back(&test);
  std::stable_sort(tests.begin(), tests.end(), [](auto* a, auto* b) { return a->seconds > b->seconds; });
  for (size_t i = 0; i < std::min(most, tests.size()); ++i)
    std::printf("%6.1f s %s\n", tests[i]->seconds, tests[i]->name);
}

}  // namespace

bool check::taken(uint64_t number, uint64_t asan, uint64_t tsan, uint64_t turns) {
  const uint64_t every = !kSanitized ? 1 : kRaces ? tsan : asan;
  const char* turn = std::getenv("PYEFF_TURN");
  if (turn == nullptr || *turn == '\0') return number % every == 1 % every;
  if (running != nullptr) running->in_turns = true;
  // Its last digits choose the instruction set (scripts/turn.py): each set is to meet every share.
  const uint64_t share = std::strtoull(turn, nullptr, 10) / 16 + further;
  return number % (every * turns) == share % (every * turns);
}

// Runs the tests whose names contain the argument; all without one. `--child name` is how a test runs itself.
int main(int count, char** arguments) {
  if (count == 3 && std::strcmp(arguments[1], "--child") == 0) {
    for (const auto& child : check::children())
      if (std::strcmp(child.name, arguments[2]) == 0) return child.body(), 0;
    return 1;
  }
  const char* pattern = count > 1 ? arguments[1] : "";
  int passed = 0;
  for (auto& test : check::tests()) {
    if (std::strstr(test.name, pattern) == nullptr) continue;
    run(test);
    ++passed;
  }
  if (count == 1) fill_in();
  if (count == 1 && !left_out().empty()) {
    std::fprintf(stderr, "no test launches:%s\n", left_out().c_str());
    return 1;
  }
  if (count == 1) print_slowest(8);
  std::printf("%d native tests passed; instruction sets:", passed);
  for (int isa = 0; isa < pyeff::kIsaCount; ++isa) {
    if (pyeff::isa_built() & pyeff::isa_detected() & (1u << isa)) std::printf(" %s", pyeff::isa_name(isa));
  }
  std::printf("\n");
  return passed > 0 ? 0 : 1;
}
