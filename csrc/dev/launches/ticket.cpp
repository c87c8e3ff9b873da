// What the ticket's CUDA kernels are launched with, for the resource report; see read.cpp.
#include <initializer_list>

#include "cuda/launch.cuh"
#include "cuda/ticket_resident.cuh"
#include "cuda/ticket_vector.cuh"
#include "cuda/ticket_wgmma.cuh"
#include "dev/launches/line.h"

namespace {

using namespace pyeff::gpu;

template <class T, int N>
void tiles(const char* type) {
  const char* matrix = sizeof(T) == 2 ? "mma.sync" : "none";
  line(kThreads, TicketTile<T, N>::kShared, 0, matrix, "ticket_product<%s, *, %d>", type, N);
  line(kThreads, TicketOuterTile<T, N>::kShared, 0, matrix, "ticket_outer<%s, %d>", type, N);
}

// With the rows that take the most shared memory.
template <int N>
void resident() {
  int most = 0;
  for (int64_t width = 64; TicketResident<N>::groups(width, kSharedHopper) > 0; width += 64) {
    const int shared = TicketResident<N>::shared(width, TicketResident<N>::groups(width, kSharedHopper));
    most = shared > most ? shared : most;
  }
  line(TicketResident<N>::kThreads, most, kWgmmaArch, "wgmma", "ticket_resident<*, %d>", N);
}

}  // namespace

int main() {
  tiles<float, 32>("float");
  tiles<float, 64>("float");
  for (const char* type : {"bf16", "f16"}) {
    tiles<bf16, 64>(type);
    tiles<bf16, 128>(type);
  }
  line("ticket_product_wgmma<*, 128, 64>", kThreads, TicketWgmmaTile<128, 64>::kShared, kWgmmaArch, "wgmma");
  line("ticket_product_wgmma<*, 128, 128>", kThreads, TicketWgmmaTile<128, 128>::kShared, kWgmmaArch, "wgmma");
  line("ticket_product_wgmma<*, 256, 128>", kThreads, TicketWgmmaTile<256, 128>::kShared, kWgmmaArch, "wgmma");
  line("ticket_outer_wgmma<*, 64>", kThreads, TicketOuterWgmmaTile<64>::kShared, kWgmmaArch, "wgmma");
  line("ticket_outer_wgmma<*, 128>", kThreads, TicketOuterWgmmaTile<128>::kShared, kWgmmaArch, "wgmma");
  resident<16>();
  resident<32>();
  resident<64>();
  line("ticket_vector<*", kThreads, TicketVector::kShared);
  line("ticket_sum<*", kThreads, 0);
  line("ticket_gradient<*", kThreads, kGradientShared);
}
