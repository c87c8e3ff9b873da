// READ where memory or numbers are out of the ordinary.
#include "dev/threads.h"
#include "read_call.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace check;
using pyeff::Cell;
using pyeff::Norm;
using pyeff::ReadForward;
using pyeff::ReadProblem;
using pyeff::ReadRows;
using pyeff::Reduce;
using pyeff::dev::Threads;

namespace {

// Weights with nothing but finite numbers, phi given by its rows; the GRU without biases.
struct Call {
  Number number;
  Cell cell;
  Norm norm;
  int64_t layers, tokens, width, rank;
  Input w_ih, w_hh;
  std::vector<ReadRows> rows;

  Call(Number number, Cell cell, Norm norm, int64_t layers, int64_t tokens, int64_t width, int64_t rank)
      : number(number), cell(cell), norm(norm), layers(layers), tokens(tokens), width(width), rank(rank) {
    const int64_t gates = cell == Cell::rnn ? 1 : cell == Cell::gru ? 3 : 4;
    Random random(1);
    w_ih = Input(number, gates * rank * width);
    w_hh = Input(number, gates * rank * rank);
    for (int64_t i = 0; i < gates * rank * width; ++i) w_ih.set(i, random.uniform());
    for (int64_t i = 0; i < gates * rank * rank; ++i) w_hh.set(i, random.uniform());
  }
  ReadProblem problem() const {
    ReadProblem p{};
    p.number = number, p.phi_number = number, p.cell = cell, p.norm = norm, p.reduce = Reduce::mean, p.eps = 1e-6;
    p.layers = layers, p.tokens = tokens, p.width = width, p.rank = rank, p.phi = rows.data();
    p.w_ih = w_ih.data(), p.w_hh = w_hh.data();
    return p;
  }
  Output forward(int isa, const pyeff::Parallel& parallel) {
    const ReadProblem p = problem();
    Output out(number, tokens * rank);
    ReadForward f{};
    f.out = out.data();
    CHECK(PYEFF_ALL_OF(read_forward).of[isa](p, f, parallel));
    CHECK(out.guarded());
    return out;
  }
  // Training: all gradients of the sum of the outputs, one after the other.
  std::vector<Output> train(int isa, const pyeff::Parallel& parallel) {
    const int64_t gates = cell == Cell::rnn ? 1 : cell == Cell::gru ? 3 : 4, state = tokens * rank;
    const ReadProblem p = problem();
    std::vector<Output> o;
    for (int64_t count : {state, layers * state, cell == Cell::lstm ? layers * state : 0, 2 * layers * tokens})
      o.emplace_back(count == 2 * layers * tokens ? compute_of(number) : number, count);
    ReadForward f{o[0].data(), nullptr, o[1].data(), o[2].maybe(), nullptr, o[3].data()};
    CHECK(PYEFF_ALL_OF(read_forward).of[isa](p, f, parallel));
    Input grad(number, Values(state, 1.0));
    std::vector<void*> dphi;
    std::vector<Output> result;
    for (int64_t i = 0; i < layers; ++i) dphi.push_back(result.emplace_back(number, tokens * width).data());
    result.emplace_back(number, gates * rank * width), result.emplace_back(number, gates * rank * rank);
    pyeff::ReadBackward b{};
    b.grad_out = grad.data(), b.h = o[1].data(), b.c = o[2].maybe(), b.stats = o[3].data(), b.dphi = dphi.data();
    b.dw_ih = result[layers].data(), b.dw_hh = result[layers + 1].data();
    CHECK(PYEFF_ALL_OF(read_backward).of[isa](p, b, parallel));
    for (const Output& output : result) CHECK(output.guarded());
    result.push_back(std::move(o[0]));
    return result;
  }
};

}  // namespace

#if defined(__linux__)
// Addresses in space that has no memory but where it is touched: elements far beyond 2^31, by row or along d.
TEST(read_reaches_elements_beyond_2_to_the_31) {
  const int64_t beyond = (int64_t{1} << 31) + 12345, elements = 3 * beyond;
  for (Number number : kNumbers) {
    const size_t bytes = static_cast<size_t>(elements * size_of(number));
    void* space = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(space != MAP_FAILED);
    madvise(space, bytes, MADV_NOHUGEPAGE);
    for (int64_t tokens : {3, 30})
      for (bool along : {false, true}) {  // d itself is spread out; or rows in two dimensions
        const int64_t width = along ? 3 : 10, step = along ? 2 : 1;  // near, the same loads are strided
        Call far(number, Cell::gru, Norm::layer, 2, tokens, width, 6),
            near(number, Cell::gru, Norm::layer, 2, tokens, width, 6);
        ReadRows rows{};
        rows.data = space;
        rows.dims = 2;
        rows.size[0] = 3, rows.size[1] = tokens / 3;
        rows.stride[0] = along ? 40 : beyond - 600, rows.stride[1] = 11;
        rows.inner = along ? beyond - 600 : 1;
        std::vector<Input> dense;
        for (int64_t layer = 0; layer < 2; ++layer) {
          Random random(static_cast<uint64_t>(layer + 3));
          Input& phi = dense.emplace_back(number, tokens * width * step);
          for (int64_t n = 0; n < tokens; ++n)
            for (int64_t k = 0; k < width; ++k) {
              const int64_t at = n / rows.size[1] * rows.stride[0] + n % rows.size[1] * rows.stride[1] + k * rows.inner;
              CHECK(at + 300 < elements);
              const int64_t here = (n * width + k) * step;
              phi.set(here, random.uniform());
              put(number, static_cast<char*>(space) + layer * 200 * size_of(number), at, phi[here]);
            }
          far.rows.push_back(rows);
          far.rows.back().data = static_cast<char*>(space) + layer * 200 * size_of(number);
          ReadRows plain{};
          plain.data = phi.data();
          plain.inner = step, plain.dims = 1, plain.size[0] = tokens, plain.stride[0] = width * step;
          near.rows.push_back(plain);
        }
        static Threads two(2);
        for_each_usable_isa([&](int isa) {
          const std::vector<Output> a = far.train(isa, two.parallel()), b = near.train(isa, two.parallel());
          for (size_t i = 0; i < a.size(); ++i) CHECK(a[i].same(b[i]));
        });
      }
    munmap(space, bytes);
  }
}
#endif

// Tokens are independent: a NaN in one of them reaches its own output and no other, whatever block it is in.
TEST(a_nan_stays_in_its_token) {
  static Threads two(2);
  for (Number number : kNumbers)
    for (Cell cell : {Cell::rnn, Cell::gru, Cell::lstm})
      for (int64_t tokens : {5, 40}) {
        Call call(number, cell, Norm::rms, 2, tokens, 9, 5);
        Input phi(number, Values(tokens * 9, 0.5));
        ReadRows rows{};
        rows.data = phi.data();
        rows.inner = 1, rows.dims = 1, rows.size[0] = tokens, rows.stride[0] = 9;
        call.rows = {rows, rows};
        for (int64_t bad : {int64_t{0}, int64_t{3}, tokens - 1}) {
          phi.set(bad * 9 + 4, NAN);
          for_each_usable_isa([&](int isa) {
            const Output out = call.forward(isa, two.parallel());
            for (int64_t i = 0; i < tokens * 5; ++i) CHECK(std::isnan(out[i]) == (i / 5 == bad));
          });
          phi.set(bad * 9 + 4, 0.5);
        }
      }
}

// An infinite input saturates gates; it makes NaN only where the definition does. With an odd rank the lanes past the
// last unit hold 0 times infinity: they must not enter the next layer's sums.
TEST(an_infinity_saturates_and_does_not_spread) {
  static Threads two(2);
  for (Number number : kNumbers)
    for (Cell cell : {Cell::rnn, Cell::gru, Cell::lstm})
      for (int64_t tokens : {3, 20})
        for (int64_t rank : {4, 5, 17}) {
          Call call(number, cell, Norm::none, 2, tokens, 6, rank);
          Input first(number, Values(tokens * 6, 0.25)), second(number, Values(tokens * 6, 0.25));
          first.set(6 + 2, INFINITY);  // the second token, in the first layer only
          for (const Input* phi : {&first, &second}) {
            ReadRows rows{};
            rows.data = phi->data();
            rows.inner = 1, rows.dims = 1, rows.size[0] = tokens, rows.stride[0] = 6;
            call.rows.push_back(rows);
          }
          for_each_usable_isa([&](int isa) {
            const Output out = call.forward(isa, two.parallel());
            for (int64_t i = 0; i < tokens * rank; ++i) CHECK(std::isfinite(out[i]));
          });
        }
}

// More than a machine has: refused, not crashed.
TEST(too_little_memory_is_reported) {
  static Threads one(1);
  for_each_usable_isa([&](int isa) {
    Call call(Number::f64, Cell::lstm, Norm::rms, 1, 20, 1, 1);
    call.width = 1 << 8, call.rank = int64_t{1} << 22;  // 2^46 weights
    ReadRows rows{};
    call.rows = {rows};
    const ReadProblem p = call.problem();
    ReadForward f{};
    CHECK(!PYEFF_ALL_OF(read_forward).of[isa](p, f, one.parallel()));
  });
}
