// The ticket's CUDA kernels, run by the emulation, against the definition in double precision; and their promises:
// nothing depends on the order of the threads, on what lies in the scratch, on what else is asked for, on what a block
// holds past the end of the weight, or on numbers of x that no block of a row selects; and no index leads them astray.
#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "cuda/emulate/emulate.h"
#include "cuda/ticket.h"
#include "read_gpu_call.h"

using namespace check;
using pyeff::gpu::Machine;
using pyeff::gpu::TicketActivation;
using pyeff::gpu::emulate::Buffers;

namespace {

constexpr TicketActivation kActivations[] = {TicketActivation::none, TicketActivation::relu, TicketActivation::gelu};

struct Sizes {
  int64_t tokens, out, width, block_out, block_in;
  double density = 0.4;
};

void expect_no(const char* error) {
  if (error == nullptr) return;
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}

// Another order of the threads and blocks, as long as it lives.
struct Order {
  Order() { setenv("PYEFF_EMULATE_SEED", "12345", 1); }
  ~Order() { unsetenv("PYEFF_EMULATE_SEED"); }
};

double normal(double z) { return 0.5 * (1 + std::erf(z * std::sqrt(0.5))); }
double activated(double z, TicketActivation activation) {
  if (activation == TicketActivation::relu) return z > 0 ? z : 0;
  return activation == TicketActivation::gelu ? z * normal(z) : z;
}
double slope(double saved, TicketActivation activation) {
  if (activation == TicketActivation::relu) return saved > 0;
  if (activation == TicketActivation::none) return 1;
  return normal(saved) + saved * std::exp(-saved * saved / 2) / std::sqrt(2 * std::acos(-1.0));
}

// A sum, what its terms' sizes add up to, and how many they are.
struct Sum {
  double value = 0, size = 0;
  int64_t terms = 0;
  void add(double x) { value += x, size += std::fabs(x), ++terms; }
};

struct Outputs {
  Output y, z, dx, dvalues, dbias;
};

class Call {
 public:
  // `nan`: what must not matter is NaN. `stride`: numbers between the rows of x and of the gradient.
  Call(Number number, const Sizes& sizes, TicketActivation activation, bool bias, Begin begin, int64_t stride, bool nan,
       uint64_t seed)
      : number_(number), s_(sizes), activation_(activation), random_(seed) {
    make_index();
    x_stride_ = s_.width + stride, grad_stride_ = s_.out + stride;
    x_ = Input(number, (s_.tokens - 1) * x_stride_ + s_.width, begin);
    grad_ = Input(number, (s_.tokens - 1) * grad_stride_ + s_.out, begin);
    saved_ = Input(number, activation == TicketActivation::none ? 0 : s_.tokens * s_.out, begin);
    values_ = Input(number, std::max<int64_t>(blocks() * s_.block_out * s_.block_in, 1), begin);
    bias_ = Input(number, bias ? s_.out : 0, begin);
    for (const Input* input : {&x_, &grad_, &saved_, &values_, &bias_})
      for (int64_t i = 0; i < input->bytes() / size_of(number); ++i)
        const_cast<Input*>(input)->set(i, random_.uniform());
    if (!nan) return;
    for (int64_t e = 0; e < blocks(); ++e)
      for (int64_t o = 0; o < s_.block_out; ++o)
        for (int64_t i = 0; i < s_.block_in; ++i)
          if (!inside(e, o, i)) values_.set((e * s_.block_out + o) * s_.block_in + i, NAN);
    for (int64_t column = 0; column < columns(); ++column)
      if (std::find(column_.begin(), column_.end(), column) == column_.end())
        for (int64_t i = column * s_.block_in; i < std::min((column + 1) * s_.block_in, s_.width); ++i)
          for (int64_t n = 0; n < s_.tokens; ++n) x_.set(n * x_stride_ + i, NAN);
  }

  // Bits of `wanted`: dx, dvalues, dbias.
  Outputs run(const Machine& machine, bool keep, int wanted = 7) const {
    Outputs o;
    const int64_t guard = 64;
    o.y = Output(number_, s_.tokens * s_.out, guard);
    if (keep) o.z = Output(number_, s_.tokens * s_.out, guard);
    if (wanted & 1) o.dx = Output(number_, s_.tokens * s_.width);
    if (wanted & 2) o.dvalues = Output(number_, blocks() * s_.block_out * s_.block_in, guard);
    if (wanted & 4) o.dbias = Output(number_, s_.out);
    const pyeff::gpu::TicketProblem p{gpu_number(number_), s_.tokens,   s_.width,  s_.out,
                                      s_.block_out,        s_.block_in, blocks(),  values_.data(),
                                      index_.data(),       x_.data(),   x_stride_, activation_};
    const pyeff::gpu::TicketForward f{bias_.maybe(), o.y.data(), o.z.maybe()};
    const pyeff::gpu::TicketBackward b{grad_.data(), grad_stride_,      saved_.maybe(),
                                       o.dx.maybe(), o.dvalues.maybe(), o.dbias.maybe()};
    const GpuScratch scratch(std::max<int64_t>(ticket_backward_scratch(p, b, machine), 1));
    Buffers buffers;
    const char* names[] = {"x", "grad", "saved", "values", "bias"};
    const char** name = names;
    for (const Input* input : {&x_, &grad_, &saved_, &values_, &bias_})
      buffers.reads(input->data(), static_cast<size_t>(input->bytes()), *name++);
    buffers.reads(index_.data(), index_.size() * sizeof(int32_t), "index");
    for (const Output* output : {&o.y, &o.z, &o.dx, &o.dvalues, &o.dbias})
      buffers.writes(output->data(), static_cast<size_t>(output->bytes()), "an output");
    buffers.writes(scratch.data(), scratch.bytes(), "scratch");
    expect_no(ticket_forward(p, f, machine, nullptr));
    expect_no(ticket_backward(p, b, scratch.data(), machine, nullptr));
    for (const Output* output : {&o.y, &o.z, &o.dx, &o.dvalues, &o.dbias}) CHECK(output->guarded());
    return o;
  }

  void check(const Outputs& o) const {
    std::vector<Sum> z(static_cast<size_t>(s_.tokens * s_.out)), dx(static_cast<size_t>(s_.tokens * s_.width));
    std::vector<Sum> dbias(static_cast<size_t>(s_.out));
    const double store = epsilon(number_), tiny = number_ == kHalf ? 0x1p-24 : 0;
    for (int64_t n = 0; n < s_.tokens; ++n)
      for (int64_t i = 0; i < s_.out; ++i) {
        dbias[static_cast<size_t>(i)].add(gradient(n, i));
        if (bias_.maybe()) z[static_cast<size_t>(n * s_.out + i)].add(bias_[i]);
      }
    // Where there is an activation, the gradient before it is rounded before it is multiplied.
    const double share = activation_ == TicketActivation::gelu ? store : 0;
    for (int64_t e = 0; e < blocks(); ++e)
      for (int64_t o0 = 0; o0 < s_.block_out; ++o0)
        for (int64_t i0 = 0; i0 < s_.block_in; ++i0) {
          const int64_t at = (e * s_.block_out + o0) * s_.block_in + i0;
          if (!inside(e, o0, i0)) {
            if (o.dvalues.count()) CHECK(o.dvalues[at] == 0);
            continue;
          }
          const int64_t out = row_[size_t(e)] * s_.block_out + o0, in = column_[size_t(e)] * s_.block_in + i0;
          Sum dvalue;
          for (int64_t n = 0; n < s_.tokens; ++n) {
            const double x = x_[n * x_stride_ + in], g = gradient(n, out);
            z[static_cast<size_t>(n * s_.out + out)].add(x * values_[at]);
            dx[static_cast<size_t>(n * s_.width + in)].add(g * values_[at]);
            dvalue.add(g * x);
          }
          if (o.dvalues.count()) near(o.dvalues[at], dvalue, store, share, tiny);
        }
    for (size_t i = 0; i < z.size(); ++i) {
      Sum y = z[i];
      y.value = activated(y.value, activation_), y.size += std::fabs(z[i].value), y.terms += 8;
      near(o.y[static_cast<int64_t>(i)], y, store, 0, tiny);
      if (o.z.count()) near(o.z[static_cast<int64_t>(i)], z[i], store, 0, tiny);
    }
    for (size_t i = 0; i < dx.size() && o.dx.count(); ++i)
      near(o.dx[static_cast<int64_t>(i)], dx[i], store, share, tiny);
    for (size_t i = 0; i < dbias.size() && o.dbias.count(); ++i)
      near(o.dbias[static_cast<int64_t>(i)], dbias[i], store, 0, tiny);
  }

  // Not one number of x is finite: what lies past the end of the weight has no gradient all the same.
  void check_padding(const Machine& machine) {
    for (int64_t i = 0; i < x_.bytes() / size_of(number_); ++i) x_.set(i, NAN);
    const Outputs o = run(machine, false, 2);
    for (int64_t e = 0, at = 0; e < blocks(); ++e)
      for (int64_t row = 0; row < s_.block_out; ++row)
        for (int64_t column = 0; column < s_.block_in; ++column, ++at)
          CHECK(inside(e, row, column) ? o.dvalues[at] != o.dvalues[at] : o.dvalues[at] == 0);
  }

  // Numbers of any size where the index should be.
  void spoil() {
    const int32_t some[] = {-1, 0, 1, 7, 1 << 20, 0x7fffffff, -0x7fffffff - 1};
    for (int32_t& i : index_)
      if (random_.coin()) i = random_.pick(some);
  }
  int64_t blocks() const { return static_cast<int64_t>(column_.size()); }

 private:
  int64_t rows() const { return (s_.out + s_.block_out - 1) / s_.block_out; }
  int64_t columns() const { return (s_.width + s_.block_in - 1) / s_.block_in; }
  bool inside(int64_t e, int64_t o, int64_t i) const {
    return row_[size_t(e)] * s_.block_out + o < s_.out && column_[size_t(e)] * s_.block_in + i < s_.width;
  }
  double gradient(int64_t n, int64_t i) const {
    const double g = grad_[n * grad_stride_ + i];
    return saved_.maybe() ? g * slope(saved_[n * s_.out + i], activation_) : g;
  }

  // Of the sum's terms each may be rounded by `share`, every partial sum in single precision, and the result.
  static void near(double found, const Sum& truth, double store, double share, double tiny) {
    const double terms = static_cast<double>(truth.terms) + 8;
    const double most = store * std::fabs(truth.value) + (share + terms * 0x1p-23) * truth.size + tiny;
    if (std::fabs(found - truth.value) <= most) return;
    std::fprintf(stderr, "%g, expected %g within %g\n", found, truth.value, most);
    std::exit(1);
  }

  void make_index() {
    std::vector<int32_t> start(1, 0), column_start(1, 0), row_of, slot;
    std::vector<int32_t> by_row(static_cast<size_t>(rows())), by_column(static_cast<size_t>(columns()));
    for (int64_t r = 0; r < rows(); ++r) {
      for (int64_t c = 0; c < columns(); ++c)
        if (random_.uniform() < 2 * s_.density - 1) row_.push_back(r), column_.push_back(c);
      start.push_back(static_cast<int32_t>(row_.size()));
    }
    for (int64_t c = 0; c < columns(); ++c) {
      for (size_t e = 0; e < row_.size(); ++e)
        if (column_[e] == c) row_of.push_back(static_cast<int32_t>(row_[e])), slot.push_back(static_cast<int32_t>(e));
      column_start.push_back(static_cast<int32_t>(row_of.size()));
    }
    const auto fullest = [](std::vector<int32_t>& order, const std::vector<int32_t>& from) {
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return from[size_t(a) + 1] - from[size_t(a)] > from[size_t(b) + 1] - from[size_t(b)];
      });
    };
    fullest(by_row, start);
    fullest(by_column, column_start);
    const std::vector<int32_t> column(column_.begin(), column_.end());
    for (const std::vector<int32_t>* part : std::initializer_list<const std::vector<int32_t>*>{
             &start, &column, &column_start, &row_of, &slot, &by_row, &by_column})
      index_.insert(index_.end(), part->begin(), part->end());
  }

  const Number number_;
  const Sizes s_;
  const TicketActivation activation_;
  Random random_;
  std::vector<int64_t> row_, column_;
  std::vector<int32_t> index_;
  int64_t x_stride_, grad_stride_;
  Input x_, grad_, saved_, values_, bias_;
};

bool same(const Outputs& a, const Outputs& b) {
  return a.y.same(b.y) && a.z.same(b.z) && a.dx.same(b.dx) && a.dvalues.same(b.dvalues) && a.dbias.same(b.dbias);
}

Machine machine_with(Random& random, bool wgmma) {
  Machine machine;
  const int processors[] = {2, 5, 132};
  machine.processors = random.pick(processors);
  machine.wgmma = wgmma;
  return machine;
}

// Right, and the same in another order.
void check_call(Random& random, Number number, const Sizes& sizes, bool wgmma, uint64_t seed) {
  const Begin begins[] = {Begin::number, Begin::vector, Begin::vector};
  const int64_t strides[] = {0, 0, 3, 16};
  const Call call(number, sizes, random.pick(kActivations), random.coin(), random.pick(begins), random.pick(strides),
                  random.coin(), seed);
  const Machine machine = machine_with(random, wgmma);
  const bool keep = random.coin();
  const Outputs first = call.run(machine, keep);
  call.check(first);
  const Order other;
  CHECK(same(first, call.run(machine, keep)));
}

}  // namespace

TEST(ticket_on_the_gpu_is_right_for_every_block_and_type) {
  const Sizes all[] = {
      {1, 64, 64, 16, 16},    {3, 100, 72, 16, 16},   {13, 96, 128, 32, 32},     {15, 64, 60, 8, 8},
      {33, 40, 56, 8, 8},     {40, 70, 90, 32, 16},   {21, 33, 47, 5, 7},        {17, 63, 45, 16, 16},
      {130, 64, 128, 64, 64}, {140, 200, 70, 64, 32}, {70, 130, 130, 128, 128},  {20, 150, 40, 96, 24},
      {5, 60, 60, 10, 6},     {16, 9, 300, 1, 1},     {64, 48, 64, 16, 32, 0.0}, {260, 30, 40, 8, 16, 1.0},
  };
  uint64_t seed = 30000;
  for (Number number : kGpuNumbers)
    for (const Sizes& sizes : all) {
      Random random(++seed);
      if (!taken(seed, 2, 5, 1)) continue;
      check_call(random, number, sizes, random.coin(), seed);
    }
}

// Enough tokens that those of small blocks stay on the chip, and widths that end within a block or a panel; large
// blocks in lines of more stages than a ring has.
TEST(ticket_on_the_gpu_is_right_by_warpgroups) {
  const Sizes all[] = {{520, 64, 64, 32, 32},        {513, 70, 72, 16, 16},        {600, 33, 208, 5, 16, 0.2},
                       {515, 64, 80, 32, 48, 0.7},   {512, 40, 40, 24, 32, 0.7},   {530, 64, 48, 16, 16, 0.0},
                       {515, 32, 130, 32, 128, 0.7}, {520, 130, 128, 64, 64},      {513, 70, 72, 64, 16},
                       {600, 100, 40, 48, 32},       {100, 100, 330, 96, 64, 1.0}, {300, 320, 130, 64, 128, 1.0}};
  uint64_t seed = 31000;
  for (Number number : {Number::bf16, kHalf})
    for (const Sizes& sizes : all) {
      Random random(++seed);
      if (!taken(seed, 4, 9, 1)) continue;
      const TicketActivation activation = random.pick(kActivations);
      const Call call(number, sizes, activation, random.coin(), Begin::vector, random.coin() ? 8 : 0, true, seed);
      const Machine machine = machine_with(random, true);
      const Outputs first = call.run(machine, true);
      call.check(first);
      const Order other;
      CHECK(same(first, call.run(machine, true)));
    }
}

// More tokens than are handed out together.
TEST(ticket_on_the_gpu_takes_many_tokens) {
  if (kSanitized) return;
  Random random(34000);
  check_call(random, Number::f32, {8500, 20, 16, 8, 8, 0.7}, false, 34001);
  check_call(random, Number::bf16, {8193, 72, 16, 64, 8, 0.7}, true, 34002);
}

// What is not wanted is not computed, and what is comes out as if all were.
TEST(every_gradient_of_a_ticket_on_the_gpu_can_be_wanted_alone) {
  uint64_t seed = 32000;
  for (Number number : kGpuNumbers)
    for (TicketActivation activation : kActivations) {
      Random random(++seed);
      if (!taken(seed, 1, 4, 1)) continue;
      const Call call(number, {37, 50, 44, 16, 8}, activation, true, Begin::vector, 0, false, seed);
      const Machine machine = machine_with(random, random.coin());
      const Outputs all = call.run(machine, true);
      for (int wanted = 0; wanted < 7; ++wanted) {
        const Outputs some = call.run(machine, false, wanted);
        CHECK(all.y.same(some.y));
        CHECK(wanted & 1 ? all.dx.same(some.dx) : some.dx.count() == 0);
        CHECK(wanted & 2 ? all.dvalues.same(some.dvalues) : some.dvalues.count() == 0);
        CHECK(wanted & 4 ? all.dbias.same(some.dbias) : some.dbias.count() == 0);
      }
    }
}

TEST(blocks_of_a_ticket_on_the_gpu_have_no_gradient_past_the_weight) {
  uint64_t seed = 35000;
  for (Number number : {Number::f32, Number::bf16})
    for (bool wgmma : {true, false}) {
      Random random(++seed);
      for (const Sizes& sizes : {Sizes{20, 50, 44, 16, 8, 0.6}, Sizes{300, 70, 70, 64, 24, 1.0}}) {
        if (kRaces) continue;
        Call call(number, sizes, TicketActivation::none, false, Begin::vector, 0, false, seed);
        call.check_padding(machine_with(random, wgmma));
      }
    }
}

// An index is data: whatever is in it, nothing is touched that is not there. The emulation sees every access.
TEST(a_wrong_index_leads_no_kernel_of_a_ticket_astray) {
  const Sizes all[] = {
      {5, 64, 64, 16, 16}, {40, 64, 64, 16, 16}, {520, 64, 64, 32, 16}, {33, 47, 50, 7, 5}, {40, 128, 128, 64, 64}};
  uint64_t seed = 33000;
  for (Number number : {Number::f32, Number::bf16})
    for (const Sizes& sizes : all)
      for (bool wgmma : {true, false}) {
        Random random(++seed);
        if (!taken(seed, 3, 7, 1)) continue;
        Call call(number, sizes, TicketActivation::none, true, Begin::vector, 0, false, seed);
        call.spoil();
        call.run(machine_with(random, wgmma), false);
      }
}
