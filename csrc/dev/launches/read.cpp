// What READ's CUDA kernels are launched with, for the resource report. Built by any C++ compiler, over the emulated
// half of the portable layer; nothing is launched.
#include <initializer_list>

#include "cuda/read_dphi.cuh"
#include "cuda/read_norm.cuh"
#include "cuda/read_outer_wgmma.cuh"
#include "cuda/read_project_wgmma.cuh"
#include "cuda/read_resident.cuh"
#include "cuda/read_reverse.cuh"
#include "dev/launches/line.h"

namespace {

using namespace pyeff;
using namespace pyeff::gpu;

constexpr int kLargestResidentRank = 256;

template <class T, Cell C>
void cell(const char* type, const char* matrix) {
  const int number = static_cast<int>(C);
  line(kThreads, RecurTile<C>::kShared, 0, matrix, "read_recur<%s, Cell %d>", type, number);
  if (sizeof(T) == 2) {
    line(ResidentTile<C>::kThreads, ResidentTile<C>::shared(kLargestResidentRank), kWgmmaArch, "wgmma",
         "read_resident<%s, Cell %d>", type, number);
  }
}

template <class T>
void products(const char* type) {
  const char* matrix = sizeof(T) == 2 ? "mma.sync" : "none";
  line(kThreads, ProjectTile<T>::kShared, 0, matrix, "read_project<%s, *", type);
  line(kThreads, OuterTile<T>::kShared, 0, matrix, "read_outer<%s, *", type);
  line(kThreads, DphiTile<T>::kShared, 0, matrix, "read_dphi<%s>", type);
  line(kThreads, ReverseTile<T>::kShared, 0, matrix, "read_reverse<%s, *", type);
  cell<T, Cell::rnn>(type, matrix);
  cell<T, Cell::gru>(type, matrix);
  cell<T, Cell::lstm>(type, matrix);
}

}  // namespace

int main() {
  products<float>("float");
  products<bf16>("bf16");
  products<f16>("f16");
  line("read_project_wgmma<*", kThreads, ProjectWgmmaTile::kShared, kWgmmaArch, "wgmma");
  line("read_outer_wgmma<*", kThreads, OuterWgmmaTile::kShared, kWgmmaArch, "wgmma");
  line("read_fold<*", 128, 16);
  for (const char* name : {"read_stats<*", "read_norm_backward<*", "read_norm_grads<*", "read_finish<*"})
    line(name, kThreads, 0);
}
