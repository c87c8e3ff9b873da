// Calls of the ticket's CPU kernels with inputs of every kind, and what they must give, in double precision.
#pragma once

#include "cpu/ticket.h"
#include "support.h"

namespace check {

using pyeff::Activation;

struct TicketSizes {
  int64_t tokens, in, out, bo, bi;
};

struct TicketOptions {
  Activation activation = Activation::none;
  bool bias = true;
  bool strided = false;  // x and grad lie within wider rows
  double density = 0.5;
};

// Numbers in double and how far a kernel may be from each.
struct Near {
  std::vector<double> value, bound;
  void add(double v, double b) { value.push_back(v), bound.push_back(b); }
  // Prints the first that is too far away and ends the test.
  void check(const char* what, const Output& found, const std::string& where) const;
};

struct TicketTruth {
  Near y, z, dx, dvalues, dbias;
};

struct TicketGradients {
  Output dx, dvalues, dbias;
  bool same(const TicketGradients& other) const {
    return dx.same(other.dx) && dvalues.same(other.dvalues) && dbias.same(other.dbias);
  }
};

class TicketCall {
 public:
  // What plays no part is NaN: values past the end of the weight, x where no block selects it, memory between rows.
  TicketCall(Number number, const TicketSizes& sizes, const TicketOptions& options, uint64_t seed);

  TicketTruth truth() const;
  pyeff::TicketProblem problem() const;
  // y, and z where it is kept.
  std::pair<Output, Output> forward(int isa, const pyeff::Parallel& parallel, bool keep) const;
  enum Wanted { dx = 1, dvalues = 2, dbias = 4, everything = 7 };
  TicketGradients backward(int isa, const pyeff::Parallel& parallel, int wanted = everything) const;
  std::string name() const;

  const Number number;
  const TicketSizes sizes;
  const TicketOptions options;
  int64_t rows, columns, nnz = 0;
  std::vector<int32_t> index;
  int64_t x_stride, grad_stride;
  Input x, values, bias, grad, saved;

 private:
  double act_derivative(int64_t n, int64_t o) const;
  bool inside(int64_t row, int64_t column, int64_t i, int64_t j) const {
    return row * sizes.bo + i < sizes.out && column * sizes.bi + j < sizes.in;
  }
  std::vector<std::vector<int32_t>> living_;  // [rows] of columns
};

// The index of living blocks, given by row.
std::vector<int32_t> ticket_index(const std::vector<std::vector<int32_t>>& living, int64_t columns);

}  // namespace check
