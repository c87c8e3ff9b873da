// The portable CUDA layer in its emulation: indices, barriers, shuffles, memory, asynchronous copies, clusters,
// launches.
#include <algorithm>
#include <cstring>
#include <limits>
#include <thread>

#include "portable.h"

using namespace check;
using namespace pyeff::gpu;

namespace {

struct Ints {
  int* out;
  int n;
};

PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(96, 1) note_indices(const PYEFF_GRID_CONSTANT Ints p) {
  const int block = block_index_x() + grid_size_x() * (block_index_y() + grid_size_y() * block_index_z());
  int* row = p.out + (block * block_size() + thread_index()) * 4;
  store(row, thread_index());
  store(row + 1, warp() * kWarp + lane());
  store(row + 2, load(row + 2) + 1);
  store(row + 3, grid_size_x() * 10000 + grid_size_y() * 100 + grid_size_z());
}

// Reverses a row through shared memory, many times over one buffer.
PYEFF_KERNEL void reverse_often(const Ints p) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int t = thread_index(), last = block_size() - 1;
  int mine = load(p.out + t);
  for (int i = 0; i < p.n; ++i) {
    store_shared(shared + t, mine);
    barrier();
    mine = load_shared(shared + last - t) + 1;
    barrier();
  }
  store(p.out + t, mine);
}

// One half of the block makes numbers, the other takes them, over two named barriers.
PYEFF_KERNEL void hand_over(const Ints p) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int half = block_size() / 2, t = thread_index() % half;
  int sum = 0;
  for (int i = 0; i < p.n; ++i) {
    if (thread_index() < half) {
      if (i > 0) named_barrier(2, block_size());
      store_shared(shared + t, i * t);
      named_barrier(1, block_size());
    } else {
      named_barrier(1, block_size());
      sum += load_shared(shared + half - 1 - t);
      if (i + 1 < p.n) named_barrier(2, block_size());
    }
  }
  if (thread_index() >= half) store(p.out + t, sum);
}

PYEFF_KERNEL void rotate_in_warp(const Ints p) {
  int* shared = reinterpret_cast<int*>(shared_memory()) + warp() * kWarp;
  store_shared(shared + lane(), thread_index());
  warp_barrier();
  store(p.out + thread_index(), load_shared(shared + (lane() + 1) % kWarp));
}

struct Shuffled {
  const double* wide;
  const int* narrow;
  double* wide_out;
  int* narrow_out;
  uint32_t* votes;
};

PYEFF_KERNEL void shuffle_all(const Shuffled p) {
  const int t = thread_index();
  const double wide = load(p.wide + t);
  const int narrow = load(p.narrow + t);
  store(p.wide_out + t, shuffle(wide, narrow % kWarp));
  double sum = wide;
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  store(p.wide_out + block_size() + t, sum);
  store(p.narrow_out + t, shuffle_xor(narrow, 5));
  store(p.narrow_out + block_size() + t, any(narrow == 7) * 2 + all(narrow < 1000));
  store(p.votes + t, ballot(narrow % 3 == 0));
}

struct Copied {
  const char* in;
  char* out;
  int pieces, valid;
};

// Copies pieces of 16 bytes in groups of one for each thread, two groups ahead; what is not valid becomes zero.
PYEFF_KERNEL void copy_pipeline(const Copied p) {
  constexpr int stages = 3;
  const int t = thread_index(), steps = p.pieces / block_size();
  const auto start = [&](int step) {
    const int piece = step * block_size() + t;
    if (step < steps)
      copy_async16(shared_memory() + (step % stages * block_size() + t) * 16, p.in + piece * 16, piece < p.valid);
    copy_async_commit();
  };
  for (int step = 0; step < stages - 1; ++step) start(step);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<stages - 2>();
    barrier();
    start(step + stages - 1);
    // A neighbour's piece, which the barrier makes visible.
    const int other = (t + 1) % block_size();
    store16(p.out + (step * block_size() + other) * 16,
            load_shared16(shared_memory() + (step % stages * block_size() + other) * 16));
  }
}

template <class T>
struct Typed {
  const T* in;
  T* out;
};

template <class T>
PYEFF_KERNEL void through_memory(const Typed<T> p) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  store_shared(shared + thread_index(), load(p.in + thread_index()));
  barrier();
  store(p.out + thread_index(), load_shared(shared + (thread_index() ^ 1)));
}

template <class T>
void go_through_memory() {
  Random random(7);
  std::vector<unsigned char> in(64 * sizeof(T)), out(in.size());
  for (auto& x : in) x = static_cast<unsigned char>(random.bits());
  std::vector<T> from(64), to(64);
  std::memcpy(from.data(), in.data(), in.size());
  emulate::Buffers buffers;
  buffers.reads(from.data(), in.size(), "in");
  buffers.writes(to.data(), in.size(), "out");
  run(through_memory<T>, blocks(1, 64, 64 * sizeof(T)), Typed<T>{from.data(), to.data()});
  for (size_t i = 0; i < 64; ++i) CHECK(std::memcmp(&to[i], &from[i ^ 1], sizeof(T)) == 0);
}

struct Sums {
  const float* in;
  float* out;
};

// Each block gives its numbers to the next one of its cluster, as single numbers and as 16 bytes, and takes them back.
PYEFF_KERNEL void around_the_cluster(const Sums p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int t = thread_index(), n = block_size(), to = (cluster_rank() + 1) % cluster_size();
  float* peer = cluster_map(shared, to);
  cluster_barrier();
  store_cluster(peer + t, load(p.in + block_index_x() * n + t));
  if (t < n / 4) store_cluster16(peer + n + 4 * t, load16(p.in + block_index_x() * n + 4 * t));
  cluster_barrier();
  store(p.out + block_index_x() * 3 * n + t, load_shared(shared + t));
  store(p.out + block_index_x() * 3 * n + n + t, load_shared(shared + n + t));
  const Vec16 back = load_cluster16(peer + n + 4 * (t / 4));
  float value;
  std::memcpy(&value, &back.x[t % 4], 4);
  store(p.out + block_index_x() * 3 * n + 2 * n + t, value - load_cluster(peer + t));
  cluster_barrier();
}

}  // namespace

TEST(portable_indices) {
  for (int grid : {1, 2, 7}) {
    const int rows = grid * 3 * 2 * 96;
    std::vector<int> out(static_cast<size_t>(rows) * 4, 0);
    Launch how = blocks(grid, 96);
    how.grid_y = 3;
    how.grid_z = 2;
    emulate::Buffers buffers;
    buffers.writes(out.data(), out.size() * sizeof(int), "out");
    run(note_indices, how, Ints{out.data(), 0});
    for (int i = 0; i < rows; ++i) {
      const int* row = &out[static_cast<size_t>(i) * 4];
      CHECK(row[0] == i % 96 && row[1] == i % 96 && row[2] == 1 && row[3] == grid * 10000 + 302);
    }
  }
}

TEST(portable_barriers) {
  for (int threads : {32, 64, 256, 1024}) {
    const int times = 9;
    std::vector<int> x(static_cast<size_t>(threads));
    for (int i = 0; i < threads; ++i) x[static_cast<size_t>(i)] = i;
    run(reverse_often, blocks(1, threads, threads * 4), Ints{x.data(), times});
    for (int i = 0; i < threads; ++i) CHECK(x[static_cast<size_t>(i)] == threads - 1 - i + times);
    if (threads == 32) continue;
    run(hand_over, blocks(1, threads, threads * 4), Ints{x.data(), times});
    const int half = threads / 2;
    for (int i = 0; i < half; ++i) CHECK(x[static_cast<size_t>(i)] == (half - 1 - i) * times * (times - 1) / 2);
    run(rotate_in_warp, blocks(1, threads, threads * 4), Ints{x.data(), 0});
    for (int i = 0; i < threads; ++i) CHECK(x[static_cast<size_t>(i)] == i / 32 * 32 + (i + 1) % 32);
  }
}

TEST(portable_shuffles_and_votes) {
  Random random(3);
  constexpr int threads = 128;
  double wide[threads], wide_out[2 * threads];
  int narrow[threads], narrow_out[2 * threads];
  uint32_t votes[threads];
  for (int i = 0; i < threads; ++i) {
    wide[i] = random.uniform();
    // A warp in which one is 7 or none, all are small or not.
    narrow[i] = i == 40 ? 7 : static_cast<int>(8 + random.below(i < 96 ? 900 : 2000));
  }
  narrow[100] = 1500;
  run(shuffle_all, blocks(1, threads), Shuffled{wide, narrow, wide_out, narrow_out, votes});
  for (int i = 0; i < threads; ++i) {
    const int first = i / 32 * 32;
    CHECK(wide_out[i] == wide[first + narrow[i] % 32]);
    CHECK(narrow_out[i] == narrow[i ^ 5]);
    double sums[32];
    for (int j = 0; j < 32; ++j) sums[j] = wide[first + j];
    for (int mask = 16; mask > 0; mask /= 2) {
      double next[32];
      for (int j = 0; j < 32; ++j) next[j] = sums[j] + sums[j ^ mask];
      std::memcpy(sums, next, sizeof sums);
    }
    CHECK(wide_out[threads + i] == sums[i % 32]);
    CHECK(narrow_out[threads + i] == (first == 32) * 2 + (first != 96));
    for (int j = 0; j < 32; ++j) CHECK((votes[i] >> j & 1) == (narrow[first + j] % 3 == 0));
  }
}

TEST(portable_memory_of_each_size) {
  go_through_memory<uint8_t>();
  go_through_memory<bf16>();
  go_through_memory<float>();
  go_through_memory<double>();
}

TEST(portable_asynchronous_copies) {
  Random random(5);
  for (int threads : {32, 128}) {
    for (int valid : {0, 1, 200, threads * 7}) {
      const int pieces = threads * 7;
      std::vector<uint64_t> in(static_cast<size_t>(pieces) * 2), out(in.size());
      for (auto& x : in) x = random.bits();
      const int given = std::min(valid, pieces);
      emulate::Buffers buffers;
      buffers.reads(in.data(), static_cast<size_t>(given) * 16, "in");
      buffers.writes(out.data(), out.size() * 8, "out");
      run(copy_pipeline, blocks(1, threads, 3 * threads * 16),
          Copied{reinterpret_cast<char*>(in.data()), reinterpret_cast<char*>(out.data()), pieces, given});
      for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == (static_cast<int>(i) / 2 < given ? in[i] : 0));
    }
  }
}

TEST(portable_clusters) {
  Random random(11);
  for (int cluster : {1, 2, 4, 8}) {
    const int threads = 64, grid = cluster * 3, n = grid * threads;
    std::vector<float> in(static_cast<size_t>(n)), out(static_cast<size_t>(3 * n));
    for (auto& x : in) x = static_cast<float>(random.uniform());
    emulate::Buffers buffers;
    buffers.reads(in.data(), in.size() * 4, "in");
    buffers.writes(out.data(), out.size() * 4, "out");
    run(around_the_cluster, blocks(grid, threads, threads * 8, cluster), Sums{in.data(), out.data()});
    for (int b = 0; b < grid; ++b) {
      const int from = b / cluster * cluster + (b % cluster + cluster - 1) % cluster;
      for (int t = 0; t < threads; ++t) {
        const float* row = &out[static_cast<size_t>(b * 3 * threads + t)];
        CHECK(row[0] == in[static_cast<size_t>(from * threads + t)] && row[threads] == row[0] && row[2 * threads] == 0);
      }
    }
  }
}

TEST(portable_launches_that_the_hardware_refuses) {
  int x[1024];
  const Ints p{x, 1};
  refused(reverse_often, blocks(0, 32), p, {"grid_x is 0", "Ints"});
  refused(reverse_often, blocks(1, 0), p, {"threads is 0"});
  refused(reverse_often, blocks(1, 1056), p, {"threads is 1056", "1024"});
  refused(reverse_often, blocks(1, 33), p, {"threads is 33", "whole warps"});
  refused(reverse_often, blocks(1, 32, 227 * 1024 + 1), p, {"shared_bytes is 232449"});
  refused(reverse_often, blocks(1, 32, -1), p, {"shared_bytes is -1"});
  refused(reverse_often, blocks(16, 32, 0, 16), p, {"cluster is 16"});
  refused(reverse_often, blocks(3, 32, 0, 2), p, {"grid_x is 3", "cluster, 2"});
  Launch how = blocks(1, 32);
  how.grid_y = 65536;
  how.name = "by another name";
  refused(reverse_often, how, p, {"kernel by another name", "grid_y is 65536"});
  // A processor with less.
  emulate::limits().shared_bytes = 99 * 1024;
  refused(reverse_often, blocks(1, 32, 99 * 1024 + 1), p, {"not in 0 to 101376"});
  emulate::limits() = emulate::Limits();
  for (int i = 0; i < 1024; ++i) x[i] = 0;
  run(reverse_often, blocks(1, 32, 227 * 1024), p);
  CHECK(x[0] == 1);
}

TEST(portable_launches_of_several_os_threads) {
  constexpr int threads = 64, times = 5;
  std::vector<int> x(4 * threads);
  for (int i = 0; i < 4 * threads; ++i) x[static_cast<size_t>(i)] = i % threads;
  std::vector<std::thread> all;
  for (int i = 0; i < 4; ++i)
    all.emplace_back([&x, i] {
      int* mine = &x[static_cast<size_t>(i * threads)];
      emulate::Buffers buffers;
      buffers.writes(mine, threads * sizeof(int), "row");
      run(reverse_often, blocks(1, threads, threads * 4), Ints{mine, times});
      refused(reverse_often, blocks(1, threads, threads * 4), Ints{mine + 1, times}, {"row (256 bytes)"});
    });
  for (auto& one : all) one.join();
  for (int i = 0; i < 4; ++i)
    CHECK(x[static_cast<size_t>(i * threads)] == threads - 1 + times &&
          x[static_cast<size_t>(i * threads + 63)] == times);
}

TEST(portable_numbers) {
  // Every 16-bit number comes back, NaN as the one NaN.
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    const float b = to_float(bf16{bits}), h = to_float(f16{bits});
    CHECK(from_float<bf16>(b).bits == (b != b ? 0x7fff : bits));
    CHECK(from_float<f16>(h).bits == (h != h ? 0x7fff : bits));
    CHECK((h != h) == ((i & 0x7fff) > 0x7c00));
    if (h == h && (i & 0x7fff) < 0x7c00) {
      const int exponent = static_cast<int>(i >> 10 & 31), fraction = static_cast<int>(i & 0x3ff);
      const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
      CHECK(h == (i & 0x8000 ? -size : size));
    }
  }
  // Between two neighbours: the nearer one, at the middle the even one.
  for (uint32_t i = 0; i < 0x7bff; ++i) {
    const float low = to_float(f16{static_cast<uint16_t>(i)}), high = to_float(f16{static_cast<uint16_t>(i + 1)});
    const float middle = (low + high) / 2;
    CHECK(from_float<f16>(middle).bits == (i & 1 ? i + 1 : i));
    CHECK(from_float<f16>(std::nextafter(middle, 0.0f)).bits == i);
    CHECK(from_float<f16>(std::nextafter(middle, 1e9f)).bits == i + 1);
    CHECK(from_float<f16>(-middle).bits == (0x8000 | (i & 1 ? i + 1 : i)));
  }
  CHECK(from_float<f16>(65519.996f).bits == 0x7bff && from_float<f16>(65520.0f).bits == 0x7c00);
  CHECK(from_float<f16>(std::numeric_limits<float>::infinity()).bits == 0x7c00);
  Random random(9);
  for (int i = 0; i < 20000; ++i) {
    const float x = float_of(static_cast<uint32_t>(random.bits()));
    CHECK(from_float<bf16>(x).bits == (x != x ? 0x7fff : bf16_of(x)));
    CHECK(from_float<float>(x) == x || x != x);
    const uint32_t pair = pack2<f16>(x, 1.5f);
    CHECK((pair & 0xffff) == from_float<f16>(x).bits && high_of<f16>(pair) == 1.5f);
    CHECK(low_of<bf16>(pack2<bf16>(-2.0f, x)) == -2.0f);
  }
  CHECK(rsqrt(4.0f) == 0.5f && exp_approx(0.0f) == 1.0f);
}
