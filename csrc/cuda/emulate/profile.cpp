#include <cstdlib>
#include <string>

#include "cuda/machine.h"

namespace pyeff::gpu {

Machine emulated_machine() {
  Machine machine;
  // Few processors: as many partial sums of a long product are made, and each takes its time here.
  machine.processors = 2;
  if (const char* arch = std::getenv("PYEFF_EMULATE_ARCH")) machine.wgmma = std::string(arch) == "90";
  if (const char* bytes = std::getenv("PYEFF_EMULATE_SCRATCH")) machine.scratch_limit = std::atoll(bytes);
  return machine;
}

}  // namespace pyeff::gpu
