// Uses every primitive of the portable layer once, so that a compiler shows what becomes of each. Never run.
#include "cuda/portable.cuh"

namespace pyeff::gpu {

struct Everything {
  const char* in;
  float* out;
};

template <class T>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(128, 1) use_basics(const PYEFF_GRID_CONSTANT Everything p) {
  char* shared = shared_memory();
  const int i = block_index_x() + grid_size_x() * (block_index_y() + grid_size_y() * block_index_z()) + grid_size_z();
  char* mine = shared + thread_index() * 16;
  copy_async16(mine, p.in + i * 16, i < 1000);
  copy_async_commit();
  copy_async_wait<1>();
  copy_async_wait<0>();
  barrier();
  named_barrier(1, 64);
  store_shared16(mine, load16(p.in));
  warp_barrier();
  uint32_t a[1][4], b[2][4], c[1][2];
  ldmatrix_x4(a[0], mine);
  ldmatrix_x4_trans(b[0], mine);
  ldmatrix_x4(b[1], mine + 16);
  c[0][0] = b[0][0] ^ b[1][0];
  c[0][1] = b[0][1];
  float d[1][1][4] = {};
  mma_tile<T>(d, a, c);
  float sum = shuffle(d[0][0][0], 3) + shuffle_xor(d[0][0][1], 1) + exp_approx(d[0][0][2]) + rsqrt(d[0][0][3]);
  if (any(sum > 0) && !all(sum > 1) && ballot(sum > 2) != 0) sum += 1;
  store(reinterpret_cast<uint32_t*>(p.out) + i, pack2<T>(sum, to_float(from_float<T>(sum)) + lane() + warp()));
  store_shared(reinterpret_cast<float*>(mine), sum);
  store(p.out + i, load_shared(reinterpret_cast<const float*>(mine)) + load(p.out) + block_size());
  store16(p.out + 4 * i, load_shared16(mine));
}

template <class T, int N, bool TransB>
PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(128, 1) use_wgmma(const PYEFF_GRID_CONSTANT Everything p) {
  if constexpr (kHasWgmma) {
    char* shared = shared_memory();
    store_shared16(shared + thread_index() * 16, load16(p.in));
    async_proxy_fence();
    barrier();
    float d[N / 2];
    for (int i = 0; i < N / 2; ++i) d[i] = load(p.out + i);
    wgmma_pin(d);
    wgmma_fence();
    constexpr int kRow = TransB && N < 64 ? N * 2 : 128;
    for (int k = 0; k < 4; ++k)
      wgmma<T, N, TransB>(d, wgmma_descriptor(shared + 32 * k, 0, 1024),
                          wgmma_descriptor(shared + 8192 + (TransB ? 16 * kRow : 32) * k, 8192, 8 * kRow, kRow), true);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(d);
    for (int i = 0; i < N / 2; ++i) store(p.out + thread_index() * N / 2 + i, d[i]);
  }
}

PYEFF_KERNEL void PYEFF_LAUNCH_BOUNDS(128, 1) use_cluster(const PYEFF_GRID_CONSTANT Everything p) {
  char* peer = cluster_map(shared_memory(), (cluster_rank() + 1) % cluster_size());
  cluster_barrier();
  store_cluster16(peer + 16 * thread_index(), load16(p.in));
  store_cluster(reinterpret_cast<float*>(peer) + 1, 2.0f);
  cluster_barrier();
  store(p.out, load_cluster(reinterpret_cast<float*>(peer)));
  store16(p.out + 4, load_cluster16(peer));
  cluster_barrier();
}

template <class T>
const char* launch_all(const Launch& how, const Everything& p) {
  if (const char* e = launch(use_basics<T>, how, p)) return e;
  if (const char* e = launch(use_wgmma<T, 16, false>, how, p)) return e;
  if (const char* e = launch(use_wgmma<T, 32, true>, how, p)) return e;
  if (const char* e = launch(use_wgmma<T, 64, false>, how, p)) return e;
  if (const char* e = launch(use_wgmma<T, 96, true>, how, p)) return e;
  if (const char* e = launch(use_wgmma<T, 128, false>, how, p)) return e;
  if (const char* e = launch(use_wgmma<T, 192, true>, how, p)) return e;
  if (const char* e = launch(use_wgmma<T, 256, false>, how, p)) return e;
  return launch(use_cluster, how, p);
}

const char* use_everything(const Launch& how, const Everything& p) {
  const char* error = launch_all<bf16>(how, p);
  return error != nullptr ? error : launch_all<f16>(how, p);
}

}  // namespace pyeff::gpu
