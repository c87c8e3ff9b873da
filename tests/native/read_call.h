// A call of READ's CPU kernels.
#pragma once

#include "cpu/parallel.h"
#include "read_inputs.h"

namespace check {

class ReadCall : public ReadInputs {
 public:
  using ReadInputs::ReadInputs;

  ForwardOutputs forward(int isa, const pyeff::Parallel& parallel, bool save, bool save_gates) const;
  // Null gates are computed again.
  BackwardOutputs backward(int isa, const pyeff::Parallel& parallel, const ForwardOutputs& saved,
                           Wanted wanted = {}) const;

 private:
  pyeff::ReadProblem problem() const;
};

}  // namespace check
