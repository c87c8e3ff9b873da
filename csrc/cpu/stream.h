// Stores past the caches, for results that no cache would hold until they are read: the line they fall into is not
// fetched first, and nothing that is still needed makes room for it.
#pragma once

#include "simd.h"

namespace pyeff {
namespace PYEFF_ISA {

// Whether rows of `count` numbers one behind the other may be stored by `stream`, whole vectors at a time.
template <class T>
PYEFF_INLINE bool can_stream(const T* rows, int64_t count) {
#if defined(__SSE2__)
  return reinterpret_cast<uintptr_t>(rows) % 64 == 0 && count * int64_t(sizeof(T)) % 64 == 0;
#else
  (void)rows, (void)count;
  return false;
#endif
}

// To an address that is a multiple of the vector's size.
template <class T>
PYEFF_INLINE void stream(T* p, Vec<Compute<T>> v) {
#if defined(__SSE2__)
  constexpr int64_t bytes = int64_t(sizeof(T)) * kLanes<Compute<T>>;
  T numbers[kLanes<Compute<T>>];
  store(numbers, v);
#if defined(__AVX512F__)
  if constexpr (bytes == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_loadu_si512(numbers));
#endif
#if defined(__AVX__)
  if constexpr (bytes == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
#endif
  if constexpr (bytes == 16)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers)));
#endif
  store(p, v);
}

// What has been stored so is seen by other threads after this.
PYEFF_INLINE void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
