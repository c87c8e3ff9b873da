// ldmatrix, mma.sync and wgmma as the PTX ISA describes them, chapter 9.7 (warp-level and warpgroup-level matrix
// instructions): the sections are named at the functions. Products are exact in fp32; sums are in fp32, along K, and in
// no order that the hardware would promise.
#include <cstring>
#include <limits>
#include <vector>

#include "cuda/emulate/machine.h"
#include "cuda/number.cuh"

namespace pyeff::gpu::emulate {
namespace {

float widen(uint16_t bits, bool is_bf16) { return is_bf16 ? to_float(bf16{bits}) : to_float(f16{bits}); }

uint16_t half_at(const char* p) {
  uint16_t x;
  __builtin_memcpy(&x, p, 2);
  return x;
}

// c[rows, n] += a[rows, 16] b[16, n], with rows of `pitch` in b and c.
void multiply(const float* a, const float* b, float* c, int rows, int n, int pitch) {
  for (int i = 0; i < rows; ++i)
    for (int k = 0; k < 16; ++k) {
      const float x = a[i * 16 + k];
      for (int j = 0; j < n; ++j) c[i * pitch + j] += x * b[k * pitch + j];
    }
}

}  // namespace

// "Warp-level matrix load instruction: ldmatrix", .m8n8.x4: rows 0-7 of matrix j come from the addresses of lanes 8j to
// 8j + 7; lane i gets elements 2 (i % 4) and the next of row i / 4, or, transposed, of column i / 4.
void ldmatrix(uint32_t* r, const void* row, bool transposed, Site site) {
  struct Slot {
    uint32_t* r;
    const char* row;
    bool transposed;
  } slot{r, static_cast<const char*>(row), transposed};
  check_shared(row, 16, false, site);
  was_read(row, 16);
  meet_warp(Wait::ldmatrix, site, &slot, false, [&](Thread* const* lanes) {
    for (int i = 0; i < kLanes; ++i) {
      const Slot& to = *static_cast<Slot*>(lanes[i]->slot);
      if (to.transposed != transposed) trap(site, "divergence: ldmatrix with and without transposition");
      for (int j = 0; j < 4; ++j) {
        uint32_t pair = 0;
        for (int h = 0; h < 2; ++h) {
          const int across = 2 * (i % 4) + h, y = transposed ? across : i / 4, x = transposed ? i / 4 : across;
          const Slot& from = *static_cast<Slot*>(lanes[8 * j + y]->slot);
          pair |= uint32_t{half_at(from.row + 2 * x)} << (16 * h);
        }
        to.r[j] = pair;
      }
    }
  });
}

// "Matrix fragments for mma.m16n8k16 with floating point type": with g = lane / 4 and t = lane % 4, register i of a
// holds row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next; register i of b rows 2t + 8i and the next of column g;
// register i of d row g + 8 (i / 2), column 2t + i % 2.
void mma(float* d, const uint32_t* a, const uint32_t* b, int mt, int nt, bool is_bf16, Site site) {
  struct Slot {
    float* d;
    const uint32_t *a, *b;
    int mt, nt;
    bool is_bf16;
  } slot{d, a, b, mt, nt, is_bf16};
  meet_warp(Wait::mma, site, &slot, false, [&](Thread* const* lanes) {
    const auto at = [&](int i) -> const Slot& { return *static_cast<Slot*>(lanes[i]->slot); };
    for (int i = 0; i < kLanes; ++i)
      if (at(i).mt != mt || at(i).nt != nt || at(i).is_bf16 != is_bf16)
        trap(site, "divergence: mma_tile of different types");
    float wide_a[16 * 16], wide_b[16 * 8], sum[16 * 8];
    for (int n = 0; n < nt; ++n) {
      for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < 4; ++j) {
          const uint32_t pair = at(i).b[2 * n + j / 2];
          const int k = 2 * (i % 4) + 8 * (j / 2) + j % 2;
          wide_b[k * 8 + i / 4] = widen(static_cast<uint16_t>(pair >> (16 * (j % 2))), is_bf16);
        }
      for (int m = 0; m < mt; ++m) {
        for (int i = 0; i < kLanes; ++i)
          for (int j = 0; j < 8; ++j) {
            const uint32_t pair = at(i).a[4 * m + j / 2];
            const int y = i / 4 + 8 * (j / 2 % 2), x = 2 * (i % 4) + 8 * (j / 4) + j % 2;
            wide_a[y * 16 + x] = widen(static_cast<uint16_t>(pair >> (16 * (j % 2))), is_bf16);
          }
        const auto place = [](int i, int j) { return (i / 4 + 8 * (j / 2)) * 8 + 2 * (i % 4) + j % 2; };
        for (int i = 0; i < kLanes; ++i)
          for (int j = 0; j < 4; ++j) sum[place(i, j)] = at(i).d[(m * nt + n) * 4 + j];
        multiply(wide_a, wide_b, sum, 16, 8, 8);
        for (int i = 0; i < kLanes; ++i)
          for (int j = 0; j < 4; ++j) at(i).d[(m * nt + n) * 4 + j] = sum[place(i, j)];
      }
    }
  });
}

namespace {

// Addresses in a descriptor have 18 bits. Shared memory begins at 1024 here: the hardware keeps some below for itself.
constexpr uint32_t kSharedBegins = 1024;

// "Matrix descriptor format" of wgmma: start address, leading and stride byte offset, each without its low 4 bits; base
// offset; swizzle mode in bits 62-63: 1, 2 and 3 are those over 128, 64 and 32 bytes.
struct Descriptor {
  uint32_t start, leading, stride, row;
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        row(256u >> (bits >> 62)) {}
};

// "Shared memory matrix layout" and "Strides" of wgmma: where the 16 bytes lie that hold 8 numbers. K-major: row
// `outer` (of M or N), piece `inner` (of the two along K). MN-major: `outer` along K, piece `inner` along N. The
// swizzle is on the address itself: bits 4-6 are XORed with bits 7-9; over 64 bytes 4-5 with 7-8, and over 32 bytes 4
// with 7.
uint32_t piece_at(const Descriptor& d, int outer, int inner, bool mn_major) {
  const uint32_t y = static_cast<uint32_t>(outer), x = static_cast<uint32_t>(inner);
  const uint32_t pieces = d.row / 16;
  uint32_t at = d.start + (y % 8) * d.row + (y / 8) * d.stride;
  at += mn_major ? x / pieces * d.leading + x % pieces * 16 : x * 16;
  return at ^ ((at >> 3) & (d.row - 16));
}

template <class F>
void for_each_piece(const Product& p, F&& body) {
  const Descriptor a(p.a), b(p.b);
  const int outer_a = p.transposed_a ? 16 : 64, inner_a = p.transposed_a ? 8 : 2;
  for (int y = 0; y < outer_a; ++y)
    for (int x = 0; x < inner_a; ++x) body(true, y, x, piece_at(a, y, x, p.transposed_a));
  const int outer = p.transposed ? 16 : p.n, inner = p.transposed ? p.n / 8 : 2;
  for (int y = 0; y < outer; ++y)
    for (int x = 0; x < inner; ++x) body(false, y, x, piece_at(b, y, x, p.transposed));
}

void check_product(const Product& p, const Block& block, Thread* const* group, Site site) {
  Machine& m = machine();
  for (uint64_t bits : {p.a, p.b}) {
    if (bits >> 62 == 0) trap(site, "a descriptor without a swizzle mode");
    if (bits >> 49 & 7) trap(site, "a descriptor with a base offset");
  }
  uint32_t all_fenced = std::numeric_limits<uint32_t>::max();
  for (int i = 0; i < kGroup; ++i) all_fenced = group[i]->fenced_at < all_fenced ? group[i]->fenced_at : all_fenced;
  for_each_piece(p, [&](bool is_a, int y, int x, uint32_t at) {
    const char* name = is_a ? "a" : "b";
    const int64_t offset = int64_t{at} - kSharedBegins;
    if (offset < 0 || offset + 16 > block.shared_bytes)
      trap(site, "wgmma reads %s, row %d, piece %d at offset %lld of shared memory, of which there are %d bytes", name,
           y, x, static_cast<long long>(offset), block.shared_bytes);
    const Stamp& stamp = block.stamps.data()[offset / 16];
    if (stamp.tick < m.cluster_tick || stamp.tick < all_fenced) return;
    const Block& from = *m.blocks.data()[stamp.writer / kMostThreads];
    const Thread& writer = *from.members.data()[stamp.writer % kMostThreads];
    if (writer.fenced_at <= stamp.tick)
      trap(site, "wgmma reads %s, row %d, piece %d, which thread %d wrote without an async_proxy_fence after it", name,
           y, x, writer.index);
  });
}

void note_reads(const Product& p, const Block& block) {
#ifdef PYEFF_TSAN
  for_each_piece(p, [&](bool, int, int, uint32_t at) { was_read(block.shared + (at - kSharedBegins), 16); });
#else
  (void)p, (void)block;
#endif
}

// A hash of the operands' bytes.
uint64_t contents_of(const Product& p, const Block& block) {
  uint64_t hash = 0;
  for_each_piece(p, [&](bool, int, int, uint32_t at) {
    uint64_t x[2];
    __builtin_memcpy(x, block.shared + (at - kSharedBegins), 16);
    for (uint64_t one : x) {
      hash = (hash ^ one) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
  });
  return hash;
}

void run_product(const Pending& pending, const Block& block) {
  const Product& p = pending.product;
  note_reads(p, block);
  const Unseen unseen;
  if (contents_of(p, block) != pending.contents)
    trap(pending.site,
         "the operands of this wgmma changed while it was under way: they had not all arrived, or were "
         "overwritten before its wgmma_wait");
  float a[64 * 16];
  // On the heap: a library that is loaded late has little room for what belongs to a thread.
  static thread_local std::vector<float> room(16 * 256);
  float* const b = room.data();
  for_each_piece(p, [&](bool is_a, int y, int x, uint32_t at) {
    const char* from = block.shared + (at - kSharedBegins);
    for (int i = 0; i < 8; ++i) {
      const float value = widen(half_at(from + 2 * i), p.is_bf16);
      if (is_a && p.transposed_a)
        a[(x * 8 + i) * 16 + y] = value;
      else if (is_a)
        a[y * 16 + x * 8 + i] = value;
      else if (p.transposed)
        b[y * p.n + x * 8 + i] = value;
      else
        b[(x * 8 + i) * p.n + y] = value;
    }
  });
  if (!p.accumulate)
    for (int i = 0; i < 64 * p.n; ++i) pending.sums->value[i] = 0;
  multiply(a, b, pending.sums->value, 64, p.n, p.n);
}

// "Register fragments for wgmma.mma_async.m64nNk16", d: where register i of a thread of the warpgroup lies in the tile.
int place_of(int thread, int i, int n) {
  const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + thread % 4 * 2 + i % 2;
  return row * n + column;
}

Warpgroup& group_of(const Thread& t) { return t.of().groups[t.index / kGroup]; }

// The sums under way on these arrays, or a free place.
Sums& sums_for(Warpgroup& group, const float* d) {
  Sums* free = nullptr;
  for (auto& sums : group.sums) {
    if (sums->used && sums->d[0] == d) return *sums;
    if (!sums->used && free == nullptr) free = sums.get();
  }
  if (free == nullptr) {
    group.sums.emplace_back(new Sums());
    free = group.sums.back().get();
  }
  return *free;
}

bool under_way(const Warpgroup& group, const Thread& t, const float* d) {
  for (const auto& sums : group.sums)
    if (sums->used && sums->d[t.index % kGroup] == d && !sums->taken[t.index % kGroup]) return true;
  return false;
}

}  // namespace

uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes, int swizzle, Site site) {
  const Block& block = self().of();
  if (!block.contains(shared, 0) || reinterpret_cast<uintptr_t>(shared) % 16 != 0)
    trap(site, "a descriptor of %p, which is no place in shared memory, or not aligned to 16", shared);
  if (swizzle != 128 && swizzle != 64 && swizzle != 32) trap(site, "a swizzle over %d bytes", swizzle);
  const auto encode = [&](int64_t bytes) {
    if (bytes < 0 || bytes % 16 != 0 || bytes >= 1 << 18)
      trap(site, "a descriptor cannot hold %lld bytes", static_cast<long long>(bytes));
    return static_cast<uint64_t>(bytes) >> 4;
  };
  return encode(static_cast<const char*>(shared) - block.shared + kSharedBegins) | encode(leading_bytes) << 16 |
         encode(stride_bytes) << 32 |
         uint64_t{swizzle == 128  ? 1u
                  : swizzle == 64 ? 2u
                                  : 3u}
             << 62;
}

void wgmma_fence() { self().settled = true; }

// "wgmma.mma_async": nothing is computed until the wait, but everything is checked now. The hardware reads at any time
// in between, so that the operands must be there already, and must still be there then.
void wgmma(const Product& product, float* d, Site site) {
  Thread& t = self();
  Block& block = t.of();
  Warpgroup& group = group_of(t);
  if (block.threads % kGroup != 0 && t.index / kGroup == block.threads / kGroup)
    trap(site, "wgmma in a warpgroup of less than 4 warps");
  if (!t.settled && !under_way(group, t, d)) trap(site, "wgmma without a wgmma_fence since the last wait");
  if (t.products_issued - t.products_done == kMostGroups) trap(site, "more than %u wgmma under way", kMostGroups);
  struct Slot {
    Product product;
    float* d;
  } slot{product, d};
  t.slot = &slot;
  Thread* const* members = &block.members.data()[t.index / kGroup * kGroup];
  bool last = false;
  meet(group.meeting, members, kGroup, kGroup, Wait::wgmma, site, false, true, [&] {
    last = true;
    Sums& sums = sums_for(group, static_cast<Slot*>(members[0]->slot)->d);
    const bool fresh = !sums.used;
    sums.used = true;
    sums.n = product.n;
    sums.last = group.issued + 1;
    for (int i = 0; i < kGroup; ++i) {
      const Slot& s = *static_cast<Slot*>(members[i]->slot);
      if (s.product.a != product.a || s.product.b != product.b || s.product.accumulate != product.accumulate ||
          s.product.n != product.n || s.product.transposed != product.transposed ||
          s.product.transposed_a != product.transposed_a || s.product.is_bf16 != product.is_bf16)
        trap(site, "the threads of a warpgroup give different operands to wgmma, thread %d for one", members[i]->index);
      if (fresh || sums.taken[i]) {
        sums.d[i] = s.d;
        for (int j = 0; j < product.n / 2; ++j) sums.value[place_of(i, j, product.n)] = s.d[j];
      }
      sums.taken[i] = false;
      for (int j = 0; j < product.n / 2; ++j) s.d[j] = float_of(0xffffffffu);
    }
    check_product(product, block, members, site);
    group.pending[group.issued++ % kMostGroups] = {product, &sums, site, contents_of(product, block)};
  });
  if (last) note_reads(product, block);
  ++t.products_issued;
}

void wgmma_commit() {
  Thread& t = self();
  t.product_boundary[t.product_groups++ % kMostGroups] = t.products_issued;
}

void wgmma_wait(int groups, Site site) {
  meet_warp(Wait::wgmma_wait, site, nullptr, false, [](Thread* const*) {});
  Thread& t = self();
  t.settled = false;
  if (t.product_groups > static_cast<unsigned>(groups))
    finish_products(t.product_boundary[(t.product_groups - static_cast<unsigned>(groups) - 1) % kMostGroups]);
}

void finish_products(unsigned target) {
  Thread& t = self();
  Warpgroup& group = group_of(t);
  if (static_cast<int>(target - t.products_done) <= 0) return;
  for (; static_cast<int>(target - group.done) > 0; ++group.done)
    run_product(group.pending[group.done % kMostGroups], t.of());
  t.products_done = target;
  const int at = t.index % kGroup;
  for (auto& sums : group.sums) {
    if (!sums->used || sums->taken[at] || static_cast<int>(target - sums->last) < 0) continue;
    for (int i = 0; i < sums->n / 2; ++i) sums->d[at][i] = sums->value[place_of(at, i, sums->n)];
    sums->taken[at] = true;
    int taken = 0;
    for (bool one : sums->taken) taken += one;
    sums->used = taken != kGroup;
  }
}

}  // namespace pyeff::gpu::emulate
