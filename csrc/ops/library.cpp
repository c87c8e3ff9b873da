// The namespace pyeff_cpu: what the library says about itself and the machine. The kernels' ops are registered beside
// their stems, by STABLE_TORCH_LIBRARY_FRAGMENT.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/roofline.h"
#include "ops/parallel.h"

namespace pyeff {
namespace {

using torch::stable::Tensor;

std::string names(unsigned sets) {
  std::string text;
  for (int i = 0; i < kIsaCount; ++i) {
    if (sets >> i & 1u) text += (text.empty() ? "" : " ") + std::string(isa_name(i));
  }
  return text;
}

std::string built() { return names(isa_built()); }
std::string detected() { return names(isa_detected()); }
std::string chosen() { return isa_name(isa_chosen()); }

double run_fma_loop(std::string dtype, int64_t iterations) {
  FmaType type;
  if (dtype == "float64") {
    type = FmaType::kFloat64;
  } else if (dtype == "float32") {
    type = FmaType::kFloat32;
  } else if (dtype == "bfloat16") {
    type = FmaType::kBFloat16;
  } else {
    STD_TORCH_CHECK(false, "fma_loop: dtype is '", dtype, "', expected float64, float32 or bfloat16");
  }
  STD_TORCH_CHECK(iterations > 0, "fma_loop: iterations is ", iterations, ", expected at least 1");
  return PYEFF_CHOSEN(fma_loop)(type, iterations, torch_parallel());
}

int64_t bytes_of(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), op, ": ", name, " is not a contiguous tensor on the CPU");
  return t.numel() * static_cast<int64_t>(t.element_size());
}

void run_stream_copy(Tensor to, Tensor from) {
  const int64_t bytes = bytes_of(from, "stream_copy", "src");
  const int64_t room = bytes_of(to, "stream_copy", "dst");
  STD_TORCH_CHECK(room == bytes, "stream_copy: dst has ", room, " bytes, expected those of src, ", bytes);
  PYEFF_CHOSEN(stream_copy)(to.mutable_data_ptr(), from.const_data_ptr(), bytes, torch_parallel());
}

int64_t run_stream_read(Tensor from) {
  const int64_t bytes = bytes_of(from, "stream_read", "src");
  return static_cast<int64_t>(PYEFF_CHOSEN(stream_read)(from.const_data_ptr(), bytes, torch_parallel()));
}

STABLE_TORCH_LIBRARY(pyeff_cpu, m) {
  m.def("isa_built() -> str");
  m.def("isa_detected() -> str");
  m.def("isa_chosen() -> str");
  m.def("fma_loop(str dtype, int iterations) -> float");
  m.def("stream_copy(Tensor(a!) dst, Tensor src) -> ()");
  m.def("stream_read(Tensor src) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa_built", TORCH_BOX(&built));
  m.impl("isa_detected", TORCH_BOX(&detected));
  m.impl("isa_chosen", TORCH_BOX(&chosen));
  m.impl("fma_loop", TORCH_BOX(&run_fma_loop));
  m.impl("stream_copy", TORCH_BOX(&run_stream_copy));
  m.impl("stream_read", TORCH_BOX(&run_stream_read));
}

}  // namespace
}  // namespace pyeff
