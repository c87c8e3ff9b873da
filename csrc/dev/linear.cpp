// The shared matrix product and the dot products on NumPy arrays.
#include "cpu/linear.h"

#include <cstring>
#include <mutex>

#include "dev/arrays.h"
#include "dev/module.h"
#include "dev/probe.h"
#include "dev/threads.h"

namespace pyeff::dev {
namespace {

// y = x W^T + b, any number of times with one packed weight.
class Linear {
 public:
  Linear(const py::array& weight, const std::string& isa, int threads)
      : isa_(isa_named(isa)), number_(number_of(weight, "weight")), pool_(checked_threads(threads)) {
    if (weight.ndim() != 2 || weight.size() == 0) throw py::value_error("weight is not a matrix, or is empty");
    out_ = weight.shape(0), in_ = weight.shape(1);
    const void* data = checked(weight, number_, {out_, in_}, "weight");
    packed_.resize(static_cast<size_t>(PYEFF_ALL_OF(linear_packed_bytes).of[isa_](number_, out_, in_) + 63));
    py::gil_scoped_release released;
    PYEFF_ALL_OF(linear_pack).of[isa_](number_, out_, in_, data, packed(), pool_.parallel());
  }

  py::array operator()(const py::array& x, const MaybeArray& bias, const MaybeArray& into) {
    const py::ssize_t rows = x.ndim() == 2 ? x.shape(0) : 0;
    LinearProblem p{number_, rows, in_, out_, nullptr, in_, packed(), nullptr, nullptr};
    p.x = checked(x, number_, {rows, in_}, "x", true);
    p.bias = checked(bias, number_, {out_}, "bias");
    if (rows > 0) {
      if (in_ > 1 && stride_of(x, 1, "x") != 1) throw py::value_error("x's columns are not adjacent");
      p.x_stride = stride_of(x, 0, "x");
    }
    py::array y = into ? *into : fresh(number_, {rows, out_});
    checked(y, number_, {rows, out_}, "out");
    p.y = y.mutable_data();
    if (rows > 0) {
      py::gil_scoped_release released;
      std::lock_guard<std::mutex> lock(busy_);
      if (!PYEFF_ALL_OF(linear).of[isa_](p, pool_.parallel())) throw std::bad_alloc();
    }
    return y;
  }

 private:
  void* packed() {
    auto at = reinterpret_cast<uintptr_t>(packed_.data());
    return reinterpret_cast<void*>((at + 63) / 64 * 64);
  }
  const Isa isa_;
  const Number number_;
  std::mutex busy_;  // the pool runs one loop at a time, and Python may call from several threads
  Threads pool_;
  py::ssize_t out_ = 0, in_ = 0;
  std::vector<char> packed_;
};

// left [m, k] times the transpose of right [n, k], by dot products of rows; in the compute type.
py::array dot(const py::array& left, const py::array& right, const std::string& isa) {
  const Isa set = isa_named(isa);
  const Number number = number_of(right, "right");
  if (left.ndim() != 2 || right.ndim() != 2) throw py::value_error("left and right are not matrices");
  const py::ssize_t m = left.shape(0), n = right.shape(0), k = right.shape(1);
  const char* from = static_cast<const char*>(checked(left, number, {m, k}, "left"));
  const void* matrix = checked(right, number, {n, k}, "right", true);
  py::array out = fresh(compute_of(number), {m, n});
  if (m == 0 || n == 0) return out;
  if (k == 0) {
    std::memset(out.mutable_data(), 0, static_cast<size_t>(out.nbytes()));
    return out;
  }
  if (k > 1 && stride_of(right, 1, "right") != 1) throw py::value_error("right's columns are not adjacent");
  const int64_t stride = stride_of(right, 0, "right");
  const int64_t step = PYEFF_ALL_OF(dot_step).of[set](number), row = (k + step - 1) / step * step * size_of(number);
  std::vector<double> padded(static_cast<size_t>(m * row + 7) / 8);  // zero past k
  std::vector<const void*> rows;
  std::vector<void*> results, pointers(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) {
    char* to = reinterpret_cast<char*>(padded.data()) + i * row;
    std::memcpy(to, from + i * k * size_of(number), static_cast<size_t>(k * size_of(number)));
    rows.push_back(to);
    results.push_back(static_cast<char*>(out.mutable_data()) + i * n * size_of(compute_of(number)));
  }
  py::gil_scoped_release released;
  PYEFF_ALL_OF(dot_products).of[set](number, rows.data(), m, matrix, stride, n, k, results.data(), pointers.data());
  return out;
}

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<Linear>(m, "Linear", "x W^T + b with a packed weight [out, in], in its dtype.")
      .def(py::init<const py::array&, const std::string&, int>(), py::arg("weight").noconvert(),
           py::arg("isa") = "portable", py::arg("threads") = 1)
      .def("__call__", &Linear::operator(), py::arg("x").noconvert(), py::arg("bias").noconvert() = py::none(),
           py::arg("out").noconvert() = py::none());
  m.def("dot", &dot, py::arg("left").noconvert(), py::arg("right").noconvert(), py::arg("isa") = "portable");
}

}  // namespace pyeff::dev
