// Every instruction set that was built and that this processor has.
#pragma once

#include "cpu/isa.h"

template <class F>
void for_each_usable_isa(F&& body) {
  for (int isa = 0; isa < pyeff::kIsaCount; ++isa) {
    if (pyeff::isa_built() & pyeff::isa_detected() & (1u << isa)) body(isa);
  }
}
