// What a kernel's host side knows of the device that it runs on.
#pragma once

#include <cstdint>

namespace pyeff::gpu {

struct Machine {
  int processors = 132;                      // multiprocessors: the long products are split so that each has work
  bool wgmma = true;                         // sm_90a: matrix tiles of a warpgroup, and clusters
  int64_t scratch_limit = int64_t{1} << 30;  // bytes of scratch that grow with the tokens; more are served in turns
};

// The machine that the emulation plays: sm_90a, or by PYEFF_EMULATE_ARCH=80 a processor without its matrix tiles.
// PYEFF_EMULATE_SCRATCH lowers the scratch (bytes), so that few tokens take several turns.
Machine emulated_machine();

}  // namespace pyeff::gpu
