// Gather, scatter and sums over masks on the GPU.
#include "cuda/multimask_move.cuh"
#include "cuda/scratch.h"

namespace pyeff::gpu {
namespace {

template <class T, bool Vector>
int units_of(int64_t width) {
  return static_cast<int>(div_up(width, int64_t{kMaskChunk<T, Vector>}));
}

// Sums over all rows have few outputs: the rows are split, so that every processor has blocks.
int64_t parts_of(const MultimaskSums& p, const Machine& machine) {
  if (!p.all) return 1;
  const int64_t chunk = 16 / size_of(p.sizes.number);
  const int64_t blocks = div_up(p.sizes.tokens * div_up(p.sizes.width, chunk), int64_t{kThreads});
  const int64_t wanted = div_up(int64_t{4} * machine.processors, blocks), most = div_up(p.sizes.rows(), int64_t{8});
  return wanted < most ? wanted : most;
}

int64_t outputs_of(const MultimaskSums& p) { return p.all ? 1 : p.sizes.batch; }

}  // namespace

const char* multimask_gather(const MultimaskGather& p, const Machine&, void* stream) {
  Launches launches(stream);
  const MultimaskSizes& s = p.sizes;
  const bool vector = vectors(p.x, s.width, size_of(s.number)) && vectors(p.out, s.width, size_of(s.number));
  with_chunks(s.number, vector, [&](auto type, auto by_vectors) {
    using T = decltype(type);
    constexpr bool Vector = decltype(by_vectors)::value;
    const int units = units_of<T, Vector>(s.width);
    const MultimaskGatherParams params{p.x,
                                       p.ids_keep,
                                       p.keep_len,
                                       p.out,
                                       s.rows(),
                                       s.slots,
                                       s.tokens,
                                       p.of_rows ? 1 : static_cast<int>(s.masks),
                                       static_cast<int>(s.width),
                                       units};
    launches.run("multimask_gather_kernel", multimask_gather_kernel<T, Vector>,
                 {MaskFlat<kGatherSeveral>::blocks(s.rows() * s.slots, units)}, kThreads, 0, params);
  });
  return launches.error;
}

const char* multimask_scatter(const MultimaskScatter& p, const Machine&, void* stream) {
  Launches launches(stream);
  const MultimaskSizes& s = p.sizes;
  const int64_t size = size_of(s.number);
  const bool vector = vectors(p.x, s.width, size) && vectors(p.fill, s.width, size) && vectors(p.out, s.width, size);
  with_chunks(s.number, vector, [&](auto type, auto by_vectors) {
    using T = decltype(type);
    constexpr bool Vector = decltype(by_vectors)::value;
    const int units = units_of<T, Vector>(s.width);
    const MultimaskScatterParams params{p.x,
                                        p.fill,
                                        p.inverse,
                                        p.lengths,
                                        p.seed,
                                        p.sample_ids,
                                        p.out,
                                        s.rows(),
                                        s.tokens,
                                        s.slots,
                                        static_cast<int>(s.masks),
                                        static_cast<int>(s.width),
                                        units,
                                        p.noise_std};
    launches.run("multimask_scatter_kernel", multimask_scatter_kernel<T, Vector>,
                 {MaskFlat<kScatterSeveral>::blocks(s.rows() * s.tokens, units)}, kThreads, 0, params);
  });
  return launches.error;
}

int64_t multimask_sums_scratch(const MultimaskSums& p, const Machine& machine) {
  const int64_t parts = parts_of(p, machine);
  return parts > 1 ? parts * outputs_of(p) * p.sizes.tokens * p.sizes.width * 4 : 0;
}

const char* multimask_sums(const MultimaskSums& p, void* scratch, const Machine& machine, void* stream) {
  Launches launches(stream);
  const MultimaskSizes& s = p.sizes;
  const int64_t parts = parts_of(p, machine), outputs = outputs_of(p), size = size_of(s.number);
  const bool vector = vectors(p.from, s.width, size) && vectors(p.to, s.width, size);
  with_chunks(s.number, vector, [&](auto type, auto by_vectors) {
    using T = decltype(type);
    constexpr bool Vector = decltype(by_vectors)::value;
    MultimaskSumsParams params{};
    params.from = p.from, params.inverse = p.inverse, params.lengths = p.lengths, params.to = p.to;
    params.partial = static_cast<float*>(scratch), params.outputs = outputs, params.tokens = s.tokens;
    params.slots = s.slots, params.share = p.all ? s.rows() : s.masks, params.masks = static_cast<int>(s.masks);
    params.width = static_cast<int>(s.width), params.units = units_of<T, Vector>(s.width);
    params.parts = static_cast<int>(parts), params.hidden = p.hidden;
    launches.run("multimask_sums_kernel", multimask_sums_kernel<T, Vector>,
                 {MaskFlat<1>::blocks(outputs * s.tokens, params.units), parts}, kThreads, 0, params);
    if (parts == 1) return;
    const int64_t count = outputs * s.tokens * s.width;
    const MultimaskPartsParams add{static_cast<const float*>(scratch), p.to, count, static_cast<int>(parts)};
    launches.run("multimask_parts_kernel", multimask_parts_kernel<T>, {div_up(count, int64_t{kThreads})}, kThreads, 0,
                 add);
  });
  return launches.error;
}

const char* multimask_rescale(const MultimaskRescale& p, const Machine&, void* stream) {
  Launches launches(stream);
  with_chunks(p.number, aligned_to(p.t, 16), [&](auto type, auto by_vectors) {
    using T = decltype(type);
    constexpr bool Vector = decltype(by_vectors)::value;
    const int64_t of_block = int64_t{kMaskChunk<T, Vector>} * kThreads * kRescaleSeveral;
    const MultimaskRescaleParams params{p.t, p.factor, p.count};
    launches.run("multimask_rescale_kernel", multimask_rescale_kernel<T, Vector>, {div_up(p.count, of_block)}, kThreads,
                 0, params);
  });
  return launches.error;
}

}  // namespace pyeff::gpu
