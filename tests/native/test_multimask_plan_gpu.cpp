// The CUDA kernels of plans, run by the emulation, against their definitions: masks of blocks bit for bit, the bias of
// distances in both directions, the moving average; and no index of a plan leads them astray.
#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "cuda/emulate/emulate.h"
#include "cuda/multimask_plan.h"
#include "cuda/philox.cuh"
#include "read_gpu_call.h"

using namespace check;
using pyeff::gpu::Machine;
using pyeff::gpu::emulate::Buffers;

namespace {

void expect_no(const char* error) {
  if (error == nullptr) return;
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}

// Integers for results, between guards.
struct Integers {
  explicit Integers(int64_t size) : all(static_cast<size_t>(size + 2 * kGuard), kWord), count(size) {}
  int32_t* data() { return all.data() + kGuard; }
  int32_t operator[](int64_t i) const { return all[static_cast<size_t>(kGuard + i)]; }
  bool guarded() const {
    return std::all_of(all.begin(), all.begin() + kGuard, [](int32_t x) { return x == kWord; }) &&
           std::all_of(all.end() - kGuard, all.end(), [](int32_t x) { return x == kWord; });
  }
  static constexpr int32_t kWord = -77;
  static constexpr int64_t kGuard = 16;
  std::vector<int32_t> all;
  int64_t count;
};

struct Draw {
  int64_t tokens, grid_width, length;
  double keep, share;
  bool inverse;
};

// The tokens that a row keeps, by the definition.
std::vector<bool> drawn(const Draw& d, int64_t seed, int64_t sample, uint32_t mask, int64_t length) {
  using namespace pyeff::gpu;
  const auto word = [&](uint32_t purpose, int64_t i) {
    return philox_of_sample(seed, sample, mask, purpose, static_cast<uint32_t>(i / 4)).x[i % 4];
  };
  std::vector<uint64_t> scores(static_cast<size_t>(length));
  for (int64_t t = 0; t < length; ++t) scores[static_cast<size_t>(t)] = word(kPhiloxScores, t);
  const auto clamp = [](int64_t x, int64_t most) { return std::min(std::max<int64_t>(x, 0), most); };
  const auto mark = [&](int64_t t) {
    if (t < length) scores[static_cast<size_t>(t)] |= uint64_t{1} << 32;
  };
  const int64_t centres = static_cast<int64_t>(static_cast<double>(length) * d.share);
  for (int64_t i = 0; i < centres; ++i) {
    const auto centre = static_cast<int64_t>(uint64_t{word(kPhiloxCentres, i)} * static_cast<uint64_t>(length) >> 32);
    for (int64_t a = -(d.length / 2); a < d.length - d.length / 2; ++a) {
      if (d.grid_width == 0) {
        mark(clamp(centre + a, d.tokens - 1));
        continue;
      }
      for (int64_t b = -(d.length / 2); b < d.length - d.length / 2; ++b)
        mark(clamp(centre / d.grid_width + a, d.tokens / d.grid_width - 1) * d.grid_width +
             clamp(centre % d.grid_width + b, d.grid_width - 1));
    }
  }
  std::vector<int64_t> order(static_cast<size_t>(length));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
  });
  const auto kept = static_cast<int64_t>(static_cast<double>(length) * d.keep);
  std::vector<bool> found(static_cast<size_t>(length), !d.inverse);
  for (int64_t i = 0; i < (d.inverse ? kept : length - kept); ++i)
    found[static_cast<size_t>(order[static_cast<size_t>(i)])] = d.inverse;
  return found;
}

void check_draw(const Draw& d, int64_t masks, int64_t slots, std::vector<int32_t> lengths, bool named) {
  const auto batch = static_cast<int64_t>(lengths.size()), rows = batch * masks;
  const std::vector<int64_t> seed = {-(int64_t{1} << 40) - 7};
  std::vector<int64_t> names(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) names[static_cast<size_t>(b)] = named ? (int64_t{1} << 33) - 3 * b : b;
  Integers ids(rows * slots), kept(rows), inverse(rows * d.tokens);
  pyeff::gpu::MultimaskBlocks p{};
  p.rows = rows, p.masks = masks, p.tokens = d.tokens, p.slots = slots, p.grid_width = d.grid_width;
  p.length = d.length, p.keep = d.keep, p.share = d.share, p.inverse = d.inverse, p.seed = seed.data();
  p.sample_ids = named ? names.data() : nullptr, p.lengths = lengths.data();
  p.ids_keep = ids.data(), p.keep_len = kept.data(), p.kept_slot = inverse.data();
  const Machine machine{};
  const int64_t bytes = multimask_block_mask_scratch(p);
  const GpuScratch scratch(std::max<int64_t>(bytes, 1));
  {
    Buffers buffers;
    buffers.reads(seed.data(), 8, "seed");
    buffers.reads(names.data(), names.size() * 8, "sample_ids");
    buffers.reads(lengths.data(), lengths.size() * 4, "lengths");
    for (Integers* out : {&ids, &kept, &inverse})
      buffers.writes(out->data(), static_cast<size_t>(out->count) * 4, "an output");
    buffers.writes(scratch.data(), scratch.bytes(), "scratch");
    expect_no(multimask_block_mask(p, scratch.data(), machine, nullptr));
  }
  CHECK(ids.guarded() && kept.guarded() && inverse.guarded());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t b = r / masks, length = std::min<int64_t>(std::max(lengths[static_cast<size_t>(b)], 0), d.tokens);
    const std::vector<bool> expected =
        drawn(d, seed[0], names[static_cast<size_t>(b)], static_cast<uint32_t>(r % masks), length);
    int64_t slot = 0;
    for (int64_t t = 0; t < d.tokens; ++t) {
      const bool here = t < length && expected[static_cast<size_t>(t)] && slot < slots;
      CHECK(inverse[r * d.tokens + t] == (here ? slot : -1));
      if (here) CHECK(ids[r * slots + slot++] == t);
    }
    CHECK(kept[r] == slot);
    for (; slot < slots; ++slot) CHECK(ids[r * slots + slot] == 0);
  }
}

// Rows of which each keeps another number, in ascending order.
struct Plan {
  int64_t rows, slots;
  std::vector<int32_t> ids, kept;

  Plan(int64_t r, int64_t k, Random& random)
      : rows(r), slots(k), ids(static_cast<size_t>(r * k)), kept(static_cast<size_t>(r)) {
    for (int64_t row = 0; row < rows; ++row) {
      kept[static_cast<size_t>(row)] = static_cast<int32_t>(row == 0 ? 0 : slots - row % 3);
      int32_t at = 0;
      for (int64_t i = 0; i < slots; ++i)
        ids[static_cast<size_t>(row * slots + i)] = at += 1 + static_cast<int32_t>(random.coin());
    }
  }
  double distance(int64_t r, int64_t i, int64_t j, int64_t prefix) const {
    if (std::min(i, j) < prefix || std::max(i, j) >= kept[static_cast<size_t>(r)]) return 0;
    return std::abs(ids[static_cast<size_t>(r * slots + i)] - ids[static_cast<size_t>(r * slots + j)]);
  }
};

struct Bias {
  Output out, dslopes;
};

Bias run_bias(const Plan& plan, Number number, const std::vector<double>& slopes, const std::vector<double>& grad,
              int64_t prefix, Begin begin, int processors) {
  const auto heads = static_cast<int64_t>(slopes.size()), size = plan.rows * heads * plan.slots * plan.slots;
  Input from(Number::f32, slopes), above(number, size, begin);
  for (int64_t i = 0; i < size; ++i) above.set(i, grad[static_cast<size_t>(i)]);
  Bias found{Output(number, size, begin == Begin::vector ? 64 : 64 + size_of(number)), Output(Number::f32, heads)};
  const pyeff::gpu::MultimaskBias p{gpu_number(number), plan.rows,       plan.slots, heads, prefix,
                                    plan.ids.data(),    plan.kept.data()};
  Machine machine{};
  machine.processors = processors;
  const GpuScratch scratch(multimask_relative_bias_scratch(p));
  Buffers buffers;
  buffers.reads(plan.ids.data(), plan.ids.size() * 4, "ids_keep");
  buffers.reads(plan.kept.data(), plan.kept.size() * 4, "keep_len");
  buffers.reads(from.data(), static_cast<size_t>(from.bytes()), "slopes");
  buffers.reads(above.data(), static_cast<size_t>(above.bytes()), "grad");
  buffers.writes(found.out.data(), static_cast<size_t>(found.out.bytes()), "out");
  buffers.writes(found.dslopes.data(), static_cast<size_t>(found.dslopes.bytes()), "dslopes");
  buffers.writes(scratch.data(), scratch.bytes(), "scratch");
  expect_no(multimask_relative_bias(p, static_cast<const float*>(from.data()), found.out.data(), machine, nullptr));
  expect_no(multimask_relative_bias_backward(p, above.data(), static_cast<float*>(found.dslopes.data()), scratch.data(),
                                             machine, nullptr));
  CHECK(found.out.guarded() && found.dslopes.guarded());
  return found;
}

}  // namespace

TEST(masks_of_blocks_on_the_gpu_are_those_of_the_definition) {
  check_draw({196, 14, 3, 0.2, 0.27 / 9, true}, 2, 39, {196, 196}, true);
  check_draw({60, 0, 5, 0.5, 0.55 / 5, true}, 3, 30, {60, 31}, false);
  check_draw({600, 0, 4, 0.5, 0.55 / 4, false}, 1, 300, {600, 1000, -3}, true);
  check_draw({33, 0, 1, 0.48, 0.52, false}, 2, 10, {33, 0}, false);  // fewer slots than are kept
  check_draw({7, 0, 50, 1.0, 0.5, true}, 1, 9, {7}, true);
  check_draw({7, 0, 2, 0.0, -0.5, true}, 1, 1, {7}, true);
  // More centres than are looked at together; and rows that shared memory does not hold.
  if (kSanitized) return;
  check_draw({3000, 0, 1, 0.4, 0.6, true}, 1, 1200, {3000}, true);
  check_draw({20000, 100, 3, 0.1, 0.001, false}, 1, 2000, {20000}, true);
}

TEST(the_bias_of_distances_on_the_gpu_is_right) {
  uint64_t seed = 51000;
  for (Number number : kGpuNumbers)
    for (int64_t slots : {12, 53})
      for (Begin begin : {Begin::vector, Begin::number}) {
        Random random(++seed);
        if (!taken(seed, 2, 4, 1)) continue;
        const int64_t rows = 4, heads = 3, prefix = random.coin() ? 1 : 0, area = slots * slots;
        const Plan plan(rows, slots, random);
        std::vector<double> slopes(heads), grad(static_cast<size_t>(rows * heads * area));
        for (double& x : slopes) x = random.uniform();
        for (double& x : grad) x = random.uniform();
        Input rounded(number, grad), of_slopes(Number::f32, slopes);
        const Bias found = run_bias(plan, number, slopes, grad, prefix, begin, random.coin() ? 1 : 132);
        for (int64_t h = 0; h < heads; ++h) {
          double sum = 0, size = 0;
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < slots; ++i)
              for (int64_t j = 0; j < slots; ++j) {
                const int64_t at = ((r * heads + h) * slots + i) * slots + j;
                const int32_t kept = plan.kept[static_cast<size_t>(r)];
                const double distance = plan.distance(r, i, j, prefix), bias = -of_slopes[h] * distance;
                sum -= rounded[at] * distance, size += std::fabs(rounded[at] * distance);
                if (kept > 0 && j >= kept) {
                  CHECK(found.out[at] == -INFINITY);
                } else {
                  CHECK(std::fabs(found.out[at] - bias) <= std::fabs(bias) * epsilon(number));
                }
              }
          CHECK(std::fabs(found.dslopes[h] - sum) <= 1e-6 * size);
        }
      }
}

TEST(no_plan_leads_the_bias_on_the_gpu_astray) {
  Random random(52000);
  for (int32_t wrong : {INT32_MIN, -1, 12, INT32_MAX}) {
    Plan plan(3, 12, random);
    for (size_t i = 0; i < plan.ids.size(); i += 3) plan.ids[i] = wrong;
    plan.kept[1] = wrong;
    run_bias(plan, Number::f32, {0.5}, std::vector<double>(3 * 144, 1.0), 0, Begin::vector, 132);
  }
}

TEST(moving_averages_on_the_gpu_are_right) {
  const Number numbers[] = {Number::f32, Number::bf16, kHalf};
  const double decay = 0.9999;
  std::vector<Input> params;
  std::vector<Output> averages, copies;
  std::vector<std::vector<double>> before;
  std::vector<pyeff::gpu::MultimaskAverage> tensors;
  // More of them than a launch takes, of all types, some at no vector's alignment.
  const int64_t count = 120;
  Random random(53000);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = i == 5 ? 0 : i == 7 ? 4100 : i == 9 ? 8192 : 1 + i % 11;
    const Number own = i % 3 == 2 ? numbers[i / 3 % 3] : Number::f32, other = numbers[i % 3],
                 third = numbers[i / 9 % 3];
    params.emplace_back(other, size, i % 2 ? Begin::vector : Begin::number);
    averages.emplace_back(own, size, i % 2 ? 64 : 64 + size_of(own));
    copies.emplace_back(third, i % 4 == 0 ? 0 : size, 64);
    before.emplace_back();
    for (int64_t n = 0; n < size; ++n) {
      params.back().set(n, random.uniform());
      put(own, averages.back().data(), n, random.uniform());
      before.back().push_back(averages.back()[n]);
    }
    tensors.push_back({averages.back().data(), params.back().data(), copies.back().maybe(), size, gpu_number(own),
                       gpu_number(other), gpu_number(third)});
  }
  {
    Buffers buffers;
    buffers.reads(&decay, 8, "decay");
    for (size_t i = 0; i < tensors.size(); ++i) {
      buffers.reads(params[i].data(), static_cast<size_t>(params[i].bytes()), "a parameter");
      buffers.writes(averages[i].data(), static_cast<size_t>(averages[i].bytes()), "an average");
      buffers.writes(copies[i].data(), static_cast<size_t>(copies[i].bytes()), "a copy");
    }
    expect_no(multimask_ema_update(tensors.data(), count, &decay, Machine{}, nullptr));
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Number own = i % 3 == 2 ? numbers[i / 3 % 3] : Number::f32, third = numbers[i / 9 % 3];
    CHECK(averages[i].guarded() && copies[i].guarded());
    for (int64_t n = 0; n < averages[i].count(); ++n) {
      const double mixed = decay * before[i][static_cast<size_t>(n)] + (1 - decay) * params[i][n];
      CHECK(std::fabs(averages[i][n] - mixed) <= epsilon(own) + 0x1p-23);
      if (copies[i].count()) CHECK(std::fabs(copies[i][n] - mixed) <= epsilon(third) + 0x1p-23);
    }
  }
}
