// A test runner small enough to be built under every sanitizer and for every architecture.
//   TEST(name) { CHECK(condition); }
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
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
