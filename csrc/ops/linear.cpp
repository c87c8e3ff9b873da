// The shared matrix product for the dispatcher, for the benchmarks and tests.
#include "cpu/linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "ops/number.h"
#include "ops/parallel.h"

namespace pyeff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor pack(Tensor weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.is_contiguous() && weight.numel() > 0,
                  "linear_pack: weight is not a contiguous, non-empty matrix on the CPU");
  const Number number = number_of(weight, "weight");
  const int64_t out = weight.sizes()[0], in = weight.sizes()[1];
  Tensor packed =
      torch::stable::new_empty(weight, {PYEFF_CHOSEN(linear_packed_bytes)(number, out, in)}, ScalarType::Byte);
  PYEFF_CHOSEN(linear_pack)(number, out, in, weight.const_data_ptr(), packed.mutable_data_ptr(), torch_parallel());
  return packed;
}

Tensor linear(Tensor x, Tensor packed, int64_t out_features, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.sizes()[1] > 0 && x.strides()[1] == 1,
                  "linear: x is not a matrix with adjacent columns on the CPU");
  LinearProblem p{};
  p.number = number_of(x, "x");
  p.rows = x.sizes()[0];
  p.in = x.sizes()[1];
  p.out = out_features;
  const int64_t bytes = out_features > 0 ? PYEFF_CHOSEN(linear_packed_bytes)(p.number, p.out, p.in) : -1;
  STD_TORCH_CHECK(
      packed.is_cpu() && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte && packed.numel() == bytes,
      "linear: packed has ", packed.numel(), " bytes, expected ", bytes, " (what linear_pack returned)");
  if (bias) {
    STD_TORCH_CHECK(
        bias->is_cpu() && bias->is_contiguous() && bias->scalar_type() == x.scalar_type() && bias->numel() == p.out,
        "linear: bias has ", bias->numel(), " elements or another dtype, expected ", p.out, " of x's dtype");
    p.bias = bias->const_data_ptr();
  }
  Tensor y = torch::stable::new_empty(x, {p.rows, p.out});
  p.x = x.const_data_ptr();
  p.x_stride = x.strides()[0];
  p.packed = packed.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (p.rows) STD_TORCH_CHECK(PYEFF_CHOSEN(linear)(p, torch_parallel()), "linear: out of memory");
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(pyeff_cpu, m) {
  m.def("linear_pack(Tensor weight) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, int out_features, Tensor? bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cpu, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&pack));
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace
}  // namespace pyeff
