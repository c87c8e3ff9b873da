// Global and shared memory: the checks of every access, and the asynchronous copies.
#include <cstring>

#include "cuda/emulate/machine.h"

namespace pyeff::gpu::emulate {
namespace {

// NaN in every type of the kernels.
constexpr unsigned char kPoison = 0xff;

const Range* range_of(uintptr_t at, int bytes) {
  Machine& m = machine();
  const Range* ranges = m.ranges.data();
  const size_t count = m.ranges.size();
  const uintptr_t size = static_cast<uintptr_t>(bytes);
  // Offsets below 0 become large.
  const auto inside = [&](const Range& r) { return r.size >= size && at - r.begin <= r.size - size; };
  if (m.last_range < count && inside(ranges[m.last_range])) return &ranges[m.last_range];
  for (size_t i = 0; i < count; ++i) {
    if (inside(ranges[i])) {
      m.last_range = i;
      return &ranges[i];
    }
  }
  return nullptr;
}

[[noreturn]] void outside(uintptr_t at, int bytes, bool write, Site site) {
  const Range* nearest = nullptr;
  uintptr_t distance = 0;
  bool after = false;
  for (const Range& r : machine().ranges) {
    const uintptr_t end = r.begin + r.size;
    const bool above = at + static_cast<uintptr_t>(bytes) > end;
    const uintptr_t gap = above ? (at >= end ? at - end : 0) : (r.begin > at ? r.begin - at : 0);
    if (nearest == nullptr || gap < distance) {
      nearest = &r;
      distance = gap;
      after = above;
    }
  }
  const char* what = write ? "a store" : "a load";
  if (nearest == nullptr)
    trap(site, "%s of %d bytes at 0x%llx, and the launch has no buffers", what, bytes, (unsigned long long)at);
  trap(site, "%s of %d bytes at 0x%llx is outside of every buffer; the nearest, %s (%llu bytes), %s %llu bytes %s it",
       what, bytes, (unsigned long long)at, nearest->name, (unsigned long long)nearest->size, after ? "ends" : "begins",
       (unsigned long long)distance, after ? "before" : "after");
}

void check_alignment(const void* p, int bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0)
    trap(site, "an access of %d bytes at %p is misaligned", bytes, p);
}

void stamp(Block& block, const void* p, int writer) {
  const size_t piece = static_cast<size_t>(static_cast<const char*>(p) - block.shared) / 16;
  block.stamps.data()[piece] = {machine().tick, static_cast<uint32_t>(writer)};
}

[[noreturn]] void outside_shared(const void* p, int bytes, bool write, const Block& block, Site site) {
  trap(site, "%s of %d bytes at offset %lld of shared memory, of which the launch has %d bytes",
       write ? "a store" : "a load", bytes, static_cast<long long>(static_cast<const char*>(p) - block.shared),
       block.shared_bytes);
}

// Small constant sizes, so that the compiler copies by itself: memcpy would be seen by ThreadSanitizer as another
// access.
void copy16(char* to, const char* from) {
  uint64_t x[2];
  __builtin_memcpy(x, from, 16);
  __builtin_memcpy(to, x, 16);
}
void fill16(char* to, unsigned char byte) {
  const uint64_t x[2] = {byte * 0x0101010101010101u, byte * 0x0101010101010101u};
  __builtin_memcpy(to, x, 16);
}

}  // namespace

Buffers::Buffers() : before_(static_cast<int>(own_machine().ranges.size())) {}
Buffers::~Buffers() { machine().ranges.resize(static_cast<size_t>(before_)); }
void Buffers::reads(const void* data, size_t bytes, const char* name) {
  if (bytes != 0) machine().ranges.push_back({reinterpret_cast<uintptr_t>(data), bytes, false, name});
}
void Buffers::writes(void* data, size_t bytes, const char* name) {
  if (bytes != 0) machine().ranges.push_back({reinterpret_cast<uintptr_t>(data), bytes, true, name});
}

void check_global(const void* p, int bytes, bool write, Site site) {
  check_alignment(p, bytes, site);
  if (machine().ranges.empty()) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  const Range* range = range_of(at, bytes);
  if (range == nullptr) outside(at, bytes, write, site);
  if (write && !range->writable) {
    // The same memory may be registered once more, for writing.
    for (const Range& r : machine().ranges)
      if (r.writable && at - r.begin <= r.size - static_cast<uintptr_t>(bytes) &&
          r.size >= static_cast<uintptr_t>(bytes))
        return;
    trap(site, "a store into %s, which is only to be read", range->name);
  }
}

void check_shared(const void* p, int bytes, bool write, Site site) {
  Thread& t = self();
  Block& block = t.of();
  if (!block.contains(p, bytes)) outside_shared(p, bytes, write, block, site);
  check_alignment(p, bytes, site);
  if (write) stamp(block, p, number_of(t));
}

void* cluster_map(void* shared, int rank, Site site) {
  Machine& m = machine();
  const Block& block = self().of();
  if (rank < 0 || rank >= m.cluster) trap(site, "cluster_map to block %d of a cluster of %d", rank, m.cluster);
  // One past the end may be named.
  if (!block.contains(shared, 0)) outside_shared(shared, 0, false, block, site);
  return m.blocks.data()[rank]->shared + (static_cast<char*>(shared) - block.shared);
}

void check_cluster(const void* p, int bytes, bool write, Site site) {
  Machine& m = machine();
  Thread& t = self();
  for (int i = 0; i < m.cluster; ++i) {
    Block& block = *m.blocks.data()[i];
    if (!block.contains(p, bytes)) continue;
    check_alignment(p, bytes, site);
    if (i != t.block->rank) {
      if (m.cluster_meeting.phase == 0)
        trap(site, "block %d of the cluster may not have begun: no cluster_barrier came before this access", i);
      block.touched = true;
      block.touched_phase = m.cluster_meeting.phase;
      block.toucher = &t;
      block.touch = site;
    }
    if (write) stamp(block, p, number_of(t));
    return;
  }
  trap(site, "%s of %d bytes at %p is in no shared memory of the cluster", write ? "a store" : "a load", bytes, p);
}

void copy_async(void* shared, const void* global, bool valid, Site site) {
  Thread& t = self();
  check_shared(shared, 16, true, site);
  if (valid) check_global(global, 16, false, site);
  if (t.copies_issued - t.copies_done == kMostCopies) trap(site, "more than %u copies under way", kMostCopies);
  char* to = static_cast<char*>(shared);
  t.copies[t.copies_issued++ % kMostCopies] = {to, static_cast<const char*>(global), valid};
  if (valid) was_read(global, 16);
  was_written(to, 16);
  fill16(to, kPoison);
}

void copy_async_commit() {
  Thread& t = self();
  t.copy_boundary[t.copy_groups++ % kMostGroups] = t.copies_issued;
}

void copy_async_wait(int groups) {
  Thread& t = self();
  if (t.copy_groups <= static_cast<unsigned>(groups)) return;
  finish_copies(t.copy_boundary[(t.copy_groups - static_cast<unsigned>(groups) - 1) % kMostGroups]);
}

void finish_copies(unsigned target) {
  Thread& t = self();
  for (; static_cast<int>(target - t.copies_done) > 0; ++t.copies_done) {
    const Copy& copy = t.copies[t.copies_done % kMostCopies];
    was_written(copy.to, 16);
    if (copy.valid) {
      was_read(copy.from, 16);
      copy16(copy.to, copy.from);
    } else {
      fill16(copy.to, 0);
    }
    stamp(t.of(), copy.to, number_of(t));
  }
}

void async_proxy_fence() { self().fenced_at = ++machine().tick; }

}  // namespace pyeff::gpu::emulate
