// The namespace pyeff_cuda: what the CUDA side of the library was built for. It is there in a build without CUDA too.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/device.h"

namespace pyeff {
namespace {

#if defined(PYEFF_CUDA)
std::string built_architectures() { return cuda::built_architectures(); }
std::string why_not(int64_t device) { return cuda::why_not(static_cast<int>(device)); }
#else
std::string built_architectures() { return ""; }
std::string why_not(int64_t) { return "the compiled library has no CUDA code (no nvcc when pyeff was built)"; }
#endif

STABLE_TORCH_LIBRARY(pyeff_cuda, m) {
  m.def("built_architectures() -> str");
  m.def("why_not(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cuda, CompositeExplicitAutograd, m) {
  m.impl("built_architectures", TORCH_BOX(&built_architectures));
  m.impl("why_not", TORCH_BOX(&why_not));
}

}  // namespace
}  // namespace pyeff
