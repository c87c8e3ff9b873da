// The ticket's forward on the GPU.
#include "cuda/ticket.h"

#include "cuda/ticket_launch.cuh"

namespace pyeff::gpu {

const char* ticket_forward(const TicketProblem& p, const TicketForward& f, const Machine& machine, void* stream) {
  Launches launches(stream);
  with_number(p.number, [&](auto number) {
    using T = decltype(number);
    TicketProductParams params = ticket_params<T, false>(p, p.x, p.x_stride, f.y);
    params.bias = f.bias, params.kept = f.z, params.activation = p.activation;
    run_ticket_product<T, false>(params, machine, launches);
  });
  return launches.error;
}

}  // namespace pyeff::gpu
