// The templates that the kernels are made of, at a few fixed parameters and behind plain functions: for the native
// tests and the development module, which cannot instantiate what is compiled for one instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/number.h"
#include "cpu/parallel.h"

namespace pyeff {

enum class MathFunction : int { sigmoid, tanh, gelu, gelu_derivative };
enum class ToBf16 : int { scalar, vector, pair };  // the three places that round to bf16

// One left operand of `k` columns, of the number type Product::stored; see RowSource.
struct ProductTerm {
  const void* base;
  int64_t row_stride, inner_stride, k;
  const int64_t* index;         // or null
  const void* const* pointers;  // or null
  const void* scale;            // of the compute type, or null
  const void* panels;           // the right operand: pack_panels_nk or pack_panels_kn
};

// C = alpha sum + bias + beta C, and ReLU on top where asked.
struct Product {
  Number number, stored;  // `stored` is `number` or, for f64 and bf16, f32, or, for f32, bf16
  int vectors;            // of a panel: 1 or 4
  int64_t m, n;
  const ProductTerm* terms;
  int count;
  void* out;  // rows `row_stride` apart
  int64_t row_stride;
  const void* bias;  // or null
  double alpha, beta;
  bool relu;
};

// clang-format off
PYEFF_FOR_EACH_ISA(
    // f64 or f32.
    void apply_math(MathFunction function, Number number, const void* x, void* y, int64_t count);
    void to_bf16(ToBf16 way, const float* x, uint16_t* y, int64_t count);
    // Through a register of the compute type, at most a vector of it.
    void copy_first(Number number, const void* from, void* to, int64_t count);
    int lanes_of(Number number);
    // Words of Philox4x32 with 7 or 10 rounds, in the order of the counters from `first` on; count is a multiple of 64.
    void philox_words(int rounds, uint64_t key, uint32_t first, uint32_t second, uint64_t last, int64_t count,
                      uint32_t* out);

    int64_t panels_bytes(Number number, int vectors, int64_t n, int64_t k);
    // From a matrix [n, k] whose rows are `row_stride` apart; `scale` [k] has its type, or is null.
    void pack_panels_nk(Number number, int vectors, int64_t n, int64_t k, const void* source, int64_t row_stride,
                        const void* scale, void* panels);
    // From k rows of n elements `stride` apart; `shift` and `scale` [k] have the compute type, or are null.
    void pack_panels_kn(Number number, int vectors, int64_t n, int64_t k, const void* const* rows, int64_t stride,
                        const void* shift, const void* scale, void* panels);
    bool product(const Product& product, const Parallel& parallel);

    // The register tile on a packed left operand: out[i][j] = sum over p < k of left[p][i] right[p][j] for i < rows, all
    // columns of a panel of 4 vectors. `out` has the compute type; `scratch` the size of a left panel.
    int tile_rows();
    int64_t left_panel_bytes(Number number, int64_t k);
    void outer_tile(Number number, int64_t rows, int64_t k, const void* const* left, const void* panels, void* scratch,
                    void* out);

    // See dot_rows: what K of the left rows is padded to a multiple of, and the products.
    int64_t dot_step(Number number);
    void dot_products(Number number, const void* const* left, int64_t m, const void* right, int64_t stride, int64_t n,
                      int64_t k, void* const* out, void** pointers);)
// clang-format on

}  // namespace pyeff
