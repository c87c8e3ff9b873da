// sigmoid, tanh and gelu against long double, and the conversions.
#include <limits>

#include "dev/probe.h"
#include "support.h"

using namespace check;
using pyeff::MathFunction;
using pyeff::ToBf16;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

long double exact(MathFunction function, long double x) {
  return function == MathFunction::tanh ? std::tanh(x) : 1 / (1 + std::exp(-x));
}

// Arguments where something can go wrong: the whole range of exponents, both sides of each branch, and many between.
std::vector<double> arguments(Number number) {
  std::vector<double> x = {0.0, -0.0, 1.0, 20.0, 44.0, 88.0, 708.0, 1e4, kInfinity, 0.34657, 0.5};
  const int lowest = number == Number::f64 ? -1074 : -149, highest = number == Number::f64 ? 1023 : 127;
  for (int e = lowest; e <= highest; ++e) x.push_back(std::ldexp(1.0, e));
  for (int e = lowest; e <= highest; e += 3) x.push_back(std::ldexp(1.375, e));
  Random random(1);
  for (double scale : {1e-3, 1.0, 10.0, 100.0, 800.0})
    for (int i = 0; i < (kSanitized ? 1000 : 20000); ++i) x.push_back(scale * random.uniform());
  const size_t count = x.size();
  for (size_t i = 0; i < count; ++i) x.push_back(-x[i]);
  for (double& v : x) v = rounded(number, v);
  return x;
}

std::vector<double> apply(int isa, MathFunction function, Number number, const std::vector<double>& x) {
  const Input in(number, x);
  const Output out(number, static_cast<int64_t>(x.size()));
  PYEFF_ALL_OF(apply_math).of[isa](function, number, in.data(), out.data(), out.count());
  CHECK(out.guarded());
  std::vector<double> y(x.size());
  for (size_t i = 0; i < y.size(); ++i) y[i] = out[static_cast<int64_t>(i)];
  return y;
}

}  // namespace

TEST(sigmoid_and_tanh_are_right_to_a_few_units_in_the_last_place) {
  for (Number number : {Number::f64, Number::f32}) {
    const std::vector<double> x = arguments(number);
    const double smallest = number == Number::f64 ? 0x1p-1022 : 0x1p-126;
    for_each_usable_isa([&](int isa) {
      for (auto function : {MathFunction::sigmoid, MathFunction::tanh}) {
        const std::vector<double> y = apply(isa, function, number, x);
        for (size_t i = 0; i < x.size(); ++i) {
          const long double truth = exact(function, x[i]);
          // Where sigmoid is no normal number, its relative error is of no interest; that of tanh is.
          const long double least = function == MathFunction::sigmoid ? 2 * smallest : 0;
          const long double unit =
              std::fmax(std::fabs(truth) * epsilon(number), number == Number::f64 ? 0x1p-1074L : 0x1p-149L);
          if (!(std::fabs(y[i] - truth) <= 4 * unit + least)) {
            std::fprintf(stderr, "%s %s %s(%a) = %a, not %La\n", pyeff::isa_name(isa), name_of(number),
                         function == MathFunction::tanh ? "tanh" : "sigmoid", x[i], y[i], truth);
            std::exit(1);
          }
        }
      }
    });
  }
}

TEST(sigmoid_and_tanh_at_the_ends) {
  for (Number number : {Number::f64, Number::f32}) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    // Lanes do not touch each other: every special number beside every other one.
    const std::vector<double> x = {nan, 1.0, kInfinity, -nan, -kInfinity, 0.0, nan, -0.0, 2.0};
    for_each_usable_isa([&](int isa) {
      const std::vector<double> s = apply(isa, MathFunction::sigmoid, number, x);
      const std::vector<double> t = apply(isa, MathFunction::tanh, number, x);
      for (size_t i = 0; i < x.size(); ++i) CHECK((x[i] != x[i]) == (s[i] != s[i]) && (x[i] != x[i]) == (t[i] != t[i]));
      CHECK(s[2] == 1 && t[2] == 1 && t[4] == -1 && s[4] >= 0 && s[4] < 0x1p-120);
      CHECK(s[5] == 0.5 && s[7] == 0.5);
      CHECK(t[5] == 0 && !std::signbit(t[5]) && t[7] == 0 && std::signbit(t[7]));
    });
  }
}

// The tail of gelu is as small as exp(-x^2 / 2), whose argument is rounded: so many units more.
TEST(gelu_and_its_derivative_are_right_to_a_few_units_in_the_last_place) {
  const long double pi = std::acos(-1.0L);
  for (Number number : {Number::f64, Number::f32}) {
    const std::vector<double> x = arguments(number);
    const double smallest = number == Number::f64 ? 0x1p-1022 : 0x1p-126;
    for_each_usable_isa([&](int isa) {
      const std::vector<double> y = apply(isa, MathFunction::gelu, number, x);
      const std::vector<double> slope = apply(isa, MathFunction::gelu_derivative, number, x);
      for (size_t i = 0; i < x.size(); ++i) {
        const long double v = x[i];
        if (std::isinf(x[i])) {
          CHECK(x[i] > 0 ? std::isinf(y[i]) && y[i] > 0 : y[i] != y[i]);  // -inf * 0, as by the definition
          continue;
        }
        const long double below = std::erfc(-v / std::sqrt(2.0L)) / 2, bell = std::exp(-v * v / 2) / std::sqrt(2 * pi);
        const long double tail = std::fmin(below, 1 - below), far = std::fmin(v * v, 2e3L), unit = epsilon(number);
        const long double least = 4 * smallest * (1 + std::fabs(v));
        const bool right = std::fabs(y[i] - v * below) <= std::fabs(v) * (4 * below + (4 + far) * tail) * unit + least;
        const bool right_slope = std::fabs(slope[i] - (below + v * bell)) <=
                                 (4 * below + (4 + far) * (tail + std::fabs(v) * bell)) * unit + least;
        if (right && right_slope) continue;
        std::fprintf(stderr, "%s %s gelu(%a) = %a, not %La; its derivative %a, not %La\n", pyeff::isa_name(isa),
                     name_of(number), x[i], y[i], v * below, slope[i], below + v * bell);
        std::exit(1);
      }
      const double nan = std::nan("");
      for (auto function : {MathFunction::gelu, MathFunction::gelu_derivative}) {
        const std::vector<double> beside = apply(isa, function, number, {nan, 1.0, nan, -1.0});
        CHECK(beside[0] != beside[0] && beside[1] == beside[1] && beside[2] != beside[2] && beside[3] == beside[3]);
      }
    });
  }
}

TEST(every_conversion_to_bf16_rounds_to_nearest_even) {
  std::vector<double> x = {0.0,
                           -0.0,
                           1.0,
                           -1.0,
                           kInfinity,
                           -kInfinity,
                           3.4e38,
                           -3.4e38,
                           0x1p-149,
                           0x1p-133,
                           0x1p-134,
                           0x1.8p-133,
                           std::numeric_limits<double>::quiet_NaN()};
  for (int i = 0; i < 512; ++i)  // all that can be cut off, at both parities of the last bit
    for (int cut : {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff}) x.push_back(std::ldexp(0x3f8000 + i * 0x8000 + cut, -20));
  const Input in(Number::f32, x);
  const int64_t count = static_cast<int64_t>(x.size());
  for_each_usable_isa([&](int isa) {
    for (auto way : {ToBf16::scalar, ToBf16::vector, ToBf16::pair}) {
      const Output out(Number::bf16, count);
      PYEFF_ALL_OF(to_bf16).of[isa](way, static_cast<const float*>(in.data()), static_cast<uint16_t*>(out.data()),
                                    count);
      CHECK(out.guarded());
      for (int64_t i = 0; i < count; ++i) {
        const double truth = of_bf16(bf16_of(in[i]));
        CHECK(truth != truth ? out[i] != out[i] : out[i] == truth && std::signbit(out[i]) == std::signbit(truth));
      }
    }
  });
  // A NaN whose payload lies in the bits that are cut off must not become infinity, nor carry into the sign.
  for (uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu}) {
    float nan;
    std::memcpy(&nan, &bits, sizeof nan);
    for_each_usable_isa([&](int isa) {
      for (auto way : {ToBf16::scalar, ToBf16::vector, ToBf16::pair}) {
        uint16_t half = 0;
        PYEFF_ALL_OF(to_bf16).of[isa](way, &nan, &half, 1);
        CHECK(of_bf16(half) != of_bf16(half));
      }
    });
  }
}

TEST(parts_of_a_vector_are_loaded_and_stored_alone) {
  for (Number number : kNumbers) {
    for_each_usable_isa([&](int isa) {
      for (int count = 1; count <= PYEFF_ALL_OF(lanes_of).of[isa](number); ++count) {
        Input in(number, count);
        const Output out(number, count);
        for (int i = 0; i < count; ++i) in.set(i, i + 1);
        PYEFF_ALL_OF(copy_first).of[isa](number, in.data(), out.data(), count);
        for (int i = 0; i < count; ++i) CHECK(out[i] == i + 1);
        CHECK(out.guarded());
      }
    });
  }
}
