// What READ's CUDA kernels are launched with, for the resource report: a line each of name pattern, threads of a block,
// bytes of dynamic shared memory, the one architecture (0: all) that launches it, and the matrix instruction that must
// be in it ("none": none may be). The compiler's reports know none of it. Built by any C++ compiler, over the emulated
// half of the portable layer; nothing is launched.
#include <cstdio>
#include <initializer_list>

#include "cuda/read_dphi.cuh"
#include "cuda/read_norm.cuh"
#include "cuda/read_outer_wgmma.cuh"
#include "cuda/read_project_wgmma.cuh"
#include "cuda/read_resident.cuh"
#include "cuda/read_reverse.cuh"

namespace {

using namespace pyeff;
using namespace pyeff::gpu;

constexpr int kWgmma = 90, kLargestResidentRank = 256;

void line(const char* name, int threads, int shared, int arch = 0, const char* matrix = "none") {
  std::printf("%s\t%d\t%d\t%d\t%s\n", name, threads, shared, arch, matrix);
}

template <class... Parts>
void line(int threads, int shared, int arch, const char* matrix, const char* form, Parts... parts) {
  char name[64];
  std::snprintf(name, sizeof name, form, parts...);
  line(name, threads, shared, arch, matrix);
}

template <class T, Cell C>
void cell(const char* type, const char* matrix) {
  const int number = static_cast<int>(C);
  line(kThreads, RecurTile<C>::kShared, 0, matrix, "read_recur<%s, Cell %d>", type, number);
  if (sizeof(T) == 2) {
    line(ResidentTile<C>::kThreads, ResidentTile<C>::shared(kLargestResidentRank), kWgmma, "wgmma",
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
  line("read_project_wgmma<*", kThreads, ProjectWgmmaTile::kShared, kWgmma, "wgmma");
  line("read_outer_wgmma<*", kThreads, OuterWgmmaTile::kShared, kWgmma, "wgmma");
  line("read_fold<*", 128, 16);
  for (const char* name : {"read_stats<*", "read_norm_backward<*", "read_norm_grads<*", "read_finish<*"})
    line(name, kThreads, 0);
}
