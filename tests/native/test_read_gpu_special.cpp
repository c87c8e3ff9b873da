// READ's CUDA kernels where memory or numbers are out of the ordinary.
#include <algorithm>

#include "cuda/number.cuh"
#include "read_gpu_call.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace check;
using pyeff::Cell;
using pyeff::Norm;
using pyeff::ReadRows;
using pyeff::Reduce;
using pyeff::gpu::Machine;

namespace {

constexpr Cell kCells[] = {Cell::rnn, Cell::gru, Cell::lstm};
constexpr Norm kNorms[] = {Norm::rms, Norm::layer, Norm::none};

// Weights with nothing but finite numbers, phi given by its rows; without biases.
struct Call {
  Number number, phi_number;
  Cell cell;
  Norm norm;
  int64_t tokens, width, rank;
  bool wgmma = true;
  Input w_ih, w_hh;
  std::vector<ReadRows> rows;

  Call(Number number, Number phi_number, Cell cell, Norm norm, int64_t tokens, int64_t width, int64_t rank)
      : number(number), phi_number(phi_number), cell(cell), norm(norm), tokens(tokens), width(width), rank(rank) {
    Random random(1);
    w_ih = Input(number, gates() * rank * width, Begin::vector);
    w_hh = Input(number, gates() * rank * rank, Begin::vector);
    for (int64_t i = 0; i < gates() * rank * width; ++i) w_ih.set(i, random.uniform());
    for (int64_t i = 0; i < gates() * rank * rank; ++i) w_hh.set(i, random.uniform() / 4);
  }
  int64_t gates() const { return cell == Cell::rnn ? 1 : cell == Cell::gru ? 3 : 4; }
  int64_t layers() const { return static_cast<int64_t>(rows.size()); }
  // Dense rows of this memory.
  void add(const Input& phi) {
    ReadRows dense{};
    dense.data = phi.data();
    dense.inner = 1, dense.dims = 1, dense.size[0] = tokens, dense.stride[0] = width;
    rows.push_back(dense);
  }

  // Training: out and h, then all gradients of the sum of the outputs: those of phi, w_ih, w_hh.
  std::vector<Output> train(bool save_gates) const {
    const int64_t state = tokens * rank;
    std::vector<pyeff::gpu::ReadLayer> phi;
    for (const ReadRows& layer : rows) phi.push_back(gpu_layer(phi_number, layer));
    pyeff::gpu::ReadProblem p{};
    p.number = gpu_number(number), p.phi_number = gpu_number(phi_number), p.cell = cell, p.norm = norm;
    p.reduce = Reduce::mean, p.eps = 1e-6f, p.layers = layers(), p.tokens = tokens, p.width = width, p.rank = rank;
    p.phi = phi.data(), p.w_ih = w_ih.data(), p.w_hh = w_hh.data();
    Machine machine;
    machine.wgmma = wgmma;
    const bool lstm = cell == Cell::lstm;
    Output c_last(number, lstm ? state : 0, 64), c(number, lstm ? layers() * state : 0, 64);
    Output gates_kept(number, save_gates && cell != Cell::rnn ? 4 * layers() * state : 0, 64);
    Output stats(Number::f32, 2 * layers() * tokens, 64);
    std::vector<Output> results;
    results.emplace_back(number, state, 64), results.emplace_back(number, layers() * state, 64);
    const pyeff::gpu::ReadForward f{results[0].data(), c_last.maybe(),     results[1].data(),
                                    c.maybe(),         gates_kept.maybe(), static_cast<float*>(stats.data())};
    const GpuScratch forward_scratch(read_forward_scratch(p, f, machine));
    expect_none(read_forward(p, f, forward_scratch.data(), machine, nullptr));
    const Input grad(number, Values(static_cast<size_t>(state), 1.0));
    std::vector<void*> dphi;
    for (int64_t i = 0; i < layers(); ++i) dphi.push_back(results.emplace_back(number, tokens * width, 64).data());
    pyeff::gpu::ReadBackward b{};
    b.grad_out = grad.data(), b.h = f.h, b.c = f.c, b.gates = f.gates, b.stats = f.stats, b.dphi = dphi.data();
    b.dw_ih = results.emplace_back(number, gates() * rank * width, 64).data();
    b.dw_hh = results.emplace_back(number, gates() * rank * rank, 64).data();
    const GpuScratch backward_scratch(read_backward_scratch(p, b, machine));
    expect_none(read_backward(p, b, backward_scratch.data(), machine, nullptr));
    for (const Output& output : results) CHECK(output.guarded());
    return results;
  }

  static void expect_none(const char* error) {
    if (error != nullptr) std::fprintf(stderr, "%s\n", error);
    CHECK(error == nullptr);
  }
};

}  // namespace

#if defined(__linux__)
// Addresses in space that has no memory but where it is touched: rows far beyond 2^31 numbers.
TEST(read_on_the_gpu_reaches_numbers_beyond_2_to_the_31) {
  const int64_t beyond = (int64_t{1} << 31) + 12345, numbers = 3 * beyond;
  for (Number number : kGpuNumbers) {
    const size_t bytes = static_cast<size_t>(numbers * size_of(number));
    void* space = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(space != MAP_FAILED);
    madvise(space, bytes, MADV_NOHUGEPAGE);
    // Rows in two dimensions, or far from one another in one; at multiples of 16 bytes or not.
    for (bool blocks : {true, false})
      for (bool aligned : {true, false}) {
        const int64_t tokens = blocks ? 12 : 3, width = 20, apart = aligned ? beyond / 8 * 8 - 800 : beyond - 600;
        Call far(number, number, Cell::gru, Norm::layer, tokens, width, 6),
            near = {number, number, Cell::gru, Norm::layer, tokens, width, 6};
        ReadRows rows{};
        rows.dims = blocks ? 2 : 1, rows.inner = 1;
        rows.size[0] = 3, rows.stride[0] = apart;
        rows.size[1] = tokens / 3, rows.stride[1] = aligned ? 24 : 23;
        std::vector<Input> dense;
        for (int64_t layer = 0; layer < 2; ++layer) {
          Random random(static_cast<uint64_t>(layer + 3));
          const Input& phi = dense.emplace_back(number, tokens * width);
          char* begin = static_cast<char*>(space) + layer * 400 * size_of(number);
          for (int64_t n = 0; n < tokens; ++n)
            for (int64_t k = 0; k < width; ++k) {
              const int64_t at = blocks ? n / rows.size[1] * apart + n % rows.size[1] * rows.stride[1] : n * apart;
              CHECK(at + k + 400 < numbers);
              dense.back().set(n * width + k, random.uniform());
              put(number, begin, at + k, phi[n * width + k]);
            }
          rows.data = begin;
          far.rows.push_back(rows);
        }
        for (const Input& phi : dense) near.add(phi);
        const std::vector<Output> a = far.train(true), b = near.train(true);
        for (size_t i = 0; i < a.size(); ++i) CHECK(a[i].same(b[i]));
      }
    munmap(space, bytes);
  }
}
#endif

// Tokens are independent: a NaN, an infinity that is normalised, or rows whose squares overflow in one of them reach
// its own results and no other's; of the weights' gradients the first two spoil everything, as in the definition.
TEST(numbers_out_of_range_stay_in_their_token_on_the_gpu) {
  uint64_t seed = 0;
  for (Number number : kGpuNumbers)
    for (Cell cell : kCells)
      for (Norm norm : kNorms)
        for (int64_t rank : {5, 64}) {
          Random random(++seed);
          if (!taken(seed, 3, 3)) continue;
          const int64_t tokens = random.coin() ? 5 : 70, width = random.coin() ? 9 : 64;
          const bool save_gates = random.coin();
          const Begin begin = random.coin() ? Begin::vector : Begin::number;
          Call call(number, number, cell, norm, tokens, width, rank);
          call.wgmma = random.coin();
          Values values;
          for (int64_t i = 0; i < tokens * width; ++i) values.push_back(random.uniform());
          Input phi(number, tokens * width, begin), other(number, tokens * width, begin);
          for (int64_t i = 0; i < tokens * width; ++i) phi.set(i, values[size_t(i)]), other.set(i, values[size_t(i)]);
          call.add(phi), call.add(other);
          const std::vector<Output> clean = call.train(save_gates);
          const int64_t bad = random.coin() ? tokens - 1 : random.below(tokens), at = bad * width + random.below(width);
          for (double x : {double(NAN), double(INFINITY)}) {
            if (norm == Norm::none && x == INFINITY) continue;  // there it saturates, see below
            phi.set(at, x);
            const std::vector<Output> found = call.train(save_gates);
            for (size_t i = 0; i < 4; ++i) {  // out, h, dphi of both layers
              const int64_t columns = i < 2 ? rank : width;
              for (int64_t k = 0; k < found[i].count(); ++k) {
                if (k / columns % tokens == bad) {
                  CHECK(std::isnan(found[i][k]));
                } else {
                  CHECK(found[i][k] == clean[i][k]);
                }
              }
            }
            for (size_t i = 4; i < 6; ++i)
              for (int64_t k = 0; k < found[i].count(); ++k) CHECK(std::isnan(found[i][k]));
          }
        }
}

// Finite numbers whose squares overflow are normalised to nothing: the token is one of zeros, and has no gradient.
TEST(finite_rows_whose_squares_overflow_are_nothing_on_the_gpu) {
  uint64_t seed = 100;
  for (Number number : {Number::f32, Number::bf16})
    for (Cell cell : kCells)
      for (Norm norm : {Norm::rms, Norm::layer})
        for (int64_t rank : {5, 64}) {
          Random random(++seed);
          if (!taken(seed, 2, 2)) continue;
          const int64_t tokens = random.coin() ? 5 : 70, width = random.coin() ? 9 : 72, bad = random.below(tokens);
          Call large(number, number, cell, norm, tokens, width, rank),
              zero(number, number, cell, norm, tokens, width, rank);
          large.wgmma = zero.wgmma = random.coin();
          const bool save_gates = random.coin();
          const Begin begin = random.coin() ? Begin::vector : Begin::number;
          Input phi(number, tokens * width, begin), nothing(number, tokens * width, begin);
          for (int64_t i = 0; i < tokens * width; ++i) {
            const bool here = i / width == bad;
            const double x = random.uniform();
            // A layer norm's sums must not overflow, too: then nothing is defined.
            const double huge = norm == Norm::layer ? 1e36 : 3e38;
            phi.set(i, here ? (x < 0 ? -huge : huge) : x);
            nothing.set(i, here ? 0 : x);
          }
          for (int i = 0; i < 2; ++i) large.add(phi), zero.add(nothing);
          const std::vector<Output> a = large.train(save_gates), b = zero.train(save_gates);
          for (size_t i = 0; i < a.size(); ++i)
            for (int64_t k = 0; k < a[i].count(); ++k) {
              if ((i == 2 || i == 3) && k / width == bad) {
                CHECK(a[i][k] == 0);
              } else {
                CHECK(a[i][k] == b[i][k]);
              }
            }
        }
}

// An infinite input saturates gates; it makes NaN only where the definition does. With an odd rank what lies past the
// last unit must not enter the next layer's sums as 0 times infinity.
TEST(an_infinity_saturates_and_does_not_spread_on_the_gpu) {
  uint64_t seed = 200;
  for (Number number : kGpuNumbers)
    for (Cell cell : kCells)
      for (int64_t rank : {4, 5, 64}) {
        if (!taken(++seed)) continue;
        const int64_t tokens = 20, width = 6;
        Call call(number, number, cell, Norm::none, tokens, width, rank);
        call.wgmma = rank == 64;
        Input first(number, Values(tokens * width, 0.25)), second(number, Values(tokens * width, 0.25));
        const Values clean = [&] {
          call.add(first), call.add(second);
          const std::vector<Output> results = call.train(true);
          Values out;
          for (int64_t i = 0; i < tokens * rank; ++i) out.push_back(results[0][i]);
          return out;
        }();
        first.set(width + 2, INFINITY);  // the second token, in the first layer only
        const std::vector<Output> results = call.train(true);
        for (int64_t i = 0; i < tokens * rank; ++i) {
          CHECK(std::isfinite(results[0][i]));
          if (i / rank != 1) CHECK(results[0][i] == clean[size_t(i)]);
        }
      }
}

// What a float holds and half precision does not is infinite there.
TEST(wide_phi_is_rounded_before_the_norm_on_the_gpu) {
  for (Norm norm : kNorms) {
    const int64_t tokens = 5, width = 9, rank = 5;
    Call wide(kHalf, Number::f32, Cell::gru, norm, tokens, width, rank),
        narrow(kHalf, kHalf, Cell::gru, norm, tokens, width, rank);
    Random random(9);
    Input single(Number::f32, tokens * width), half(kHalf, tokens * width);
    for (int64_t i = 0; i < tokens * width; ++i) {
      const double x = i == 12 ? 1e6 : i == 30 ? 1e-9 : random.uniform();
      single.set(i, x), half.set(i, single[i]);
    }
    wide.add(single), wide.add(single), narrow.add(half), narrow.add(half);
    const std::vector<Output> a = wide.train(true), b = narrow.train(true);
    for (size_t i = 0; i < a.size(); ++i) CHECK(a[i].same(b[i]));
  }
}

// The half precision of these tests and that of the kernels, which were written apart, for every number and between.
TEST(half_precision_of_the_tests_is_that_of_the_kernels) {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const double x = of_f16(static_cast<uint16_t>(bits));
    const float y = pyeff::gpu::to_float(pyeff::gpu::f16{static_cast<uint16_t>(bits)});
    CHECK(x == y || (x != x && y != y));
    if (!(std::fabs(x) < INFINITY)) continue;
    CHECK(f16_of(x) == bits);
    for (double part : {0.25, 0.5, 0.75}) {
      const double step = std::ldexp(part, std::max(x == 0 ? -14 : std::ilogb(x), -14) - 10);
      const float between = static_cast<float>(x + step);
      CHECK(f16_of(between) == pyeff::gpu::from_float<pyeff::gpu::f16>(between).bits);
    }
  }
}
