// What the tests of the multimask kernels share: threads, strided inputs, and numbers beside what they may be wrong by.
#pragma once

#include <algorithm>
#include <string>

#include "cpu/memory.h"
#include "cpu/multimask_loss.h"
#include "dev/threads.h"
#include "support.h"

namespace check {

using pyeff::MaskRows;
using pyeff::dev::Threads;
inline const double kNan = std::nan("");

inline const pyeff::Parallel& threads(int i) {
  static Threads one(1), two(2), three(3);
  static const pyeff::Parallel all[] = {one.parallel(), two.parallel(), three.parallel()};
  return all[i];
}

using Numbers = std::vector<double>;

// Numbers beside how wrong they may be.
struct Near {
  Numbers value, bound;
  explicit Near(int64_t count = 0) : value(size_t(count)), bound(size_t(count)) {}
  void check(const std::string& what, const Output& found) const {
    CHECK(found.count() == int64_t(value.size()) && found.guarded());
    for (size_t i = 0; i < value.size(); ++i) {
      const double x = found[int64_t(i)];
      if (std::fabs(x - value[i]) <= bound[i]) continue;
      std::fprintf(stderr, "%s[%zu] is %g, not %g (+- %g)\n", what.c_str(), i, x, value[i], bound[i]);
      std::exit(1);
    }
  }
};

// [samples, tokens, width] with a gap behind each row and each sample; what does not count is NaN.
struct Strided {
  Input memory;
  MaskRows rows{};
  Strided() = default;
  Strided(Number number, int64_t samples, int64_t tokens, int64_t width, bool gaps, const Numbers& values) {
    const int64_t token = width + (gaps ? 3 : 0), sample = tokens * token + (gaps ? 5 : 0);
    Numbers all(size_t((samples - 1) * sample + (tokens - 1) * token + width), kNan);
    for (int64_t b = 0; b < samples; ++b)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t d = 0; d < width; ++d)
          all[size_t(b * sample + t * token + d)] = values[size_t((b * tokens + t) * width + d)];
    memory = Input(number, all);
    rows = {memory.data(), sample, token};
  }
};

}  // namespace check
