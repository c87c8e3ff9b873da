#include "roofline.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyeff::PYEFF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kAccumulators = 24;  // of 32 registers
#elif defined(__AVX__)
constexpr int kBytes = 32, kAccumulators = 12;  // of 16
#elif defined(__x86_64__)
constexpr int kBytes = 16, kAccumulators = 12;  // of 16
#else
constexpr int kBytes = 16, kAccumulators = 24;  // of 32
#endif

typedef double Doubles __attribute__((vector_size(kBytes)));
typedef float Floats __attribute__((vector_size(kBytes)));
typedef uint64_t Words __attribute__((vector_size(kBytes)));

// Stores what a loop computed where no compiler may leave it out.
template <class Vector>
void keep(const Vector (&sums)[kAccumulators]) {
  [[maybe_unused]] volatile Vector kept;
#pragma GCC unroll 32
  for (int i = 0; i < kAccumulators; ++i) kept = sums[i];
}

// Independent chains, more than latency times throughput, held in registers. The factor hides from the compiler and is
// below one, so that the sums stay finite and normal.
template <class Vector, class Scalar>
double multiply_add(int64_t iterations) {
  volatile Scalar hidden_factor = Scalar(0.5), hidden_term = Scalar(1.25);
  Vector factor, term, sums[kAccumulators];
  const int lanes = kBytes / static_cast<int>(sizeof(Scalar));
  for (int i = 0; i < lanes; ++i) factor[i] = hidden_factor, term[i] = hidden_term;
#pragma GCC unroll 32
  for (int i = 0; i < kAccumulators; ++i) sums[i] = term * static_cast<Scalar>(i + 1);
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i) sums[i] = sums[i] * factor + term;
  }
  keep(sums);
  return 2.0 * lanes * kAccumulators * static_cast<double>(iterations);
}

#if defined(__AVX512BF16__)
double dot_bfloat16(int64_t iterations) {
  volatile float hidden = 0.0078125f;
  __m512 sums[kAccumulators];
  const __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(hidden), _mm512_set1_ps(hidden));
#pragma GCC unroll 32
  for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm512_set1_ps(hidden * static_cast<float>(i + 1));
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
  }
  keep(sums);
  return 2.0 * 32 * kAccumulators * static_cast<double>(iterations);
}
#endif

double multiply_add(FmaType type, int64_t iterations) {
  if (type == FmaType::kFloat64) return multiply_add<Doubles, double>(iterations);
#if defined(__AVX512BF16__)
  if (type == FmaType::kBFloat16) return dot_bfloat16(iterations);
#endif
  return multiply_add<Floats, float>(iterations);
}

void store_past_caches(char* to, Words words) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(words));
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(words));
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(words));
#else
  __builtin_memcpy(to, &words, kBytes);
#endif
}

Words load(const char* from) {
  Words words;
  __builtin_memcpy(&words, from, kBytes);
  return words;
}

// What one task streams: whole cache lines, and far fewer tasks than bytes.
constexpr int64_t kLine = 64, kTask = int64_t(1) << 20;

int64_t tasks_of(int64_t bytes) { return (bytes + kTask - 1) / kTask; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

double fma_loop(FmaType type, int64_t iterations, const Parallel& parallel) {
  for_each_task(parallel, parallel.threads, [=](int64_t) { multiply_add(type, iterations); });
  return multiply_add(type, 1) * static_cast<double>(iterations) * parallel.threads;
}

void stream_copy(void* to, const void* from, int64_t bytes, const Parallel& parallel) {
  if (bytes <= 0) return;
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(target) % kLine);
  const int64_t head = misaligned ? least(bytes, kLine - misaligned) : 0;
  const int64_t middle = (bytes - head) / kLine * kLine, tail = bytes - head - middle;
  __builtin_memcpy(target, source, head);
  for_each_task(parallel, tasks_of(middle), [=](int64_t task) {
    const int64_t end = head + least(middle, (task + 1) * kTask);
    for (int64_t at = head + task * kTask; at < end; at += kBytes) store_past_caches(target + at, load(source + at));
#if defined(__x86_64__)
    _mm_sfence();
#endif
  });
  __builtin_memcpy(target + head + middle, source + head + middle, tail);
}

uint64_t stream_read(const void* from, int64_t bytes, const Parallel& parallel) {
  const char* source = static_cast<const char*>(from);
  constexpr int64_t kStep = 4 * kBytes;
  const int64_t middle = bytes / kStep * kStep;
  uint64_t total = 0;
  for_each_task(parallel, tasks_of(middle), [=, &total](int64_t task) {
    const int64_t end = least(middle, (task + 1) * kTask);
    Words sums[4] = {};
    for (int64_t at = task * kTask; at < end; at += kStep) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[i] += load(source + at + i * kBytes);
    }
    const Words sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    uint64_t folded = 0;
    for (int i = 0; i < kBytes / 8; ++i) folded += sum[i];
    // Integers: the order in which the tasks end does not change the sum.
    __atomic_fetch_add(&total, folded, __ATOMIC_RELAXED);
  });
  for (int64_t i = middle; i < bytes; ++i) total += static_cast<unsigned char>(source[i]);
  return total;
}

}  // namespace pyeff::PYEFF_ISA
