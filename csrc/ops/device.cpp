// The namespace pyeff_cuda: what the CUDA side of the library was built for. It is there in a build without CUDA too.
#include <torch/csrc/stable/library.h>

#include <dlfcn.h>

#include <string>

#include "cuda/device.h"
#include "ops/gpu.h"

namespace pyeff {
namespace {

#if defined(PYEFF_CUDA)
std::string built_architectures() { return cuda::built_architectures(); }
std::string why_not(int64_t device) { return cuda::why_not(static_cast<int>(device)); }
#else
std::string built_architectures() { return ""; }
std::string why_not(int64_t) { return "the compiled library has no CUDA code (no nvcc when pyeff was built)"; }
#endif

#define PYEFF_READ_PROBLEM                                                                                       \
  "Tensor[] phi, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? norm_weight, Tensor? norm_bias, " \
  "Tensor? h0, Tensor? c0"

// The schemas of the kernels are here whether they were built or not: their emulation is registered for them, too.
STABLE_TORCH_LIBRARY(pyeff_cuda, m) {
  m.def("read_forward(" PYEFF_READ_PROBLEM
        ", int cell, int norm, float eps, int reduce, Tensor(a!) out, Tensor(b!) c_last, Tensor(c!) h, Tensor(d!) c, "
        "Tensor(e!) gates, Tensor(f!) stats) -> ()");
  m.def("read_backward(Tensor? grad_out, Tensor? grad_c, " PYEFF_READ_PROBLEM
        ", Tensor h, Tensor c, Tensor gates, Tensor stats, int cell, int norm, float eps, int reduce, "
        "Tensor(a!)[] dphi, Tensor(b!) dw_ih, Tensor(c!) dw_hh, Tensor(d!) db_ih, Tensor(e!) db_hh, "
        "Tensor(f!) dnorm_weight, Tensor(g!) dnorm_bias, Tensor(h!) dh0, Tensor(i!) dc0) -> ()");
  m.def(
      "ticket_forward(Tensor x, Tensor values, Tensor index, Tensor? bias, int activation, Tensor(a!) y, Tensor(b!) z) "
      "-> ()");
  m.def(
      "ticket_backward(Tensor grad, Tensor x, Tensor values, Tensor index, Tensor saved, int activation, "
      "Tensor(a!) dx, Tensor(b!) dvalues, Tensor(c!) dbias) -> ()");
  m.def("built_architectures() -> str");
  m.def("why_not(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cuda, CompositeExplicitAutograd, m) {
  m.impl("built_architectures", TORCH_BOX(&built_architectures));
  m.impl("why_not", TORCH_BOX(&why_not));
}

}  // namespace

#if defined(PYEFF_CUDA)
void* current_stream(int device) {
  // A torch without CUDA does not have this function, so the library must not ask the linker for it; and torch's CUDA
  // library is not among the names that are visible to all, so it is asked itself.
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get && get(device, &stream) == 0, "torch does not tell its current CUDA stream");
  return stream;
}
#endif
}  // namespace pyeff
