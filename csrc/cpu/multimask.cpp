#include "multimask.h"

#include "multimask_bias.h"
#include "multimask_block_mask.h"
#include "multimask_ema.h"
#include "multimask_move.h"

namespace pyeff {
namespace PYEFF_ISA {
namespace {

// What only moves is known by its size alone.
template <class Function>
void with_size(Number number, const Function& run) {
  switch (number) {
    case Number::f64:
      return run(uint64_t{});
    case Number::f32:
      return run(uint32_t{});
    default:
      return run(uint16_t{});
  }
}

template <class Function>
bool with_type(Number number, const Function& run) {
  switch (number) {
    case Number::f64:
      return run(double{});
    case Number::f32:
      return run(float{});
    default:
      return run(bf16{});
  }
}

bool all_below(const int32_t* numbers, int64_t count, int32_t lowest, int64_t limit) {
  int32_t least = lowest, most = -1;
  for (int64_t i = 0; i < count; ++i) {
    least = numbers[i] < least ? numbers[i] : least;
    most = numbers[i] > most ? numbers[i] : most;
  }
  return least >= lowest && most < limit;
}

}  // namespace

bool multimask_index_ok(const MultimaskProblem& p) {
  if (p.inverse && !all_below(p.inverse, p.rows * p.tokens, INT32_MIN, p.slots)) return false;
  if (p.lengths && !all_below(p.lengths, p.batch, 0, p.tokens + 1)) return false;
  if (p.keep_len && !all_below(p.keep_len, p.rows, 0, p.slots + 1)) return false;
  for (int64_t r = 0; p.ids_keep && r < p.rows; ++r)
    if (!all_below(p.ids_keep + r * p.slots, p.keep_len[r], 0, p.tokens)) return false;
  return true;
}

void multimask_gather(const MultimaskProblem& p, const StridedRows& x, void* out, const Parallel& parallel) {
  with_size(p.number, [&](auto type) { copy_kept<decltype(type)>(p, x, p.rows / p.batch, out, parallel); });
}

void multimask_gather_backward(const MultimaskProblem& p, const StridedRows& grad, void* dx, const Parallel& parallel) {
  with_type(p.number, [&](auto type) {
    using T = decltype(type);
    return sum_kept<T>(p, grad, static_cast<T*>(dx), parallel), true;
  });
}

void multimask_scatter(const MultimaskProblem& p, const StridedRows& x, const StridedRows& fill,
                       const MultimaskNoise& noise, void* out, const Parallel& parallel) {
  with_type(p.number, [&](auto type) {
    using T = decltype(type);
    return put_in_place<T>(p, x, fill, noise, static_cast<T*>(out), parallel), true;
  });
}

void multimask_scatter_backward(const MultimaskProblem& p, const StridedRows& grad, void* dx, void* dfill,
                                int64_t fills, const Parallel& parallel) {
  if (dx) with_size(p.number, [&](auto type) { copy_kept<decltype(type)>(p, grad, 1, dx, parallel); });
  if (!dfill) return;
  with_type(p.number, [&](auto type) {
    using T = decltype(type);
    return sum_hidden<T>(p, grad, static_cast<T*>(dfill), fills, parallel), true;
  });
}

bool multimask_relative_bias(const MultimaskProblem& p, const void* slopes, int64_t heads, int64_t prefix, void* out,
                             const Parallel& parallel) {
  return with_type(p.number, [&](auto type) {
    using T = decltype(type);
    return bias_forward<T>(p, static_cast<const Compute<T>*>(slopes), heads, prefix, static_cast<T*>(out), parallel);
  });
}

bool multimask_relative_bias_backward(const MultimaskProblem& p, const void* grad, int64_t heads, int64_t prefix,
                                      void* dslopes, const Parallel& parallel) {
  return with_type(p.number, [&](auto type) {
    using T = decltype(type);
    return bias_backward<T>(p, static_cast<const T*>(grad), heads, prefix, static_cast<Compute<T>*>(dslopes), parallel);
  });
}

bool multimask_block_mask(const MultimaskProblem& p, const MultimaskNoise& noise, const BlockMasks& masks,
                          const Parallel& parallel) {
  bool done = true;
  // A row takes some microseconds for each kilobyte of its scores.
  for_each_piece(parallel, p.rows, 16 * p.tokens, [&](int64_t begin, int64_t end) {
    BlockMaskRow draw(p, noise, masks);
    if (!draw.ready()) return __atomic_store_n(&done, false, __ATOMIC_RELAXED);
    for (int64_t r = begin; r < end; ++r) draw(r);
  });
  return done;
}

void multimask_ema_update(const EmaTensor* tensors, int64_t count, double decay, int64_t streamed,
                          const Parallel& parallel) {
  ema_update(tensors, count, decay, streamed, parallel);
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
