// From global memory into the panels of tile.cuh, several stages ahead of the products.
#pragma once

#include "cuda/tile.cuh"

namespace pyeff::gpu {

// One number of type From, as a T.
template <class T, class From>
PYEFF_DEVICE float number_as(const From* p) {
  return to_float(from_float<T>(to_float(load(p))));
}

namespace detail {

PYEFF_DEVICE Vec16 pack_chunk(const float (&x)[4], float) {
  return {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}};
}
template <class T>
PYEFF_DEVICE Vec16 pack_chunk(const float (&x)[8], T) {
  return {{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])}};
}

}  // namespace detail

// Copies a chunk of numbers whose first `count` exist (none where it is not positive); the others become 0. Where the
// source is aligned and whole the copy is asynchronous; where it is not, or of another type, it goes through registers.
// `shift` is subtracted from what exists.
template <class T, class From>
PYEFF_DEVICE void copy_chunk(char* shared, const From* from, int count, bool aligned, float shift = 0.0f) {
  if constexpr (sizeof(T) == sizeof(From)) {
    if (count <= 0 || (aligned && count >= kChunk<T> && shift == 0.0f)) {
      copy_async16(shared, from, count > 0);
      return;
    }
  }
  float x[kChunk<T>];
  PYEFF_UNROLL
  for (int i = 0; i < kChunk<T>; ++i) x[i] = i < count ? number_as<T>(from + i) - shift : 0.0f;
  store_shared16(shared, detail::pack_chunk(x, T{}));
}

// Runs `count` steps of a product: load(stage, i) fills a stage for step i, use(stage, i) multiplies it. There is one
// barrier a step: a stage is filled again only after every thread has passed the barrier that follows its use. The
// caller sees to it that nobody still reads the stages when it begins.
template <int Stages, class Load, class Use>
PYEFF_DEVICE void run_pipeline(int count, int stage_bytes, const Load& load, const Use& use) {
  PYEFF_UNROLL
  for (int i = 0; i < Stages - 1; ++i) {
    if (i < count) load(shared_memory() + i * stage_bytes, i);
    copy_async_commit();
  }
  for (int i = 0; i < count; ++i) {
    copy_async_wait<Stages - 2>();
    barrier();
    const int next = i + Stages - 1;
    if (next < count) load(shared_memory() + (next % Stages) * stage_bytes, next);
    copy_async_commit();
    use(shared_memory() + (i % Stages) * stage_bytes, i);
  }
}

}  // namespace pyeff::gpu
