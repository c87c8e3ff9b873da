// The pieces beside the shared product: dot products in place, and the register tile on a packed left operand.
#include "dev/probe.h"
#include "support.h"

using namespace check;

TEST(dot_products_of_all_sizes) {
  const int64_t counts[] = {1, 2, 3, 4, 7, 16, 25}, lengths[] = {1, 7, 16, 63, 96, 97, 500};
  Random random(7);
  for (Number number : kNumbers)
    for (int i = 0; i < (kSanitized ? 40 : 150); ++i) {
      const int64_t m = random.pick(counts), n = random.pick(counts), k = random.pick(lengths);
      const int64_t stride = k + (random.coin() ? 0 : 3);
      Input right(number, (n - 1) * stride + k);
      for (int64_t j = 0; j < (n - 1) * stride + k; ++j) right.set(j, random.uniform());
      for_each_usable_isa([&](int isa) {
        const int64_t step = PYEFF_ALL_OF(dot_step).of[isa](number), padded = (k + step - 1) / step * step;
        const Number wide = compute_of(number);
        Input left(number, m * padded);
        std::vector<Output> rows;
        std::vector<const void*> left_rows;
        std::vector<void*> out, pointers(m);
        for (int64_t r = 0; r < m; ++r) {
          for (int64_t p = 0; p < padded; ++p) left.set(r * padded + p, p < k ? random.uniform() : 0);
          left_rows.push_back(static_cast<const char*>(left.data()) + r * padded * size_of(number));
          rows.emplace_back(wide, n);
        }
        for (Output& row : rows) out.push_back(row.data());
        PYEFF_ALL_OF(dot_products)
            .of[isa](number, left_rows.data(), m, right.data(), stride, n, k, out.data(), pointers.data());
        for (int64_t r = 0; r < m; ++r) {
          CHECK(rows[r].guarded());
          for (int64_t j = 0; j < n; ++j) {
            double sum = 0, magnitude = 0;
            for (int64_t p = 0; p < k; ++p) {
              const double term = left[r * padded + p] * right[j * stride + p];
              sum += term, magnitude += std::fabs(term);
            }
            CHECK(std::fabs(rows[r][j] - sum) <= epsilon(wide) * (2 + std::sqrt(double(k))) * magnitude);
          }
        }
      });
    }
}

// What READ's backward does for its weights: sum over p of left[p][i] (right[p][j] - shift[p]) scale[p].
TEST(outer_products_of_rows) {
  Random random(8);
  for (Number number : kNumbers)
    for (int64_t k : {1, 2, 7, 64, 97})
      for (int64_t stride : {1, 2})
        for (int variant = 0; variant < 4; ++variant)
          for_each_usable_isa([&](int isa) {
            const bool shifted = variant & 1, scaled = variant & 2;
            const Number wide = compute_of(number);
            const int64_t width = 4 * PYEFF_ALL_OF(lanes_of).of[isa](number), n = 1 + random.below(width);
            const int64_t rows = 1 + random.below(PYEFF_ALL_OF(tile_rows).of[isa]());
            std::vector<Input> left, right;
            std::vector<const void*> left_rows, right_rows;
            Input shift(wide, k), scale(wide, k);
            for (int64_t p = 0; p < k; ++p) {
              left.emplace_back(number, rows);
              right.emplace_back(number, (n - 1) * stride + 1);
              for (int64_t i = 0; i < rows; ++i) left.back().set(i, random.uniform());
              for (int64_t j = 0; j < (n - 1) * stride + 1; ++j) right.back().set(j, random.uniform());
              shift.set(p, random.uniform()), scale.set(p, random.uniform());
            }
            for (const Input& row : left) left_rows.push_back(row.data());
            for (const Input& row : right) right_rows.push_back(row.data());
            Output panels = Output::packed(PYEFF_ALL_OF(panels_bytes).of[isa](number, 4, n, k));
            Output scratch = Output::packed(PYEFF_ALL_OF(left_panel_bytes).of[isa](number, k)), out(wide, rows * width);
            PYEFF_ALL_OF(pack_panels_kn)
                .of[isa](number, 4, n, k, right_rows.data(), stride, shifted ? shift.data() : nullptr,
                         scaled ? scale.data() : nullptr, panels.data());
            PYEFF_ALL_OF(outer_tile)
                .of[isa](number, rows, k, left_rows.data(), panels.data(), scratch.data(), out.data());
            CHECK(panels.guarded() && scratch.guarded() && out.guarded());
            for (int64_t i = 0; i < rows; ++i)
              for (int64_t j = 0; j < n; ++j) {
                double sum = 0, magnitude = 0;
                for (int64_t p = 0; p < k; ++p) {
                  const double from = right[p][j * stride], moved = shifted ? shift[p] : 0,
                               factor = scaled ? scale[p] : 1;
                  sum += left[p][i] * (from - moved) * factor;
                  magnitude += std::fabs(left[p][i] * factor) * (std::fabs(from) + std::fabs(moved));
                }
                const double operand = shifted || scaled ? epsilon(number) : 0;
                CHECK(std::fabs(out[i * width + j] - sum) <=
                      magnitude * (operand + epsilon(wide) * (2 + std::sqrt(double(k)))));
              }
          });
}
