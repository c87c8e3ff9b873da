// READ's kernels on buffers of exactly the right size, so that a sanitizer sees every step outside them. What they
// compute is tested from Python against the definition; here only that all of it is written, and the same for any
// thread count.
#include <cmath>
#include <cstring>

#include "check.h"
#include "cpu/read.h"
#include "dev/threads.h"
#include "usable.h"

using namespace pyeff;

namespace {

struct Shape {
  int64_t layers, tokens, width, rank;
};

// Odd sizes around the tiles' edges, and one of each.
constexpr Shape kShapes[] = {{1, 1, 1, 1}, {3, 7, 5, 3}, {2, 65, 33, 17}, {2, 40, 64, 48}};

int64_t size_of(Number number) { return number == Number::f64 ? 8 : number == Number::f32 ? 4 : 2; }

struct Buffer {
  Number number;
  std::vector<unsigned char> bytes;

  // All ones are a NaN in every type: what a kernel does not write shows.
  Buffer(Number number, int64_t count) : number(number), bytes(count * size_of(number), 0xff) {}
  int64_t count() const { return static_cast<int64_t>(bytes.size()) / size_of(number); }
  void* data() { return bytes.empty() ? nullptr : bytes.data(); }

  void set(int64_t i, double value) {
    const float narrow = static_cast<float>(value);
    if (number == Number::f64) {
      std::memcpy(&bytes[8 * i], &value, 8);
    } else if (number == Number::f32) {
      std::memcpy(&bytes[4 * i], &narrow, 4);
    } else {
      uint32_t bits;
      std::memcpy(&bits, &narrow, 4);
      const uint16_t high = static_cast<uint16_t>(bits >> 16);
      std::memcpy(&bytes[2 * i], &high, 2);
    }
  }
  double get(int64_t i) const {
    double wide = 0;
    float narrow = 0;
    if (number == Number::f64) {
      std::memcpy(&wide, &bytes[8 * i], 8);
      return wide;
    }
    if (number == Number::f32) {
      std::memcpy(&narrow, &bytes[4 * i], 4);
    } else {
      uint16_t high;
      std::memcpy(&high, &bytes[2 * i], 2);
      const uint32_t bits = static_cast<uint32_t>(high) << 16;
      std::memcpy(&narrow, &bits, 4);
    }
    return narrow;
  }
  // Numbers between -1/2 and 1/2 from a congruential generator.
  Buffer& fill(uint32_t seed) {
    uint32_t state = seed * 2654435761u + 1;
    for (int64_t i = 0; i < count(); ++i) set(i, ((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24 - 0.5);
    return *this;
  }
  bool finite() const {
    for (int64_t i = 0; i < count(); ++i) {
      if (!std::isfinite(get(i))) return false;
    }
    return true;
  }
};

// One call forward and backward. `full` has every optional argument, gradient and saved gate; otherwise there are none
// of them, and the gates are computed again.
std::vector<Buffer> run(int isa, Number number, Cell cell, Norm norm, bool full, const Shape& s, int threads) {
  const bool lstm = cell == Cell::lstm;
  const int64_t rows = (cell == Cell::rnn ? 1 : cell == Cell::gru ? 3 : 4) * s.rank, state = s.tokens * s.rank;
  const int64_t kinds = norm == Norm::none ? 0 : norm == Norm::rms ? 1 : 2;
  const Number wide = number == Number::f64 ? Number::f64 : Number::f32;
  dev::Threads pool(threads);

  // Layer outputs with gaps: between the numbers of a row if full, else between the rows.
  const int64_t inner = full ? 2 : 1, stride = full ? 2 * s.width : s.width + 3;
  std::vector<Buffer> phi, dphi;
  std::vector<ReadRows> views;
  std::vector<void*> dphi_data;
  for (int64_t i = 0; i < s.layers; ++i) {
    phi.push_back(Buffer(number, (s.tokens - 1) * stride + (s.width - 1) * inner + 1).fill(100 + i));
    dphi.emplace_back(number, full ? s.tokens * s.width : 0);
  }
  for (int64_t i = 0; i < s.layers; ++i) {
    views.push_back({phi[i].data(), inner, 1, {s.tokens}, {stride}});
    dphi_data.push_back(dphi[i].data());
  }

  auto optional = [&](bool there, int64_t count, uint32_t seed) {
    return Buffer(number, there ? count : 0).fill(seed);
  };
  Buffer w_ih = optional(true, rows * s.width, 1), w_hh = optional(true, rows * s.rank, 2);
  Buffer b_ih = optional(full, rows, 3), b_hh = optional(full, rows, 4);
  Buffer gain = optional(full && norm != Norm::none, s.width, 5),
         shift = optional(full && norm == Norm::layer, s.width, 6);
  Buffer h0 = optional(full, state, 7), c0 = optional(full && lstm, state, 8);
  Buffer grad_out = optional(true, state, 9), grad_c = optional(full && lstm, state, 10);
  const ReadProblem problem{number, number, cell,         norm,        full ? Reduce::mean : Reduce::last,
                            1e-6,        s.layers,     s.tokens,    s.width,
                            s.rank,      views.data(), w_ih.data(), w_hh.data(),
                            b_ih.data(), b_hh.data(),  gain.data(), shift.data(),
                            h0.data(),   c0.data()};

  Buffer out(number, state), c_last(number, lstm ? state : 0), h(number, s.layers * state);
  Buffer c(number, lstm ? s.layers * state : 0), gates(number, full && cell != Cell::rnn ? 4 * s.layers * state : 0);
  Buffer stats(wide, kinds * s.layers * s.tokens);
  const ReadForward forward{out.data(), c_last.data(), h.data(), c.data(), gates.data(), stats.data()};
  CHECK(PYEFF_ALL_OF(read_forward).of[isa](problem, forward, pool.parallel()));

  // Inference keeps nothing and gives the same.
  Buffer alone(number, state), c_alone(number, lstm ? state : 0);
  const ReadForward inference{alone.data(), c_alone.data(), nullptr, nullptr, nullptr, nullptr};
  CHECK(PYEFF_ALL_OF(read_forward).of[isa](problem, inference, pool.parallel()));
  CHECK(alone.finite() && c_alone.finite());

  Buffer dw_ih(number, rows * s.width), dw_hh(number, rows * s.rank), db_ih(number, b_ih.count());
  Buffer db_hh(number, b_hh.count()), dgain(number, gain.count()), dshift(number, shift.count());
  Buffer dh0(number, h0.count()), dc0(number, c0.count());
  const ReadBackward backward{grad_out.data(), grad_c.data(),    h.data(),      c.data(),     gates.data(),
                              stats.data(),    dphi_data.data(), dw_ih.data(),  dw_hh.data(), db_ih.data(),
                              db_hh.data(),    dgain.data(),     dshift.data(), dh0.data(),   dc0.data()};
  CHECK(PYEFF_ALL_OF(read_backward).of[isa](problem, backward, pool.parallel()));

  std::vector<Buffer> results{out, c_last, h, c, gates, stats, dw_ih, dw_hh, db_ih, db_hh, dgain, dshift, dh0, dc0};
  results.insert(results.end(), dphi.begin(), dphi.end());
  return results;
}

}  // namespace

TEST(read_writes_all_and_the_same_for_any_thread_count) {
  for_each_usable_isa([](int isa) {
    for (Number number : {Number::f64, Number::f32, Number::bf16}) {
      for (Cell cell : {Cell::rnn, Cell::gru, Cell::lstm}) {
        for (Norm norm : {Norm::rms, Norm::layer, Norm::none}) {
          for (bool full : {false, true}) {
            for (const Shape& shape : kShapes) {
              const auto one = run(isa, number, cell, norm, full, shape, 1);
              const auto three = run(isa, number, cell, norm, full, shape, 3);
              for (size_t i = 0; i < one.size(); ++i) {
                CHECK(one[i].finite());
                CHECK(one[i].bytes == three[i].bytes);
              }
            }
          }
        }
      }
    }
  });
}
