// The machine on which the emulated kernels run: what the primitives need of it, and what a host may ask of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyeff::gpu {

struct Launch;

namespace emulate {

// Where in the kernel's source something was called.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file, int line) { return {file, line}; }
};

// The part of a block and of a thread that the indices are read from; machine.h has the rest.
struct BlockView {
  char* shared;
  int shared_bytes;
  int threads, rank, cluster_size;
  int index[3], grid[3];
};
struct ThreadView {
  BlockView* block;
  int index;
};
// Plain thread-local pointers in the library's own block: no call, no guard.
#define PYEFF_THREAD_LOCAL __thread __attribute__((tls_model("initial-exec")))
extern PYEFF_THREAD_LOCAL ThreadView* running;

// The global memory that the launches of this OS thread may touch, as long as the object lives. Where none is alive,
// global accesses are not checked. Objects end in the reverse order of their beginning.
class Buffers {
 public:
  Buffers();
  ~Buffers();
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;
  // The name, for the reports, is not copied. Nothing is added for 0 bytes.
  void reads(const void* data, size_t bytes, const char* name);
  void writes(void* data, size_t bytes, const char* name);

 private:
  int before_;
};

// What a launch is refused for. The defaults are those of sm_90; tests of other processors change them.
struct Limits {
  int threads = 1024;
  int shared_bytes = 227 * 1024;
  int cluster = 8;
};
Limits& limits();

// Runs the kernel; null, or what went wrong: valid until this OS thread's next launch.
const char* launch(const Launch& how, const char* caller, void (*run)(const void*), const void* call);

void block_barrier(Site);
void named_barrier(int id, int threads, Site);
void warp_barrier(Site);
void cluster_barrier(Site);
uint64_t shuffle(uint64_t bits, int from, Site);
uint32_t ballot(bool, Site);

void check_global(const void* p, int bytes, bool write, Site);
void check_shared(const void* p, int bytes, bool write, Site);
void check_cluster(const void* p, int bytes, bool write, Site);
void* cluster_map(void* shared, int rank, Site);

void copy_async(void* shared, const void* global, bool valid, Site);
void copy_async_commit();
void copy_async_wait(int groups);

void ldmatrix(uint32_t* r, const void* row, bool transposed, Site);
void mma(float* d, const uint32_t* a, const uint32_t* b, int mt, int nt, bool is_bf16, Site);

struct Product {
  uint64_t a, b;
  int n;
  bool transposed, transposed_a, is_bf16, accumulate;
};
void wgmma_fence();
void wgmma(const Product&, float* d, Site);
void wgmma_commit();
void wgmma_wait(int groups, Site);
uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes, int swizzle, Site);
void async_proxy_fence();

}  // namespace emulate
}  // namespace pyeff::gpu
