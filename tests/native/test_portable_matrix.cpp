// The matrix tiles of the portable layer against plain loops: ldmatrix, mma_tile, wgmma.
#include <memory>

#include "portable.h"

using namespace check;
using namespace pyeff::gpu;

namespace {

template <class T>
std::vector<uint16_t> random_halves(Random& random, int count) {
  std::vector<uint16_t> x(static_cast<size_t>(count));
  for (auto& v : x) v = from_float<T>(static_cast<float>(random.uniform())).bits;
  return x;
}
template <class T>
float value(const std::vector<uint16_t>& x, int i) {
  return to_float(T{x[static_cast<size_t>(i)]});
}

struct Tile {
  const uint16_t *a, *b;
  const float* c;
  float* d;
};

constexpr int kDepth = 32;

// d = c + a b: a [MT * 16, 32] and b [32, NT * 8] row-major, through padded rows of shared memory, one warp a tile of
// its own. `transposed`: b is [NT * 8, 32] instead, which needs no transposition on the way to the registers.
template <class T, int MT, int NT, bool Transposed>
PYEFF_KERNEL void multiply_tiles(const Tile p) {
  constexpr int m = MT * 16, n = NT * 8, width = Transposed ? kDepth : n, rows = Transposed ? n : kDepth;
  constexpr int pitch_a = kDepth + 8, pitch_b = width + 8;
  uint16_t* a = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* b = a + m * pitch_a;
  for (int i = thread_index(); i < m * kDepth; i += block_size())
    store_shared(a + i / kDepth * pitch_a + i % kDepth, load(p.a + i));
  for (int i = thread_index(); i < rows * width; i += block_size())
    store_shared(b + i / width * pitch_b + i % width, load(p.b + i));
  barrier();
  const int g = lane() / 4, t = lane() % 4;
  const float* c = p.c;
  float* d = p.d + warp() * m * n;
  float sum[MT][NT][4];
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < NT; ++j)
      for (int e = 0; e < 4; ++e) sum[i][j][e] = load(c + (i * 16 + g + 8 * (e / 2)) * n + j * 8 + 2 * t + e % 2);
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t fa[MT][4], fb[NT][2];
    for (int i = 0; i < MT; ++i) ldmatrix_x4(fa[i], a + (i * 16 + lane() % 16) * pitch_a + k + lane() / 16 * 8);
    for (int j = 0; j < NT; j += 2) {
      uint32_t four[4];
      if (Transposed)
        ldmatrix_x4(four, b + (j * 8 + lane() / 16 * 8 + lane() % 8) * pitch_b + k + lane() / 8 % 2 * 8);
      else
        ldmatrix_x4_trans(four, b + (k + lane() % 16) * pitch_b + j * 8 + lane() / 16 * 8);
      for (int e = 0; e < 4; ++e) fb[j + e / 2][e % 2] = four[e];
    }
    mma_tile<T>(sum, fa, fb);
  }
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < NT; ++j)
      for (int e = 0; e < 4; ++e) store(d + (i * 16 + g + 8 * (e / 2)) * n + j * 8 + 2 * t + e % 2, sum[i][j][e]);
}

template <class T, int MT, int NT, bool Transposed>
void check_tiles(uint64_t seed) {
  constexpr int m = MT * 16, n = NT * 8, warps = 3;
  Random random(seed);
  const auto a = random_halves<T>(random, m * kDepth), b = random_halves<T>(random, kDepth * n);
  std::vector<float> c(m * n), d(m * n * warps, -1.0f);
  for (auto& x : c) x = static_cast<float>(random.uniform());
  emulate::Buffers buffers;
  buffers.reads(a.data(), a.size() * 2, "a");
  buffers.reads(b.data(), b.size() * 2, "b");
  buffers.reads(c.data(), c.size() * 4, "c");
  buffers.writes(d.data(), d.size() * 4, "d");
  run(multiply_tiles<T, MT, NT, Transposed>, blocks(1, warps * 32, (m * (kDepth + 8) + 2 * (n + 8) * (kDepth + 8)) * 2),
      Tile{a.data(), b.data(), c.data(), d.data()});
  for (int w = 0; w < warps; ++w)
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) {
        double truth = c[static_cast<size_t>(i * n + j)];
        for (int k = 0; k < kDepth; ++k)
          truth += double{value<T>(a, i * kDepth + k)} * value<T>(b, Transposed ? j * kDepth + k : k * n + j);
        CHECK(std::fabs(d[static_cast<size_t>((w * m + i) * n + j)] - truth) <= kDepth * 0x1p-24 * kDepth);
      }
}

// d = c + a b for one warpgroup, depth 64 in steps of 16, in swizzled rows: a [64, 64]; b [N, 64], or [64, N] if
// TransB. The first half of the depth goes into one group, the rest into another.
template <class T, int N, bool TransB>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(128, 1) multiply_warpgroup(const PYEFF_GRID_CONSTANT Tile p) {
  char* a = shared_memory();
  char* b = a + 64 * 128;
  constexpr int kSwizzle = TransB && N < 64 ? N * 2 : 128;
  const auto swizzled = [](char* base, int row, int piece, int width = 128) {
    return base + row * width + ((piece ^ (row % 8 / (128 / width))) * 16);
  };
  for (int i = thread_index(); i < 64 * 8; i += kWarpgroup)
    copy_async16(swizzled(a, i / 8, i % 8), p.a + i / 8 * 64 + i % 8 * 8, true);
  if (TransB) {
    // Blocks of 64 columns, each [64, 64]; the last may be narrower.
    for (int i = thread_index(); i < 64 * N / 8; i += kWarpgroup) {
      const int k = i / (N / 8), column = i % (N / 8) * 8;
      copy_async16(swizzled(b + column / 64 * 64 * 128, k, column % 64 / 8, kSwizzle), p.b + k * N + column, true);
    }
  } else {
    for (int i = thread_index(); i < N * 8; i += kWarpgroup)
      copy_async16(swizzled(b, i / 8, i % 8), p.b + i / 8 * 64 + i % 8 * 8, true);
  }
  copy_async_commit();
  copy_async_wait<0>();
  async_proxy_fence();
  barrier();
  const int row = warp() % 4 * 16 + lane() / 4, column = lane() % 4 * 2;
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = load(p.c + (row + 8 * (i / 2 % 2)) * N + i / 4 * 8 + column + i % 2);
  wgmma_pin(d);
  wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const int step = TransB ? k * 16 * kSwizzle : k * 32;
    wgmma<T, N, TransB>(d, wgmma_descriptor(a + k * 32, 0, 1024),
                        wgmma_descriptor(b + step, 64 * 128, 8 * kSwizzle, kSwizzle), true);
    if (k % 2 == 1) wgmma_commit();
  }
  wgmma_wait<1>();
  wgmma_wait<0>();
  wgmma_pin(d);
  for (int i = 0; i < N / 2; ++i) store(p.d + (row + 8 * (i / 2 % 2)) * N + i / 4 * 8 + column + i % 2, d[i]);
}

template <class T, int N, bool TransB>
void check_warpgroup() {
  Random random(N + TransB);
  const auto a = random_halves<T>(random, 64 * 64), b = random_halves<T>(random, 64 * N);
  std::vector<float> c(64 * N), d(64 * N, -1.0f);
  for (auto& x : c) x = static_cast<float>(random.uniform());
  emulate::Buffers buffers;
  buffers.reads(a.data(), a.size() * 2, "a");
  buffers.reads(b.data(), b.size() * 2, "b");
  buffers.reads(c.data(), c.size() * 4, "c");
  buffers.writes(d.data(), d.size() * 4, "d");
  run(multiply_warpgroup<T, N, TransB>, blocks(1, 128, 64 * 128 + (N + 63) / 64 * 64 * 128),
      Tile{a.data(), b.data(), c.data(), d.data()});
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < N; ++j) {
      double truth = c[static_cast<size_t>(i * N + j)];
      for (int k = 0; k < 64; ++k)
        truth += double{value<T>(a, i * 64 + k)} * value<T>(b, TransB ? k * N + j : j * 64 + k);
      CHECK(std::fabs(d[static_cast<size_t>(i * N + j)] - truth) <= 64 * 0x1p-24 * 64);
    }
}

// Two accumulators in turn, one of them overwritten rather than added to, and two warpgroups with their own operands.
PYEFF_KERNEL void two_accumulators(const Tile p) {
  const int group = thread_index() / kWarpgroup, t = thread_index() % kWarpgroup;
  char* a = shared_memory() + group * 64 * 128;
  for (int i = t; i < 64 * 8; i += kWarpgroup)
    store_shared16(a + i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16, load16(p.a + (group * 64 + i / 8) * 64 + i % 8 * 8));
  async_proxy_fence();
  named_barrier(1 + group, kWarpgroup);
  float x[32], y[32];
  for (int i = 0; i < 32; ++i) x[i] = y[i] = 1000.0f;
  wgmma_fence();
  wgmma<bf16, 64, false>(x, wgmma_descriptor(a, 0, 1024), wgmma_descriptor(a, 0, 1024), false);
  wgmma_commit();
  wgmma<bf16, 64, false>(y, wgmma_descriptor(a + 32, 0, 1024), wgmma_descriptor(a + 32, 0, 1024), true);
  wgmma_commit();
  wgmma_wait<1>();
  const int row = warp() % 4 * 16 + lane() / 4, column = lane() % 4 * 2;
  float* d = p.d + group * 2 * 64 * 64;
  for (int i = 0; i < 32; ++i) store(d + (row + 8 * (i / 2 % 2)) * 64 + i / 4 * 8 + column + i % 2, x[i]);
  for (int i = 0; i < 32; ++i) CHECK(y[i] != y[i]);  // still under way
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) store(d + (64 + row + 8 * (i / 2 % 2)) * 64 + i / 4 * 8 + column + i % 2, y[i]);
}

}  // namespace

TEST(portable_mma_tiles) {
  check_tiles<bf16, 1, 2, false>(1);
  check_tiles<f16, 1, 2, true>(2);
  check_tiles<bf16, 2, 4, true>(3);
  check_tiles<f16, 4, 8, false>(4);
}

TEST(portable_wgmma) {
  check_warpgroup<bf16, 16, false>();
  check_warpgroup<f16, 16, true>();
  check_warpgroup<f16, 32, false>();
  check_warpgroup<bf16, 32, true>();
  check_warpgroup<bf16, 64, false>();
  check_warpgroup<f16, 64, true>();
  check_warpgroup<bf16, 96, true>();
  check_warpgroup<f16, 96, false>();
  check_warpgroup<bf16, 128, true>();
  check_warpgroup<bf16, 192, false>();
  check_warpgroup<f16, 192, true>();
  check_warpgroup<bf16, 256, true>();
  check_warpgroup<f16, 256, false>();
}

TEST(portable_wgmma_of_two_warpgroups_with_two_accumulators_each) {
  Random random(21);
  const auto a = random_halves<bf16>(random, 2 * 64 * 64);
  std::vector<float> d(4 * 64 * 64, -1.0f);
  run(two_accumulators, blocks(1, 256, 2 * 64 * 128), Tile{a.data(), nullptr, nullptr, d.data()});
  for (int group = 0; group < 2; ++group)
    for (int which = 0; which < 2; ++which)
      for (int i = 0; i < 64; ++i)
        for (int j = 0; j < 64; ++j) {
          double truth = which == 0 ? 0 : 1000;
          for (int k = 16 * which; k < 16 * which + 16; ++k)
            truth += double{value<bf16>(a, (group * 64 + i) * 64 + k)} * value<bf16>(a, (group * 64 + j) * 64 + k);
          CHECK(std::fabs(d[static_cast<size_t>(((group * 2 + which) * 64 + i) * 64 + j)] - truth) <=
                16 * 0x1p-24 * (which == 0 ? 16 : 1016));
        }
}
