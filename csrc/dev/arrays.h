// NumPy arrays as the kernels take them. bfloat16 travels as uint16, the upper half of a float32.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu/number.h"

namespace pyeff::dev {

namespace py = pybind11;
using MaybeArray = std::optional<py::array>;

inline Number number_of(const py::array& a, const char* name) {
  if (py::isinstance<py::array_t<double>>(a)) return Number::f64;
  if (py::isinstance<py::array_t<float>>(a)) return Number::f32;
  if (py::isinstance<py::array_t<uint16_t>>(a)) return Number::bf16;
  throw py::value_error(std::string(name) + " is " + std::string(py::str(py::object(a.dtype()))) +
                        ", expected float64, float32 or uint16 (bfloat16)");
}
inline Number compute_of(Number number) { return number == Number::f64 ? Number::f64 : Number::f32; }
inline int64_t size_of(Number number) { return number == Number::f64 ? 8 : number == Number::f32 ? 4 : 2; }

inline std::string text_of(const std::vector<py::ssize_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// The data of an argument that must have this number type and shape and, unless it may be strided, be C-contiguous.
inline const void* checked(const py::array& a, Number number, const std::vector<py::ssize_t>& shape, const char* name,
                           bool strided = false) {
  const std::vector<py::ssize_t> found(a.shape(), a.shape() + a.ndim());
  if (found != shape)
    throw py::value_error(std::string(name) + " has shape " + text_of(found) + ", expected " + text_of(shape));
  if (number_of(a, name) != number) throw py::value_error(std::string(name) + " has another dtype than expected");
  if (!strided && !(a.flags() & py::array::c_style)) throw py::value_error(std::string(name) + " is not contiguous");
  if (reinterpret_cast<uintptr_t>(a.data()) % size_of(number))
    throw py::value_error(std::string(name) + " is not aligned to its numbers");
  return a.data();
}
inline const void* checked(const MaybeArray& a, Number number, const std::vector<py::ssize_t>& shape,
                           const char* name) {
  return a ? checked(*a, number, shape, name) : nullptr;
}

// A stride in elements.
inline int64_t stride_of(const py::array& a, int dim, const char* name) {
  if (a.strides(dim) % a.itemsize())
    throw py::value_error(std::string(name) + " has a stride that is not a whole number of elements");
  return a.strides(dim) / a.itemsize();
}

// A new array, NaN all over: what a kernel leaves out shows.
inline py::array fresh(Number number, const std::vector<py::ssize_t>& shape) {
  const char* types[] = {"float64", "float32", "uint16"};
  py::array a(py::dtype(types[static_cast<int>(number)]), shape);
  std::memset(a.mutable_data(), 0xff, static_cast<size_t>(a.nbytes()));
  return a;
}

}  // namespace pyeff::dev
