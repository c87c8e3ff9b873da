// A test runner small enough to be built under every sanitizer and for every architecture.
//   TEST(name) { CHECK(condition); }
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
  // Whether another turn has other cases, and how long those of this one took.
  bool in_turns = false;
  double seconds = 0;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

// What a test runs in a process of its own, because a sanitizer is to end it.
inline std::vector<Test>& children() {
  static std::vector<Test> all;
  return all;
}

// Whether a case of a grid runs, by its number: one in `asan` under AddressSanitizer, one in `tsan` under
// ThreadSanitizer, every one without. CI sets PYEFF_TURN, another number for each commit: then these are others each
// time, and of a grid that takes long only one in `turns`, also without a sanitizer: there another processor is
// emulated. main.cpp sees to it that no kernel of a GPU is left out.
constexpr uint64_t kTurns = 4;
bool taken(uint64_t number, uint64_t asan = 1, uint64_t tsan = 1, uint64_t turns = kTurns);

struct Register {
  Register(std::vector<Test>& where, const char* name, void (*body)()) { where.push_back({name, body}); }
};

}  // namespace check

#define PYEFF_REGISTER(where, name)                                           \
  static void test_##name();                                                  \
  static check::Register register_##name(check::where(), #name, test_##name); \
  static void test_##name()
#define TEST(name) PYEFF_REGISTER(tests, name)
#define CHILD(name) PYEFF_REGISTER(children, name)

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (0)
