// pyeff_dev: the kernels on NumPy arrays, without torch and its dispatcher, for unit tests and microbenchmarks.
// Every function takes the instruction set by name, so that all that were built are tested on one machine.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/roofline.h"
#include "dev/module.h"
#include "dev/threads.h"

namespace py = pybind11;

namespace pyeff::dev {

Isa isa_named(const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name != isa_name(i)) continue;
    if (isa_built() & isa_detected() & (1u << i)) return static_cast<Isa>(i);
    throw py::value_error("the instruction set '" + name + "' was not built or is not in this processor");
  }
  throw py::value_error("isa is '" + name + "', expected portable, avx2, avx512 or avx512bf16");
}

int checked_threads(int threads) {
  if (threads >= 1) return threads;
  throw py::value_error("threads is " + std::to_string(threads) + ", expected at least 1");
}

namespace {

std::vector<std::string> names(unsigned sets) {
  std::vector<std::string> found;
  for (int i = 0; i < kIsaCount; ++i) {
    if (sets >> i & 1u) found.push_back(isa_name(i));
  }
  return found;
}

double run_fma_loop(const std::string& dtype, int64_t iterations, const std::string& isa, int threads) {
  const char* known[] = {"float64", "float32", "bfloat16"};
  for (int i = 0; i < 3; ++i) {
    if (dtype != known[i]) continue;
    auto loop = PYEFF_ALL_OF(fma_loop).of[isa_named(isa)];
    Threads pool(checked_threads(threads));
    py::gil_scoped_release released;
    return loop(static_cast<FmaType>(i), iterations, pool.parallel());
  }
  throw py::value_error("dtype is '" + dtype + "', expected float64, float32 or bfloat16");
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;

void run_stream_copy(Bytes to, const Bytes& from, const std::string& isa, int threads) {
  if (to.size() != from.size()) throw py::value_error("dst and src differ in size");
  auto copy = PYEFF_ALL_OF(stream_copy).of[isa_named(isa)];
  Threads pool(checked_threads(threads));
  uint8_t* target = to.mutable_data();
  const uint8_t* source = from.data();
  py::gil_scoped_release released;
  copy(target, source, from.size(), pool.parallel());
}

uint64_t run_stream_read(const Bytes& from, const std::string& isa, int threads) {
  auto read = PYEFF_ALL_OF(stream_read).of[isa_named(isa)];
  Threads pool(checked_threads(threads));
  const uint8_t* source = from.data();
  py::gil_scoped_release released;
  return read(source, from.size(), pool.parallel());
}

}  // namespace

PYBIND11_MODULE(pyeff_dev, m) {
  m.doc() = "The CPU kernels on NumPy arrays; not part of the installed package.";
  m.def("isa_built", [] { return names(isa_built()); });
  m.def("isa_usable", [] { return names(isa_built() & isa_detected()); });
  m.def("fma_loop", &run_fma_loop, py::arg("dtype"), py::arg("iterations"), py::arg("isa") = "portable",
        py::arg("threads") = 1);
  m.def("stream_copy", &run_stream_copy, py::arg("dst").noconvert(), py::arg("src").noconvert(),
        py::arg("isa") = "portable", py::arg("threads") = 1);
  m.def("stream_read", &run_stream_read, py::arg("src").noconvert(), py::arg("isa") = "portable",
        py::arg("threads") = 1);
  bind_linear(m);
  bind_read(m);
}

}  // namespace pyeff::dev
