// The CUDA kernels of the multimask family, run by the emulation, against their definitions in double precision; and
// their promises: nothing depends on the order of the threads or on what lies in the scratch, nothing is read that does
// not count, and no index leads them astray.
#include <algorithm>
#include <cstdlib>

#include "cuda/emulate/emulate.h"
#include "cuda/multimask.h"
#include "read_gpu_call.h"

using namespace check;
using namespace pyeff::gpu;
using pyeff::gpu::emulate::Buffers;
using CpuNumber = pyeff::Number;

namespace {

struct Shape {
  int64_t batch, masks, tokens, width;
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

constexpr float kEpsilon = 1e-5f;

void near(double found, double truth, double most) {
  if (std::fabs(found - truth) <= most) return;
  std::fprintf(stderr, "%g, expected %g within %g\n", found, truth, most);
  std::exit(1);
}

using Outputs = std::vector<Output>;

bool same(const Outputs& a, const Outputs& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!a[i].same(b[i])) return false;
  return a.size() == b.size();
}

// Masks, lengths, and numbers of which those that must not count are NaN.
class Call {
 public:
  Call(CpuNumber number, const Shape& s, Begin begin, uint64_t seed, double mean = 0, double spread = 1)
      : number_(number), s_(s), random_(seed), rows_(s.batch * s.masks), slots_(s.tokens) {
    for (int64_t b = 0; b < s.batch; ++b)
      lengths_.push_back(static_cast<int32_t>(random_.coin() ? s.tokens : random_.below(s.tokens + 1)));
    for (int64_t r = 0; r < rows_; ++r) {
      int32_t kept = 0;
      for (int64_t t = 0; t < s.tokens; ++t) {
        const bool keeps = t < lengths_[size_t(r / s.masks)] && random_.coin();
        inverse_.push_back(keeps ? kept : -1);
        if (keeps) ids_.push_back(static_cast<int32_t>(t)), ++kept;
      }
      ids_.resize(static_cast<size_t>((r + 1) * slots_), 0);
      keep_len_.push_back(kept);
    }
    x_ = numbers(number, s.batch * s.tokens, begin, mean, spread);
    y_ = numbers(number, rows_ * s.tokens, begin, mean, spread);
    target_ = numbers(CpuNumber::f32, s.batch * s.tokens, begin);
    fill_ = numbers(number, s.tokens, begin);
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t d = 0; d < s.width; ++d) {
          if (t >= lengths_[size_t(b)]) x_.set((b * s.tokens + t) * s.width + d, NAN);
          for (int64_t m = 0; m < s.masks; ++m)
            if (!hidden(b * s.masks + m, t)) y_.set(((b * s.masks + m) * s.tokens + t) * s.width + d, NAN);
        }
    machine_.processors = random_.coin() ? 2 : 5;
  }

  bool hidden(int64_t row, int64_t t) const {
    return inverse_[size_t(row * s_.tokens + t)] < 0 && t < lengths_[size_t(row / s_.masks)];
  }
  // What is at fault in an index, or nothing.
  void spoil() {
    const int32_t some[] = {-7, 0, 3, 1 << 20, 0x7fffffff, -0x7fffffff - 1};
    for (std::vector<int32_t>* index : {&lengths_, &ids_, &keep_len_, &inverse_})
      for (int32_t& i : *index)
        if (random_.coin()) i = random_.pick(some);
  }

  Outputs move() const {
    const int64_t size = rows_ * s_.tokens * s_.width;
    Outputs o;
    for (int64_t count : {size, s_.batch * s_.tokens * s_.width, size, s_.tokens * s_.width})
      o.push_back(output(count));
    const MultimaskSums back{sizes(), rows(o[0], slots_), false, false, inverse_.data(), lengths_.data(), o[1].data()};
    const MultimaskSums fill{sizes(), rows(y_, s_.tokens), true, true, inverse_.data(), lengths_.data(), o[3].data()};
    const GpuScratch scratch(std::max<int64_t>(multimask_sums_scratch(fill, machine_), 1));
    const int64_t seed = 7;
    Buffers buffers;
    register_all(buffers, o, scratch);
    buffers.reads(&seed, 8, "seed");
    expect_no(multimask_gather({sizes(), rows(x_, s_.tokens), false, ids_.data(), keep_len_.data(), o[0].data()},
                               machine_, nullptr));
    expect_no(multimask_sums(back, nullptr, machine_, nullptr));
    expect_no(multimask_scatter({sizes(),
                                 rows(o[0], slots_),
                                 {fill_.data(), 0, s_.width},
                                 inverse_.data(),
                                 lengths_.data(),
                                 &seed,
                                 nullptr,
                                 0.5f,
                                 o[2].data()},
                                machine_, nullptr));
    expect_no(multimask_sums(fill, scratch.data(), machine_, nullptr));
    for (const Output& output : o) CHECK(output.guarded());
    return o;
  }

  void check_move(const Outputs& o) const {
    for (int64_t t = 0; t < s_.tokens; ++t)
      for (int64_t d = 0; d < s_.width; ++d) {
        double fill = 0, size = 0;
        for (int64_t b = 0; b < s_.batch; ++b) {
          double back = 0, all = 0;
          for (int64_t r = b * s_.masks; r < (b + 1) * s_.masks; ++r) {
            const int32_t slot = inverse_[size_t(r * s_.tokens + t)];
            const int64_t at = (r * s_.tokens + t) * s_.width + d;
            if (hidden(r, t)) fill += y_[at], size += std::fabs(y_[at]);
            if (slot >= 0) {
              const double x = x_[(b * s_.tokens + t) * s_.width + d];
              CHECK(o[0][(r * slots_ + slot) * s_.width + d] == x && o[2][at] == x);
              back += x, all += std::fabs(x);
            } else if (!hidden(r, t)) {
              CHECK(o[2][at] == 0);
            } else {
              near(o[2][at], fill_[t * s_.width + d], 0.5 * 6);
            }
          }
          near(o[1][(b * s_.tokens + t) * s_.width + d], back, epsilon(number_) * all);
        }
        near(o[3][t * s_.width + d], fill, (epsilon(number_) + static_cast<double>(rows_) * 0x1p-23) * size);
      }
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t i = keep_len_[size_t(r)] * s_.width; i < slots_ * s_.width; ++i)
        CHECK(o[0][r * slots_ * s_.width + i] == 0);
  }

  // The targets of some layers, which are one and the same, and their gradients.
  Outputs targets(MultimaskNorm norm, MultimaskNorm post, int64_t count = 2) const {
    const int64_t size = s_.batch * s_.tokens * s_.width;
    Outputs o;
    o.push_back(Output(CpuNumber::f32, size, 64));
    std::vector<MultimaskRows> layers;
    std::vector<void*> to;
    for (int64_t k = 0; k < count; ++k) {
      o.push_back(output(size));
      layers.push_back(rows(x_, s_.tokens)), to.push_back(o.back().data());
    }
    MultimaskTargets forward{};
    forward.sizes = sizes(), forward.layers = layers.data(), forward.count = count, forward.lengths = lengths_.data();
    forward.norm = norm, forward.post_norm = post, forward.eps = kEpsilon;
    forward.weight = 1.0f / static_cast<float>(count), forward.out = static_cast<float*>(o[0].data());
    const MultimaskTargetsBackward backward{forward, rows(target_, s_.tokens), to.data()};
    const GpuScratch scratch(std::max({multimask_targets_scratch(forward, machine_),
                                       multimask_targets_backward_scratch(backward, machine_), int64_t{1}}));
    Buffers buffers;
    register_all(buffers, o, scratch);
    expect_no(multimask_targets(forward, scratch.data(), machine_, nullptr));
    expect_no(multimask_targets_backward(backward, scratch.data(), machine_, nullptr));
    for (const Output& output : o) CHECK(output.guarded());
    return o;
  }

  // The mean of the norms of one layer is that of the one.
  void check_targets(const Outputs& o, MultimaskNorm norm) const {
    const double weight = 1.0 / static_cast<double>(o.size() - 1);
    struct Group {
      double count = 0, mean = 0, squares = 0, g = 0, gx = 0;
      double deviation() const { return std::sqrt(squares / count + double{kEpsilon}); }
    };
    const bool plain = norm == MultimaskNorm::none;
    std::vector<Group> groups(static_cast<size_t>(s_.batch * (s_.tokens + s_.width)));
    const auto each = [&](const auto& body) {
      for (int64_t b = 0; b < s_.batch; ++b)
        for (int64_t t = 0; t < lengths_[size_t(b)]; ++t)
          for (int64_t d = 0; d < s_.width; ++d)
            body(groups[size_t(norm == MultimaskNorm::layer      ? b * s_.tokens + t
                               : norm == MultimaskNorm::instance ? b * s_.width + d
                                                                 : d)],
                 (b * s_.tokens + t) * s_.width + d);
    };
    const auto normal = [&](const Group& group, int64_t at) { return (x_[at] - group.mean) / group.deviation(); };
    each([&](Group& group, int64_t at) { ++group.count, group.mean += x_[at]; });
    for (Group& group : groups) group.mean /= std::max(group.count, 1.0);
    each([&](Group& group, int64_t at) { group.squares += (x_[at] - group.mean) * (x_[at] - group.mean); });
    each([&](Group& group, int64_t at) {
      group.g += target_[at] / group.count, group.gx += target_[at] * normal(group, at) / group.count;
    });
    each([&](Group& group, int64_t at) {
      near(o[0][at], plain ? x_[at] : normal(group, at), 1e-4);
      const double scale = plain ? weight : weight / group.deviation();
      const double dx = scale * (plain ? target_[at] : target_[at] - group.g - normal(group, at) * group.gx);
      for (size_t k = 1; k < o.size(); ++k) near(o[k][at], dx, epsilon(number_) * std::fabs(dx) + 1e-4 * scale);
    });
    for (int64_t b = 0; b < s_.batch; ++b)
      for (int64_t at = (b * s_.tokens + lengths_[size_t(b)]) * s_.width; at < (b + 1) * s_.tokens * s_.width; ++at)
        for (const Output& output : o) CHECK(output[at] == 0);
  }

  Outputs loss(MultimaskKind kind, bool by_token, bool moments, bool backward) const {
    const int64_t size = rows_ * s_.tokens * s_.width;
    Outputs o;
    o.push_back(Output(CpuNumber::f32, by_token ? rows_ * s_.tokens : 1)), o.push_back(output(size));
    o.push_back(Output(CpuNumber::f64, moments ? 1 + 4 * s_.width : 0));
    o.push_back(Output(CpuNumber::f32, backward ? s_.batch * s_.tokens * s_.width : 0, 64));
    MultimaskLoss p{};
    p.sizes = sizes(), p.pred = rows(y_, s_.tokens), p.target = rows(target_, s_.tokens);
    p.inverse = inverse_.data(), p.lengths = lengths_.data(), p.kind = kind, p.beta = 0.5f, p.scale = 2.0;
    p.by_token = by_token, p.loss = static_cast<float*>(o[0].data()), p.dpred = o[1].data();
    p.moments = static_cast<double*>(o[2].maybe()), p.dtarget = static_cast<float*>(o[3].maybe());
    const GpuScratch scratch(std::max<int64_t>(multimask_loss_scratch(p, machine_), 1));
    Buffers buffers;
    register_all(buffers, o, scratch);
    expect_no(multimask_loss(p, scratch.data(), machine_, nullptr));
    for (const Output& output : o) CHECK(output.guarded());
    return o;
  }

  // Of l2.
  void check_loss(const Outputs& o, bool by_token) const {
    double all = 0, count = 0;
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t t = 0; t < s_.tokens; ++t) {
        double sum = 0;
        count += hidden(r, t);
        for (int64_t d = 0; d < s_.width; ++d) {
          const int64_t at = (r * s_.tokens + t) * s_.width + d;
          const double apart = hidden(r, t) ? y_[at] - target_[(r / s_.masks * s_.tokens + t) * s_.width + d] : 0;
          sum += 2 * apart * apart;
          near(o[1][at], 4 * apart, 4 * epsilon(number_) * std::fabs(apart) + 0x1p-20);
        }
        if (by_token) near(o[0][r * s_.tokens + t], sum, 1e-5 * sum);
        all += sum;
      }
    if (!by_token) near(o[0][0], all, 1e-5 * all);
    if (o[2].count()) CHECK(o[2][0] == count);
    for (int64_t d = 0; d < s_.width; ++d) {
      double sums[4] = {}, sizes[4] = {};
      for (int64_t b = 0; b < s_.batch; ++b)
        for (int64_t t = 0; t < s_.tokens; ++t) {
          const int64_t to = (b * s_.tokens + t) * s_.width + d;
          double back = 0, size = 0;
          for (int64_t r = b * s_.masks; r < (b + 1) * s_.masks; ++r) {
            if (!hidden(r, t)) continue;
            const double x = y_[(r * s_.tokens + t) * s_.width + d], y = target_[to], terms[] = {y, y * y, x, x * x};
            for (int i = 0; i < 4; ++i) sums[i] += terms[i], sizes[i] += std::fabs(terms[i]);
            back -= 4 * (x - y), size += std::fabs(4 * (x - y));
          }
          if (o[3].count()) near(o[3][to], back, 1e-6 * size);
        }
      for (int64_t i = 0; i < 4 && o[2].count(); ++i) near(o[2][1 + i * s_.width + d], sums[i], 1e-13 * sizes[i]);
    }
  }

 private:
  Input numbers(CpuNumber number, int64_t rows, Begin begin, double mean = 0, double spread = 1) {
    Input input(number, rows * s_.width, begin);
    for (int64_t i = 0; i < rows * s_.width; ++i) input.set(i, mean + spread * random_.uniform());
    return input;
  }
  Output output(int64_t count) const { return Output(number_, count, 64); }
  MultimaskSizes sizes() const { return {gpu_number(number_), s_.batch, s_.masks, s_.tokens, slots_, s_.width}; }
  template <class Numbers>
  MultimaskRows rows(const Numbers& numbers, int64_t inner) const {
    return {numbers.data(), inner * s_.width, s_.width};
  }
  void register_all(Buffers& buffers, const Outputs& outputs, const GpuScratch& scratch) const {
    for (const Input* input : {&x_, &y_, &target_, &fill_})
      buffers.reads(input->data(), static_cast<size_t>(input->bytes()), "an input");
    for (const std::vector<int32_t>* index : {&lengths_, &ids_, &keep_len_, &inverse_})
      buffers.reads(index->data(), index->size() * sizeof(int32_t), "an index");
    for (const Output& output : outputs)
      buffers.writes(output.data(), static_cast<size_t>(output.bytes()), "an output");
    buffers.writes(scratch.data(), scratch.bytes(), "scratch");
  }

  const CpuNumber number_;
  const Shape s_;
  Random random_;
  const int64_t rows_, slots_;
  std::vector<int32_t> lengths_, ids_, keep_len_, inverse_;
  Input x_, y_, target_, fill_;
  Machine machine_;
};

constexpr MultimaskNorm kNorms[] = {MultimaskNorm::none, MultimaskNorm::instance, MultimaskNorm::layer,
                                    MultimaskNorm::batch};
constexpr MultimaskKind kKinds[] = {MultimaskKind::l2, MultimaskKind::smooth_l1, MultimaskKind::l1,
                                    MultimaskKind::cosine};
// Vectors and single numbers; rows of one chunk, and of more than a warp or a block holds.
constexpr Shape kShapes[] = {{2, 3, 9, 24}, {3, 2, 5, 7}, {1, 9, 1, 16}, {2, 1, 3, 1064}, {1, 2, 70, 8}};

}  // namespace

TEST(multimask_on_the_gpu_moves_tokens) {
  uint64_t seed = 40000;
  for (CpuNumber number : kGpuNumbers)
    for (const Shape& shape : kShapes) {
      if (!taken(++seed, 2, 3)) continue;
      const Call call(number, shape, seed % 2 ? Begin::vector : Begin::number, seed);
      const Outputs first = call.move();
      call.check_move(first);
      const Order other;
      CHECK(same(first, call.move()));
    }
}

TEST(multimask_on_the_gpu_makes_targets) {
  uint64_t seed = 41000;
  for (CpuNumber number : kGpuNumbers)
    for (const Shape& shape : kShapes)
      for (MultimaskNorm norm : kNorms) {
        ++seed;
        if (!taken(seed, 3, 11)) continue;
        const Call call(number, shape, seed % 3 ? Begin::vector : Begin::number, seed);
        const Outputs first = call.targets(norm, MultimaskNorm::none);
        call.check_targets(first, norm);
        const Order other;
        CHECK(same(first, call.targets(norm, MultimaskNorm::none)));
        const MultimaskNorm post = kNorms[seed % 4];
        CHECK(same(call.targets(norm, post), call.targets(norm, post)));
      }
}

// Slices of fewer channels, and more tokens than stay on the chip.
TEST(multimask_on_the_gpu_makes_targets_of_many_tokens) {
  uint64_t seed = 42000;
  for (int64_t tokens : {260, 520, 1030})
    for (CpuNumber number : {CpuNumber::f32, CpuNumber::bf16})
      for (int64_t width : {8, 3}) {
        if (!taken(++seed, 2, 4)) continue;
        const Call call(number, {2, 1, tokens, width}, Begin::vector, seed);
        call.check_targets(call.targets(MultimaskNorm::instance, MultimaskNorm::none), MultimaskNorm::instance);
        call.targets(MultimaskNorm::layer, MultimaskNorm::instance);
      }
}

// More layers than one launch has.
TEST(multimask_on_the_gpu_makes_targets_of_many_layers) {
  uint64_t seed = 42100;
  for (MultimaskNorm norm : kNorms)
    for (const Shape& shape : {Shape{2, 1, 5, 8}, Shape{1, 1, 2, 1064}}) {
      if (!taken(++seed, 2, 4)) continue;
      const Call call(CpuNumber::bf16, shape, Begin::vector, seed);
      call.check_targets(call.targets(norm, MultimaskNorm::none, 35), norm);
      call.targets(norm, MultimaskNorm::batch, 35);
    }
}

// Digits that a sum of squares does not have.
TEST(multimask_on_the_gpu_keeps_the_digits_of_small_deviations) {
  uint64_t seed = 42200;
  for (MultimaskNorm norm : {MultimaskNorm::instance, MultimaskNorm::layer, MultimaskNorm::batch})
    for (const Shape& shape : {Shape{2, 1, 9, 24}, Shape{1, 1, 300, 7}, Shape{1, 1, 1030, 4}, Shape{1, 1, 2, 1064}}) {
      // A kernel that few other cases reach is reached each time.
      const bool wide = norm == MultimaskNorm::layer && shape.width > 1000;
      if (!taken(++seed, 2, 4) && !wide) continue;
      const Call call(CpuNumber::f32, shape, Begin::vector, seed, 30, 0.017);
      call.check_targets(call.targets(norm, MultimaskNorm::none), norm);
    }
}

TEST(multimask_on_the_gpu_takes_losses) {
  uint64_t seed = 43000;
  for (CpuNumber number : kGpuNumbers)
    for (const Shape& shape : kShapes)
      for (MultimaskKind kind : kKinds)
        for (bool by_token : {false, true}) {
          ++seed;
          if (!taken(seed, 5, 17)) continue;
          const Call call(number, shape, seed % 3 ? Begin::vector : Begin::number, seed);
          const bool moments = seed % 2;
          const Outputs first = call.loss(kind, by_token, moments, !moments);
          if (kind == MultimaskKind::l2) call.check_loss(first, by_token);
          const Order other;
          CHECK(same(first, call.loss(kind, by_token, moments, !moments)));
        }
}

// Vectors, what is left behind the last of them, and single numbers; a factor of one writes nothing.
TEST(multimask_on_the_gpu_scales_in_place) {
  for (CpuNumber number : kGpuNumbers)
    for (int64_t guard : {int64_t{64}, 64 + size_of(number)})
      for (float factor : {1.0f, 0.5f}) {
        const Output t(number, 5003, guard);
        for (int64_t i = 0; i < t.count(); ++i) put(number, t.data(), i, static_cast<double>(i % 64));
        Buffers buffers;
        if (factor == 1.0f) {
          buffers.reads(t.data(), static_cast<size_t>(t.bytes()), "t");
        } else {
          buffers.writes(t.data(), static_cast<size_t>(t.bytes()), "t");
        }
        buffers.reads(&factor, sizeof factor, "factor");
        expect_no(multimask_rescale({gpu_number(number), t.count(), t.data(), &factor}, Machine(), nullptr));
        for (int64_t i = 0; i < t.count(); ++i) CHECK(t[i] == static_cast<double>(i % 64) * factor);
        CHECK(t.guarded());
      }
}

// An index is data: whatever is in it, nothing is touched that is not there. The emulation sees every access.
TEST(a_wrong_index_leads_no_kernel_of_multimask_astray) {
  uint64_t seed = 44000;
  for (const Shape& shape : kShapes)
    for (CpuNumber number : {CpuNumber::f32, CpuNumber::bf16}) {
      ++seed;
      if (!taken(seed, 3, 7)) continue;
      Call call(number, shape, Begin::vector, seed);
      call.spoil();
      call.move();
      call.targets(kNorms[seed % 4], MultimaskNorm::none);
      call.loss(kKinds[seed % 4], false, true, false);
      call.loss(kKinds[seed / 2 % 4], true, false, true);
    }
}
