// The ticket's kernels for the dispatcher. The caller, pyeff/ops/ticket.py, has checked the arguments of its user and
// allocated the outputs; what is checked here is that no kernel can be led outside of its tensors, by the index, too.
#include "cpu/ticket.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "ops/checked.h"
#include "ops/number.h"
#include "ops/parallel.h"

namespace pyeff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Checks what both directions are given, and knows the sizes.
struct TicketArguments {
  TicketProblem problem{};
  Checked checked;

  TicketArguments(const Tensor& x, const Tensor& values, const Tensor& index, int64_t out, int64_t activation) {
    STD_TORCH_CHECK(0 <= activation && activation <= 2, "activation is ", activation, ", expected 0, 1 or 2");
    STD_TORCH_CHECK(values.dim() == 3 && values.sizes()[1] > 0 && values.sizes()[2] > 0,
                    "values is not [nnz, bo, bi] with blocks that hold something");
    TicketProblem& p = problem;
    p.number = number_of(values, "values");
    checked.type = values.scalar_type();
    p.activation = static_cast<Activation>(activation);
    p.nnz = values.sizes()[0], p.bo = values.sizes()[1], p.bi = values.sizes()[2];
    p.values = checked.read(values, values.numel(), "values");
    STD_TORCH_CHECK(x.dim() == 2 && x.sizes()[0] > 0 && x.sizes()[1] > 0, "x is not a matrix, or is empty");
    p.tokens = x.sizes()[0], p.in = x.sizes()[1], p.out = out;
    p.x = rows(x, p.in, &p.x_stride, "x");
    STD_TORCH_CHECK(p.out > 0, "the output has no columns");
    const int64_t grid_rows = (p.out - 1) / p.bo + 1, grid_columns = (p.in - 1) / p.bi + 1;
    p.index = static_cast<const int32_t*>(
        checked.read(index, 2 * (grid_rows + grid_columns + 1) + 3 * p.nnz, ScalarType::Int, "index"));
    const char* error = PYEFF_CHOSEN(ticket_index_error)(p);
    STD_TORCH_CHECK(!error, "index is not that of a ticket of ", grid_rows, " x ", grid_columns, " blocks: ", error);
  }

  // A matrix [tokens, width] whose rows are contiguous, and from each row to the next as many elements as it likes.
  const void* rows(const Tensor& t, int64_t width, int64_t* stride, const char* name) const {
    STD_TORCH_CHECK(checked.here(t) && t.scalar_type() == checked.type, name,
                    " is not on the CPU, or has another dtype than values");
    STD_TORCH_CHECK(t.dim() == 2 && t.sizes()[0] == problem.tokens && t.sizes()[1] == width, name, " is not [",
                    problem.tokens, ", ", width, "]");
    STD_TORCH_CHECK(width == 1 || t.strides()[1] == 1, name, " has rows that are not contiguous");
    *stride = t.strides()[0];
    return t.const_data_ptr();
  }
};

void forward(Tensor x, Tensor values, Tensor index, MaybeTensor bias, int64_t activation, Tensor y, Tensor z) {
  STD_TORCH_CHECK(y.dim() == 2, "y is not a matrix");
  const int64_t out = y.sizes()[1];
  const TicketArguments a(x, values, index, out, activation);
  const TicketProblem& p = a.problem;
  TicketForward result{};
  result.bias = a.checked.read(bias, out, "bias");
  result.y = a.checked.write(y, p.tokens * out, "y");
  result.z = a.checked.write(z, p.tokens * out, "z");
  STD_TORCH_CHECK(result.y, "y is empty");
  STD_TORCH_CHECK(PYEFF_CHOSEN(ticket_forward)(p, result, torch_parallel()), "ticket_forward: out of memory");
}

void backward(Tensor grad, Tensor x, Tensor values, Tensor index, Tensor saved, int64_t activation, Tensor dx,
              Tensor dvalues, Tensor dbias) {
  STD_TORCH_CHECK(grad.dim() == 2, "grad is not a matrix");
  const int64_t out = grad.sizes()[1];
  const TicketArguments a(x, values, index, out, activation);
  const TicketProblem& p = a.problem;
  TicketBackward result{};
  result.grad = a.rows(grad, out, &result.grad_stride, "grad");
  if (p.activation != Activation::none) result.saved = a.checked.read(saved, p.tokens * out, "saved");
  result.dx = a.checked.write(dx, p.tokens * p.in, "dx");
  result.dvalues = a.checked.write(dvalues, p.nnz * p.bo * p.bi, "dvalues");
  result.dbias = a.checked.write(dbias, out, "dbias");
  STD_TORCH_CHECK(PYEFF_CHOSEN(ticket_backward)(p, result, torch_parallel()), "ticket_backward: out of memory");
}

STABLE_TORCH_LIBRARY_FRAGMENT(pyeff_cpu, m) {
  m.def(
      "ticket_forward(Tensor x, Tensor values, Tensor index, Tensor? bias, int activation, Tensor(a!) y, "
      "Tensor(b!) z) -> ()");
  m.def(
      "ticket_backward(Tensor grad, Tensor x, Tensor values, Tensor index, Tensor saved, int activation, "
      "Tensor(a!) dx, Tensor(b!) dvalues, Tensor(c!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyeff_cpu, CPU, m) {
  m.impl("ticket_forward", TORCH_BOX(&forward));
  m.impl("ticket_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace pyeff
