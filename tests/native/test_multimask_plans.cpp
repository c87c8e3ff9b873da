// Block masks, bit for bit those of the definition, and moving averages of many parameters at once.
#include <algorithm>

#include "multimask_call.h"

using namespace check;
using pyeff::BlockMasks;
using pyeff::EmaTensor;

namespace {

// Which tokens one row keeps, by sorting all of them.
std::vector<bool> drawn_mask(const BlockMasks& masks, uint64_t seed, uint64_t sample, uint32_t mask, int64_t tokens,
                             int64_t length) {
  const int64_t width = masks.grid_width ? masks.grid_width : tokens, kept = static_cast<int64_t>(length * masks.keep);
  std::vector<bool> block(static_cast<size_t>(tokens)), keep(static_cast<size_t>(tokens), false);
  for (int64_t i = 0; i < static_cast<int64_t>(static_cast<double>(length) * masks.share); ++i) {
    const uint64_t scaled = uint64_t{word(seed, i, mask + (1u << 30), sample)} * static_cast<uint64_t>(length);
    const int64_t centre = static_cast<int64_t>(scaled >> 32), y = centre / width, x = centre % width;
    for (int64_t b = 0; b < (masks.grid_width ? masks.length : 1); ++b)
      for (int64_t a = 0; a < masks.length; ++a) {
        const int64_t row = masks.grid_width ? std::clamp<int64_t>(y + b - masks.length / 2, 0, tokens / width - 1) : y;
        block[static_cast<size_t>(row * width + std::clamp<int64_t>(x + a - masks.length / 2, 0, width - 1))] = true;
      }
  }
  std::vector<std::pair<uint64_t, int64_t>> order;
  for (int64_t t = 0; t < length; ++t)
    order.push_back({~(uint64_t{block[static_cast<size_t>(t)]} << 32 | word(seed, t, mask + (2u << 30), sample)), t});
  std::sort(order.begin(), order.end());
  const int64_t taken = masks.of_kept ? kept : length - kept;
  for (int64_t i = 0; i < length; ++i)
    keep[static_cast<size_t>(order[static_cast<size_t>(i)].second)] = (i < taken) == masks.of_kept;
  return keep;
}

}  // namespace

TEST(block_masks_are_those_of_the_definition) {
  constexpr int64_t kGrids[][2] = {{1, 0}, {19, 0}, {300, 0}, {49, 7}, {60, 20}};
  uint64_t seed = 200;
  for (const auto& grid : kGrids)
    for (double keep : {0.0, 0.2, 0.5, 1.0})
      for (double share : {-0.1, 0.04, 0.3, 9.0})
        for (int64_t length : {1, 3, 10}) {
          Random random(++seed);
          const int64_t tokens = grid[0], batch = 3, masks = kSanitized ? 2 : 40, rows = batch * masks;
          const int64_t slots = std::max<int64_t>(static_cast<int64_t>(tokens * keep), 1);
          std::vector<int32_t> lengths, inverse(static_cast<size_t>(rows * tokens), -7);
          std::vector<int32_t> ids(static_cast<size_t>(rows * slots), -7), kept(static_cast<size_t>(rows), -7);
          std::vector<int64_t> names;
          for (int64_t b = 0; b < batch; ++b) {
            lengths.push_back(static_cast<int32_t>(b == 0 ? tokens : random.below(tokens + 1)));
            names.push_back(static_cast<int64_t>(random.bits()));
          }
          MultimaskProblem p{};
          p.batch = batch, p.rows = rows, p.tokens = tokens, p.slots = slots, p.lengths = lengths.data();
          const MultimaskNoise noise{random.bits(), seed % 2 ? names.data() : nullptr, 0};
          const BlockMasks made{grid[1], keep, share, length, seed % 3 != 0, ids.data(), kept.data(), inverse.data()};
          for_each_usable_isa([&](int isa) {
            CHECK(PYEFF_ALL_OF(multimask_block_mask).of[isa](p, noise, made, threads(static_cast<int>(seed % 3))));
            for (int64_t r = 0; r < rows; ++r) {
              const int64_t b = r / masks;
              const uint64_t sample =
                  noise.sample_ids ? static_cast<uint64_t>(names[static_cast<size_t>(b)]) : static_cast<uint64_t>(b);
              const std::vector<bool> truth = drawn_mask(made, noise.seed, sample, static_cast<uint32_t>(r % masks),
                                                         tokens, lengths[static_cast<size_t>(b)]);
              int64_t k = 0;
              for (int64_t t = 0; t < tokens; ++t) {
                const bool there = truth[static_cast<size_t>(t)] && k < slots;
                CHECK(inverse[static_cast<size_t>(r * tokens + t)] == (there ? k : -1));
                if (there) CHECK(ids[static_cast<size_t>(r * slots + k++)] == t);
              }
              CHECK(kept[static_cast<size_t>(r)] == k);
              for (; k < slots; ++k) CHECK(ids[static_cast<size_t>(r * slots + k)] == 0);
            }
          });
        }
}

TEST(averages_of_many_parameters_are_right) {
  constexpr int64_t kCounts[] = {1, 0, 5, 33, 1024, 1, 7000, 2, 2049};
  for (Number number : kNumbers)
    for (Number param : kNumbers)
      for (Number copy : kNumbers) {
        Random random(300);
        const double decay = 0.999;
        std::vector<std::vector<double>> before;
        std::vector<Input> params;
        for (int64_t count : kCounts) {
          std::vector<double> values(static_cast<size_t>(count));
          for (double& v : values) v = random.uniform();
          before.push_back(values);
          for (double& v : values) v = random.uniform();
          params.emplace_back(param, values);
        }
        for_each_usable_isa([&](int isa) {
          std::vector<Place> first;
          for (int i = 0; i < 3; ++i) {
            std::vector<Place> places;
            std::vector<EmaTensor> tensors;
            int64_t total = 0;
            for (size_t t = 0; t < params.size(); ++t) {
              places.emplace_back(number, before[t], i == 1);
              places.emplace_back(copy, kCounts[t], i == 1);
            }
            for (size_t t = 0; t < params.size(); total += kCounts[t++])
              tensors.push_back({number, param, copy, kCounts[t], total, places[2 * t].data(), params[t].data(),
                                 t == 3 ? nullptr : places[2 * t + 1].data()});
            PYEFF_ALL_OF(multimask_ema_update)
                .of[isa](tensors.data(), static_cast<int64_t>(tensors.size()), decay, i == 0 ? kNever : 0, threads(i));
            for (size_t t = 0; t < params.size(); ++t)
              for (int64_t at = 0; at < kCounts[t]; ++at) {
                const double truth =
                    decay * rounded(number, before[t][static_cast<size_t>(at)]) + (1 - decay) * params[t][at];
                const double unit = 2 * epsilon(compute_of(number));
                CHECK(near(places[2 * t][at], truth, unit + epsilon(number) * std::fabs(truth)));
                if (t != 3) CHECK(near(places[2 * t + 1][at], truth, unit + epsilon(copy) * std::fabs(truth)));
              }
            for (size_t t = 0; t < places.size(); ++t)
              CHECK(places[t].guarded() && (i == 0 || places[t].same(first[t])));
            if (i == 0) first = places;
          }
        });
      }
}
