// The emulated machine: the threads of one cluster, the places where they meet, and who runs next. One for each OS
// thread that launches, so that nothing here is shared between OS threads.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "cuda/emulate/emulate.h"
#include "cuda/emulate/fiber.h"
#include "cuda/emulate/sanitize.h"

namespace pyeff::gpu::emulate {

constexpr int kLanes = 32;
constexpr int kGroup = 128;
constexpr int kMostBlocks = 8;
constexpr int kMostThreads = 1024;

// What a thread is at.
enum class Wait : uint8_t {
  none,
  barrier,
  named_barrier,
  warp_barrier,
  cluster_barrier,
  shuffle,
  vote,
  ldmatrix,
  mma,
  wgmma,
  wgmma_wait,
  ended
};
const char* name_of(Wait);

// A place where a fixed number of threads wait for each other.
struct Meeting {
  Wait kind = Wait::none;
  Site site = {"", 0};
  int arrived = 0, wanted = 0;
  unsigned phase = 0;
  // What the barrier orders, for ThreadSanitizer. Two in turn: who is late to leave one phase must not be ordered after
  // what somebody quick does in the next.
  char order[2] = {};
};

struct Block;

struct Copy {
  char* to;
  const char* from;
  bool valid;
};

// Copies and groups of a thread that may be under way.
constexpr unsigned kMostCopies = 512, kMostGroups = 64;

struct Thread : ThreadView {
  Fiber fiber;
  Wait wait = Wait::none;
  Site site = {"", 0};
  Meeting* at = nullptr;
  int barrier_id = 0;
  int warp = 0;          // in the cluster
  void* slot = nullptr;  // the operands of the collective at which it waits
  uint32_t fenced_at = 0;
  // Asynchronous copies: those from done to issued are under way; group g ends before copy boundary[g % kMostGroups].
  std::unique_ptr<Copy[]> copies{new Copy[kMostCopies]};
  unsigned copies_issued = 0, copies_done = 0, copy_groups = 0;
  unsigned copy_boundary[kMostGroups] = {};
  // The same for wgmma. `settled`: a fence came after the last wait.
  unsigned products_issued = 0, products_done = 0, product_groups = 0;
  unsigned product_boundary[kMostGroups] = {};
  bool settled = false;

  Block& of() const;
};

// Sums of the wgmmas on one array d, until each thread of the warpgroup has waited.
struct Sums {
  bool used = false;
  int n = 0;
  unsigned last = 0;  // the number of the last product that adds here, from 1
  float* d[kGroup] = {};
  bool taken[kGroup] = {};
  float value[64 * 256];
};

struct Pending {
  Product product;
  Sums* sums;
  Site site;
  uint64_t contents;  // of the operands when it was issued
};

// The products of four warps, in the order in which they were issued.
struct Warpgroup {
  Meeting meeting;
  std::vector<std::unique_ptr<Sums>> sums;
  Pending pending[kMostGroups];
  unsigned issued = 0, done = 0;
};

// Who wrote 16 bytes of shared memory last, and when, in the count of proxy fences.
struct Stamp {
  uint32_t tick = 0;
  uint32_t writer = 0;  // thread in the cluster
};

struct Block : BlockView {
  Meeting barriers[16], warps[kMostThreads / kLanes];
  Warpgroup groups[kMostThreads / kGroup];
  std::vector<Thread*> members;
  std::vector<Stamp> stamps;
  char* window = nullptr;  // the memory around `shared`
  // The last access from another block: in which phase of the cluster, whose, and where.
  bool touched = false;
  unsigned touched_phase = 0;
  const Thread* toucher = nullptr;
  Site touch = {"", 0};

  ~Block();
  bool contains(const void* p, int bytes) const {
    const char* at = static_cast<const char*>(p);
    return at >= shared && at + bytes <= shared + shared_bytes;
  }
};

inline Block& Thread::of() const { return *static_cast<Block*>(block); }

// The threads of a warp that may go on.
struct Ready {
  Thread* lanes[kLanes];
  int count = 0;
};

struct Range {
  uintptr_t begin, size;
  bool writable;
  const char* name;
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;  // all that there ever were; of which `live` are in the cluster
  std::vector<std::unique_ptr<Block>> blocks;
  int live = 0, cluster = 1, ended = 0;
  // Who may go on: warp by warp, and which warps have somebody.
  std::vector<Ready> ready;
  std::vector<int> ready_warps;
  int ready_count = 0, last_warp = 0;
  bool greedy = false;  // the warp that ran goes on as long as it can
  Fiber host;
  Meeting cluster_meeting;
  uint32_t tick = 0, cluster_tick = 0;  // proxy fences so far; when the cluster began
  uint64_t random = 1;
  // For ThreadSanitizer: what the host does before a launch, and what the threads did before its end.
  char begun = 0, finished = 0;
  void (*run)(const void*) = nullptr;
  const void* call = nullptr;
  char complaint[1024] = {};
  std::string report;
  std::vector<Range> ranges;
  size_t last_range = 0;
  bool busy = false;
};

extern PYEFF_THREAD_LOCAL Machine* machine_in_use;
// The machine of this OS thread; inside a launch or the life of a Buffers it is known.
Machine& own_machine();
inline Machine& machine() { return *machine_in_use; }

inline Thread& self() { return *static_cast<Thread*>(running); }
inline uint64_t draw(uint64_t& state) {
  state += 0x9e3779b97f4a7c15u;
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
inline int number_of(const Thread& t) { return t.block->rank * kMostThreads + t.index; }

void make_ready(Thread&);
// Takes one of those who may go on, or nobody.
Thread* pick_ready();
// From now on, until the next call, the seed decides in this way or that; see pick_ready.
void draw_manner();
// Lets another thread run; returns when somebody made this one ready.
void give_way();
// Ends the launch with this complaint about the running thread.
[[noreturn]] void trap(Site, const char* format, ...) __attribute__((format(printf, 2, 3)));
// The life of a fiber: the kernel, again and again.
void live(void* thread);
// Which threads wait where; for a cluster in which nobody can go on.
std::string describe_waiting();
std::string place(Site);

bool same(Site, Site);
// Counts the running thread in; true if it is the last. Traps if others are there for something else.
bool arrive(Meeting&, int wanted, Wait kind, Site, bool same_site);
// Makes ready who waits there, of `count` threads from `first`, and the running thread; then lets somebody run.
void release_all(Meeting&, Thread* const* first, int count);

// Everybody waits until all are there. The last one first does `action`. Memory is ordered if `orders`.
template <class F>
void meet(Meeting& meeting, Thread* const* members, int count, int wanted, Wait kind, Site site, bool orders,
          bool same_site, F&& action) {
  char* order = &meeting.order[meeting.phase & 1];
  if (orders) release(order);
  if (arrive(meeting, wanted, kind, site, same_site)) {
    {
      const Unseen unseen;
      action();
    }
    release_all(meeting, members, count);
  } else {
    give_way();
  }
  if (orders) acquire(order);
}

// The same for the lanes of a warp; action gets the 32 threads.
template <class F>
void meet_warp(Wait kind, Site site, void* slot, bool orders, F&& action) {
  Thread& t = self();
  t.slot = slot;
  Thread* const* lanes = &t.of().members[static_cast<size_t>(t.index / kLanes * kLanes)];
  meet(t.of().warps[t.index / kLanes], lanes, kLanes, kLanes, kind, site, orders, true, [&] { action(lanes); });
}

// The names of the kernels that this OS thread has launched.
const std::set<std::string>& launched();

// Finishes the products up to the number `target` as far as the running thread is concerned.
void finish_products(unsigned target);
// Does the copies up to the number `target`.
void finish_copies(unsigned target);

}  // namespace pyeff::gpu::emulate
