// The norms over a whole batch: what is shared out among the threads. No sum depends on how.
#pragma once

#include "multimask_targets_batch.h"
#include "multimask_targets_slabs.h"

namespace pyeff {
namespace PYEFF_ISA {

// out (+)= weight * the sum of the normalised layers; `post` then normalises each token over its channels.
template <class T>
bool norm_forward(const NormCall<T>& call, bool post, bool accumulate, Compute<T>* out, bool streamed,
                  const Parallel& parallel) {
  using C = Compute<T>;
  const int64_t rows = call.batch * call.tokens, threads = larger(1, parallel.threads);
  const int64_t row_parts = smaller(threads, rows), row_room = ceil_div(call.width, 16) * 16;
  const InstanceNorm<T> instance(call);
  BatchStatistics<T> statistics(call, parallel);
  NormCall<C> second{MaskNorm::layer, call.eps, 1, call.batch, call.tokens, call.width, 1, call.lengths, nullptr};
  // A sample that one thread makes alone is still in its cache when its tokens are normalised.
  const bool alone = post && (call.batch % threads == 0 || call.batch >= 4 * threads);
  const int64_t items = alone ? call.batch : call.batch * instance.slabs(), parts = smaller(threads, items);

  typename InstanceNorm<T>::Room room{};
  C *row = nullptr, *sample = nullptr;
  auto place_own = [&](Arena& arena) {
    if (call.norm == MaskNorm::instance) {
      room.place(arena, call.tokens);
      sample = arena.take<C>(alone ? call.tokens * call.width : 0);
    }
    row = arena.take<C>(row_room);
  };
  Arena counter(nullptr), own(nullptr);
  if (call.norm == MaskNorm::batch) statistics.place(counter, false);
  place_own(own);
  const int64_t shared = counter.used + 64, each = own.used + 64;
  Scratch scratch(shared + 64 + threads * each);
  if (!scratch.block) return false;
  char* base = static_cast<char*>(scratch.block) + ceil_div(shared, 64) * 64;

  if (call.norm == MaskNorm::instance) {
    for_each_task(parallel, parts, [&](int64_t part) {
      Arena arena(base + part * each);
      typename InstanceNorm<T>::Room mine{};
      mine.place(arena, call.tokens);
      const PartOf range(items, part, parts);
      if (!alone) return instance.forward(mine, range, out, call.tokens * call.width, accumulate, streamed && !post);
      C* made = arena.take<C>(call.tokens * call.width);
      C* sum = arena.take<C>(row_room);
      for (int64_t b = range.begin; b < range.end; ++b) {
        const PartOf slabs(call.batch * instance.slabs(), b, call.batch);
        instance.forward(mine, slabs, made, 0, false, false);
        const MaskTensor<const C> layer{made, 0, call.width};
        NormCall<C> tokens = second;
        tokens.layers = &layer;
        norm_rows<C>(tokens, {}, false, false, out, streamed, sum, PartOf(rows, b, call.batch));
      }
    });
    if (!post || alone) return true;
    const MaskTensor<const C> layer{out, call.tokens * call.width, call.width};
    second.layers = &layer;
    return norm_forward<C>(second, false, false, out, streamed, parallel);
  }
  ChannelNorms<C> channels;
  if (call.norm == MaskNorm::batch) {
    Arena arena(scratch.block);
    statistics.place(arena, false);
    statistics.measure();
    channels = statistics.channels();
  }
  for_each_task(parallel, row_parts, [&](int64_t part) {
    Arena arena(base + part * each);
    norm_rows<T>(call, channels, post, accumulate, out, streamed, arena.take<C>(row_room),
                 PartOf(rows, part, row_parts));
  });
  return true;
}

// Each layer's gradient; a layer may be its own.
template <class T>
bool norm_backward(const NormCall<T>& call, const MaskTensor<const Compute<T>>& grad, T* const* dlayers, bool streamed,
                   const Parallel& parallel) {
  using C = Compute<T>;
  const int64_t rows = call.batch * call.tokens, threads = larger(1, parallel.threads);
  if (call.norm == MaskNorm::instance) {
    const InstanceNorm<T> instance(call);
    const int64_t items = call.batch * instance.slabs(), parts = smaller(threads, items);
    typename InstanceNorm<T>::Room room{};
    Arena own(nullptr);
    room.place(own, call.tokens);
    const int64_t each = own.used + 64;
    Scratch scratch(64 + parts * each);
    if (!scratch.block) return false;
    for_each_task(parallel, parts, [&](int64_t part) {
      Arena arena(static_cast<char*>(scratch.block) + part * each);
      typename InstanceNorm<T>::Room mine{};
      mine.place(arena, call.tokens);
      instance.backward(mine, PartOf(items, part, parts), grad, dlayers, streamed);
    });
    return true;
  }
  BatchStatistics<T> statistics(call, parallel);
  Arena counter(nullptr);
  if (call.norm == MaskNorm::batch) statistics.place(counter, true);
  Scratch scratch(counter.used + 64);
  if (!scratch.block) return false;
  ChannelNorms<C> channels;
  if (call.norm == MaskNorm::batch) {
    Arena arena(scratch.block);
    statistics.place(arena, true);
    statistics.measure();
    statistics.project(grad);
    channels = statistics.channels();
  }
  const int64_t parts = smaller(threads, rows);
  for_each_task(parallel, parts, [&](int64_t part) {
    norm_rows_backward<T>(call, channels, grad, dlayers, streamed, PartOf(rows, part, parts));
  });
  return true;
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
