// READ's kernels on NumPy arrays.
#include "cpu/read.h"

#include <map>
#include <mutex>

#include "dev/arrays.h"
#include "dev/module.h"
#include "dev/threads.h"

namespace pyeff::dev {
namespace {

template <class Option>
Option named(const std::string& value, const std::vector<std::string>& known, const char* name) {
  std::string expected;
  for (size_t i = 0; i < known.size(); ++i) {
    if (value == known[i]) return static_cast<Option>(i);
    expected += (i ? ", " : "") + known[i];
  }
  throw py::value_error(std::string(name) + " is '" + value + "', expected one of " + expected);
}

// One problem: the weights and options. The arrays of a call are checked against it; what the forward saves goes back
// into the backward by name.
class Read {
 public:
  using Saved = std::map<std::string, py::array>;

  Read(const py::array& w_ih, const py::array& w_hh, const MaybeArray& b_ih, const MaybeArray& b_hh,
       const MaybeArray& norm_weight, const MaybeArray& norm_bias, const std::string& cell, const std::string& norm,
       double eps, const std::string& reduce, const std::string& isa, int threads)
      : isa_(isa_named(isa)), pool_(checked_threads(threads)), kept_{w_ih, w_hh} {
    p_.number = number_of(w_ih, "w_ih");
    p_.cell = named<Cell>(cell, {"rnn", "gru", "lstm"}, "cell");
    p_.norm = named<Norm>(norm, {"rms", "layer", "none"}, "norm");
    p_.reduce = named<Reduce>(reduce, {"mean", "last"}, "reduce");
    p_.eps = eps;
    gates_ = p_.cell == Cell::rnn ? 1 : p_.cell == Cell::gru ? 3 : 4;
    if (w_ih.ndim() != 2 || w_hh.ndim() != 2 || w_ih.size() == 0 || w_hh.size() == 0)
      throw py::value_error("w_ih or w_hh is not a matrix, or is empty");
    p_.width = w_ih.shape(1), p_.rank = w_hh.shape(1);
    const py::ssize_t rows = gates_ * p_.rank;
    if (norm_weight && p_.norm == Norm::none) throw py::value_error("norm_weight was given with norm 'none'");
    if (norm_bias && p_.norm != Norm::layer) throw py::value_error("norm_bias was given without norm 'layer'");
    p_.w_ih = checked(w_ih, p_.number, {rows, p_.width}, "w_ih");
    p_.w_hh = checked(w_hh, p_.number, {rows, p_.rank}, "w_hh");
    p_.b_ih = checked(b_ih, p_.number, {rows}, "b_ih");
    p_.b_hh = checked(b_hh, p_.number, {rows}, "b_hh");
    p_.norm_weight = checked(norm_weight, p_.number, {p_.width}, "norm_weight");
    p_.norm_bias = checked(norm_bias, p_.number, {p_.width}, "norm_bias");
    for (const MaybeArray& a : {b_ih, b_hh, norm_weight, norm_bias})
      if (a) kept_.push_back(*a);
  }

  Saved forward(const std::vector<py::array>& phi, const MaybeArray& h0, const MaybeArray& c0, bool save,
                bool save_gates) {
    Call call = start(phi, h0, c0);
    const ReadProblem& p = call.problem;
    const bool lstm = p.cell == Cell::lstm;
    const std::vector<py::ssize_t> state{p.tokens, p.rank}, states{p.layers, p.tokens, p.rank};
    Saved found;
    ReadForward f{};
    auto add = [&](const char* name, Number number, const std::vector<py::ssize_t>& shape) {
      return found.emplace(name, fresh(number, shape)).first->second.mutable_data();
    };
    f.out = add("out", p.number, state);
    if (lstm) f.c_last = add("c_last", p.number, state);
    if (save) f.h = add("h", p.number, states);
    if (save && lstm) f.c = add("c", p.number, states);
    if (save_gates && p.cell != Cell::rnn) f.gates = add("gates", p.number, {p.layers, p.tokens, 4 * p.rank});
    if (save && kinds()) f.stats = add("stats", compute_of(p.number), {kinds(), p.layers, p.tokens});
    if (p.tokens > 0) {
      py::gil_scoped_release released;
      std::lock_guard<std::mutex> lock(busy_);
      if (!PYEFF_ALL_OF(read_forward).of[isa_](p, f, pool_.parallel())) throw std::bad_alloc();
    }
    return found;
  }

  // The gradients that are named in `wanted`: dphi (of all layers), dw_ih, dw_hh, db_ih, db_hh, dnorm_weight,
  // dnorm_bias, dh0, dc0.
  Saved backward(const std::vector<py::array>& phi, const Saved& saved, const MaybeArray& grad_out,
                 const MaybeArray& grad_c, const MaybeArray& h0, const MaybeArray& c0,
                 const std::vector<std::string>& wanted) {
    Call call = start(phi, h0, c0);
    const ReadProblem& p = call.problem;
    const bool lstm = p.cell == Cell::lstm;
    const py::ssize_t rows = gates_ * p.rank;
    const std::vector<py::ssize_t> state{p.tokens, p.rank}, states{p.layers, p.tokens, p.rank};
    if (p.tokens == 0) throw py::value_error("there are no tokens");
    if (grad_c && !lstm) throw py::value_error("grad_c was given without an lstm");
    ReadBackward b{};
    b.grad_out = checked(grad_out, p.number, state, "grad_out");
    b.grad_c = checked(grad_c, p.number, state, "grad_c");
    auto take = [&](const char* name, Number number, const std::vector<py::ssize_t>& shape,
                    bool needed) -> const void* {
      auto at = saved.find(name);
      if (at != saved.end()) return checked(at->second, number, shape, name);
      if (needed) throw py::value_error(std::string(name) + " was not saved");
      return nullptr;
    };
    b.h = take("h", p.number, states, true);
    b.c = lstm ? take("c", p.number, states, true) : nullptr;
    b.gates = p.cell == Cell::rnn ? nullptr : take("gates", p.number, {p.layers, p.tokens, 4 * p.rank}, false);
    b.stats = kinds() ? take("stats", compute_of(p.number), {kinds(), p.layers, p.tokens}, true) : nullptr;

    const std::vector<std::pair<std::string, std::vector<py::ssize_t>>> shapes{{"dphi", {p.layers, p.tokens, p.width}},
                                                                               {"dw_ih", {rows, p.width}},
                                                                               {"dw_hh", {rows, p.rank}},
                                                                               {"db_ih", {rows}},
                                                                               {"db_hh", {rows}},
                                                                               {"dnorm_weight", {p.width}},
                                                                               {"dnorm_bias", {p.width}},
                                                                               {"dh0", state},
                                                                               {"dc0", state}};
    void* pointers[9] = {};
    Saved found;
    for (const std::string& name : wanted) {
      size_t i = 0;
      while (i < shapes.size() && shapes[i].first != name) ++i;
      if (i == shapes.size() || (name == "dc0" && !lstm)) throw py::value_error("there is no gradient '" + name + "'");
      pointers[i] = found.emplace(name, fresh(p.number, shapes[i].second)).first->second.mutable_data();
    }
    std::vector<void*> dphi(static_cast<size_t>(p.layers));
    for (int64_t i = 0; i < p.layers && pointers[0]; ++i)
      dphi[static_cast<size_t>(i)] = static_cast<char*>(pointers[0]) + i * p.tokens * p.width * size_of(p.number);
    b.dphi = dphi.data();
    b.dw_ih = pointers[1], b.dw_hh = pointers[2], b.db_ih = pointers[3], b.db_hh = pointers[4];
    b.dnorm_weight = pointers[5], b.dnorm_bias = pointers[6], b.dh0 = pointers[7], b.dc0 = pointers[8];
    py::gil_scoped_release released;
    std::lock_guard<std::mutex> lock(busy_);
    if (!PYEFF_ALL_OF(read_backward).of[isa_](p, b, pool_.parallel())) throw std::bad_alloc();
    return found;
  }

 private:
  struct Call {
    ReadProblem problem;
    std::vector<ReadRows> rows;
  };

  py::ssize_t kinds() const { return p_.norm == Norm::none ? 0 : p_.norm == Norm::rms ? 1 : 2; }

  // phi: [.., width] each, of one shape, dtype and any strides.
  Call start(const std::vector<py::array>& phi, const MaybeArray& h0, const MaybeArray& c0) const {
    Call call{p_, {}};
    ReadProblem& p = call.problem;
    if (phi.empty()) throw py::value_error("phi is empty");
    p.layers = static_cast<int64_t>(phi.size());
    const py::array& first = phi[0];
    p.phi_number = number_of(first, "phi");
    if (p.phi_number != p.number && !(p.number == Number::bf16 && p.phi_number == Number::f32))
      throw py::value_error("phi differs in dtype from the weights; only float32 beside bfloat16 may");
    const std::vector<py::ssize_t> shape(first.shape(), first.shape() + first.ndim());
    if (shape.size() < 2 || shape.size() > ReadRows::kMaxDims + 1 || shape.back() != p.width)
      throw py::value_error("phi has shape " + text_of(shape) + ", expected 1 to 8 dimensions before " +
                            std::to_string(p.width));
    p.tokens = static_cast<int64_t>(first.size()) / p.width;
    for (const py::array& layer : phi) {
      ReadRows rows{};
      rows.data = checked(layer, p.phi_number, shape, "phi", true);
      rows.dims = static_cast<int>(shape.size()) - 1;
      for (int i = 0; i < rows.dims; ++i) rows.size[i] = shape[i], rows.stride[i] = stride_of(layer, i, "phi");
      rows.inner = stride_of(layer, rows.dims, "phi");
      call.rows.push_back(rows);
    }
    p.phi = call.rows.data();  // moving a vector keeps its elements in place
    if (c0 && p.cell != Cell::lstm) throw py::value_error("c0 was given without an lstm");
    p.h0 = checked(h0, p.number, {p.tokens, p.rank}, "h0");
    p.c0 = checked(c0, p.number, {p.tokens, p.rank}, "c0");
    return call;
  }

  const Isa isa_;
  std::mutex busy_;  // the pool runs one loop at a time, and Python may call from several threads
  Threads pool_;
  ReadProblem p_{};
  int64_t gates_ = 0;
  std::vector<py::array> kept_;  // whose memory p_ points to
};

}  // namespace

void bind_read(py::module_& m) {
  const auto none = py::none();
  py::class_<Read>(m, "Read", "READ's recurrence with given weights.")
      .def(py::init<const py::array&, const py::array&, const MaybeArray&, const MaybeArray&, const MaybeArray&,
                    const MaybeArray&, const std::string&, const std::string&, double, const std::string&,
                    const std::string&, int>(),
           py::arg("w_ih").noconvert(), py::arg("w_hh").noconvert(), py::arg("b_ih").noconvert() = none,
           py::arg("b_hh").noconvert() = none, py::arg("norm_weight").noconvert() = none,
           py::arg("norm_bias").noconvert() = none, py::arg("cell") = "gru", py::arg("norm") = "rms",
           py::arg("eps") = 1e-6, py::arg("reduce") = "mean", py::arg("isa") = "portable", py::arg("threads") = 1)
      .def("forward", &Read::forward, py::arg("phi"), py::arg("h0").noconvert() = none,
           py::arg("c0").noconvert() = none, py::arg("save") = false, py::arg("save_gates") = false)
      .def("backward", &Read::backward, py::arg("phi"), py::arg("saved"), py::arg("grad_out").noconvert() = none,
           py::arg("grad_c").noconvert() = none, py::arg("h0").noconvert() = none, py::arg("c0").noconvert() = none,
           py::arg("wanted"));
}

}  // namespace pyeff::dev
