// The moving average of parameters: all of them in one pass, whatever their number and sizes.
#pragma once

#include "multimask.h"
#include "multimask_copy.h"

namespace pyeff {
namespace PYEFF_ISA {

// What is in the cache at once, and the least that is worth a thread.
constexpr int64_t kEmaBlock = 1024, kEmaPiece = 16 * kEmaBlock;

template <class Function>
PYEFF_INLINE void with_number(Number number, const Function& run) {
  switch (number) {
    case Number::f64:
      return run(double{});
    case Number::f32:
      return run(float{});
    default:
      return run(bf16{});
  }
}

template <class To, class From>
void convert(To* to, const From* from, int64_t count) {
  using C = Compute<To>;
  int64_t i = 0;
  if constexpr (sizeof(C) == 4 && sizeof(Compute<From>) == 4)
    for (; i + kLanes<float> <= count; i += kLanes<float>) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = narrow<To, C>(C(widen(from[i])));
}

// ema = keep ema + take param for at most a block; the copy is of what has not been rounded yet.
template <class T>
void ema_block(const EmaTensor& tensor, int64_t at, int64_t count, double decay, bool streamed) {
  using C = Compute<T>;
  constexpr int64_t lanes = kLanes<C>;
  constexpr Number number = sizeof(C) == 8 ? Number::f64 : Number::f32;
  const C keep = C(decay), take = C(1 - decay);
  C converted[kEmaBlock], mixed[kEmaBlock];
  const C* param = static_cast<const C*>(tensor.param) + at;
  if (tensor.param_number != number) {
    with_number(tensor.param_number,
                [&](auto type) { convert(converted, static_cast<const decltype(type)*>(tensor.param) + at, count); });
    param = converted;
  }
  T* ema = static_cast<T*>(tensor.ema) + at;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Vec<C> v = load(ema + i) * keep + load(param + i) * take;
    store(ema + i, v);
    if (tensor.copy) store(mixed + i, v);
  }
  if (i < count) {
    const Vec<C> v = load_first(ema + i, count - i) * keep + load_first(param + i, count - i) * take;
    store_first(ema + i, v, count - i);
    if (tensor.copy) store_first(mixed + i, v, count - i);
  }
  if (!tensor.copy) return;
  with_number(tensor.copy_number, [&](auto type) {
    using To = decltype(type);
    char* copy = reinterpret_cast<char*>(static_cast<To*>(tensor.copy) + at);
    if (!streamed) return convert(reinterpret_cast<To*>(copy), mixed, count);
    To rounded[kEmaBlock];
    convert(rounded, mixed, count);
    copy_streamed(copy, reinterpret_cast<const char*>(rounded), count * int64_t(sizeof(To)));
  });
}

// Pieces of all the tensors behind each other. A block belongs to the piece in which it begins, so that where a tensor
// is cut into blocks, and what is rounded how, does not depend on the pieces.
inline void ema_update(const EmaTensor* tensors, int64_t count, double decay, int64_t streamed_from,
                       const Parallel& parallel) {
  const int64_t total = count ? tensors[count - 1].first + tensors[count - 1].count : 0;
  const bool streamed = total * 2 >= streamed_from;
  // Few long pieces: what is read ahead of the end of one is another thread's.
  const int64_t pieces = at_least(1, at_most(8 * parallel.threads, total / kEmaPiece));
  for_each_task(parallel, pieces, [&](int64_t piece) {
    const int64_t begin = total * piece / pieces, end = total * (piece + 1) / pieces;
    int64_t low = 0, high = count;  // the last tensor that begins where the piece does, or before
    while (high - low > 1) (tensors[(low + high) / 2].first <= begin ? low : high) = (low + high) / 2;
    for (int64_t i = low; i < count && tensors[i].first < end; ++i) {
      const EmaTensor& tensor = tensors[i];
      const int64_t blocks_before = (at_least(begin - tensor.first, 0) + kEmaBlock - 1) / kEmaBlock;
      for (int64_t at = blocks_before * kEmaBlock; at < at_most(end - tensor.first, tensor.count); at += kEmaBlock)
        with_number(tensor.number, [&](auto type) {
          ema_block<decltype(type)>(tensor, at, at_most(kEmaBlock, tensor.count - at), decay, streamed);
        });
    }
    if (streamed) end_of_stream();
  });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
