// A launch: what the hardware would refuse, then cluster after cluster.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <numeric>

#include "cuda/emulate/machine.h"
#include "cuda/portable.cuh"

namespace pyeff::gpu::emulate {
namespace {

// Around shared memory, so that near misses of unchecked accesses hit nothing else; watched by AddressSanitizer.
constexpr size_t kRedzone = 4096;

size_t window_bytes() { return 2 * kRedzone + (static_cast<size_t>(limits().shared_bytes) + 4095) / 4096 * 4096; }

const char* complain(const std::string& name, const std::string& what) {
  machine().report = "kernel " + name + ": " + what;
  return machine().report.c_str();
}

std::string name_of(const Launch& how, const char* caller) {
  if (how.name != nullptr) return how.name;
  // "... launch(...) [with P = name]", or without "with".
  const char* begin = std::strstr(caller, "P = ");
  if (begin == nullptr) return caller;
  return std::string(begin + 4, std::strcspn(begin + 4, ";]"));
}

std::string refusal(const Launch& how) {
  const Limits& most = limits();
  const auto wrong = [](const char* what, int value, const std::string& why) {
    return std::string(what) + " is " + std::to_string(value) + ", " + why;
  };
  if (how.grid_x < 1) return wrong("grid_x", how.grid_x, "not at least 1");
  if (how.grid_y < 1 || how.grid_y > 65535) return wrong("grid_y", how.grid_y, "not in 1 to 65535");
  if (how.grid_z < 1 || how.grid_z > 65535) return wrong("grid_z", how.grid_z, "not in 1 to 65535");
  if (how.threads < 1 || how.threads > most.threads || how.threads > kMostThreads)
    return wrong("threads", how.threads, "not in 1 to " + std::to_string(most.threads));
  if (how.threads % kLanes != 0) return wrong("threads", how.threads, "not whole warps");
  if (how.cluster < 1 || how.cluster > most.cluster || how.cluster > kMostBlocks)
    return wrong("cluster", how.cluster, "not in 1 to " + std::to_string(most.cluster));
  if (how.grid_x % how.cluster != 0)
    return wrong("grid_x", how.grid_x, "not a multiple of the cluster, " + std::to_string(how.cluster));
  if (how.shared_bytes < 0 || how.shared_bytes > most.shared_bytes)
    return wrong("shared_bytes", how.shared_bytes, "not in 0 to " + std::to_string(most.shared_bytes));
  return "";
}

// Memory for the blocks and fibers for the threads, as many as were never needed before.
bool provide(const Launch& how) {
  Machine& m = machine();
  m.cluster = how.cluster;
  m.live = how.cluster * how.threads;
  while (m.blocks.size() < static_cast<size_t>(how.cluster)) m.blocks.emplace_back(new Block());
  for (int i = 0; i < how.cluster; ++i) {
    Block& block = *m.blocks[static_cast<size_t>(i)];
    block.threads = how.threads;
    block.cluster_size = how.cluster;
    block.rank = i;
    block.shared_bytes = how.shared_bytes;
    block.grid[0] = how.grid_x;
    block.grid[1] = how.grid_y;
    block.grid[2] = how.grid_z;
    block.members.resize(static_cast<size_t>(how.threads));
    block.stamps.resize(static_cast<size_t>(how.shared_bytes / 16 + 1));
  }
  while (m.threads.size() < static_cast<size_t>(m.live)) {
    m.threads.emplace_back(new Thread());
    Thread& t = *m.threads.back();
    t.wait = Wait::ended;
    if (!t.fiber.prepare(live, &t)) return false;
  }
  m.ready.resize(static_cast<size_t>(m.live / kLanes));
  m.ready_warps.resize(m.ready.size());
  return true;
}

// Fresh shared memory full of NaN. A new mapping, where ThreadSanitizer must forget the block before.
bool provide_shared(Block& block) {
#ifndef PYEFF_TSAN
  if (block.window == nullptr)
#endif
  {
    const int fixed = block.window != nullptr ? MAP_FIXED : 0;
    void* memory =
        mmap(block.window, window_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);
    if (memory == MAP_FAILED) return false;
    block.window = static_cast<char*>(memory);
    block.shared = block.window + kRedzone;
  }
  unpoison(block.window, window_bytes());
  std::memset(block.shared, 0xff, static_cast<size_t>(block.shared_bytes));
  poison(block.window, kRedzone);
  poison(block.shared + block.shared_bytes, window_bytes() - kRedzone - static_cast<size_t>(block.shared_bytes));
  return true;
}

void begin(Block& block) {
  for (Meeting& meeting : block.barriers) meeting.arrived = 0;
  for (Meeting& meeting : block.warps) meeting.arrived = 0;
  for (Warpgroup& group : block.groups) {
    group.meeting.arrived = 0;
    group.issued = group.done = 0;
    for (auto& sums : group.sums) sums->used = false;
  }
  block.touched = false;
}

void begin(Thread& t, Block& block, int index) {
  t.block = &block;
  t.index = index;
  t.warp = (block.rank * block.threads + index) / kLanes;
  t.wait = Wait::none;
  t.at = nullptr;
  t.fenced_at = 0;
  t.copies_issued = t.copies_done = t.copy_groups = 0;
  t.products_issued = t.products_done = t.product_groups = 0;
  t.settled = false;
  block.members[static_cast<size_t>(index)] = &t;
}

// Runs the cluster whose first block has this index; what went wrong, or nothing.
std::string run_cluster(const Launch& how, int64_t number, uint64_t seed) {
  Machine& m = machine();
  const int across = how.grid_x / how.cluster;
  const int at[3] = {static_cast<int>(number % across) * how.cluster, static_cast<int>(number / across % how.grid_y),
                     static_cast<int>(number / across / how.grid_y)};
  m.random = seed + static_cast<uint64_t>(number) * 0xd1342543de82ef95u;
  m.ended = m.ready_count = 0;
  for (Ready& warp : m.ready) warp.count = 0;
  m.cluster_meeting.arrived = 0;
  m.cluster_meeting.phase = 0;
  m.cluster_tick = ++m.tick;
  for (int b = 0; b < how.cluster; ++b) {
    Block& block = *m.blocks[static_cast<size_t>(b)];
    block.index[0] = at[0] + b;
    block.index[1] = at[1];
    block.index[2] = at[2];
    if (!provide_shared(block)) return "no memory for its shared memory";
    begin(block);
    for (int i = 0; i < how.threads; ++i) {
      // Another fiber for the same thread of each block, so that ThreadSanitizer does not take blocks for one thread.
      const int fiber = static_cast<int>((b * how.threads + i + number * 37) % m.live);
      Thread& t = *m.threads[static_cast<size_t>(fiber)];
      begin(t, block, i);
      make_ready(t);
    }
  }
  m.complaint[0] = '\0';
  release(&m.begun);
  draw_manner();
  Thread* first = pick_ready();
  running = first;
  m.host.change_to(first->fiber);
  running = nullptr;
  std::string what;
  if (m.complaint[0] != '\0') {
    acquire(&m.finished);
    what = m.complaint;
  } else if (m.ended != m.live) {
    what = describe_waiting();
  } else {
    for (int b = 0; b < how.cluster && what.empty(); ++b) {
      const Block& block = *m.blocks[static_cast<size_t>(b)];
      if (!block.touched || block.touched_phase != m.cluster_meeting.phase) continue;
      what = "block " + std::to_string(b) + " of the cluster may have ended before block " +
             std::to_string(block.toucher->block->rank) + " uses its shared memory (" + place(block.touch) +
             "): no cluster_barrier comes after";
    }
    return what;
  }
  // Who did not come to the end begins anew.
  for (int i = 0; i < m.live; ++i) {
    Thread& t = *m.threads[static_cast<size_t>(i)];
    if (t.wait != Wait::ended) {
      t.fiber.order(m.host, &m.finished);
      t.fiber.prepare(live, &t);
    }
    t.wait = Wait::ended;
  }
  acquire(&m.finished);
  return what;
}

// False where it is set to something that is no number.
bool chosen_seed(uint64_t* seed) {
  *seed = 1;
  const char* text = std::getenv("PYEFF_EMULATE_SEED");
  if (text == nullptr) return true;
  char* end = nullptr;
  *seed = std::strtoull(text, &end, 10);
  return end != text && *end == '\0';
}

}  // namespace

Block::~Block() {
  if (window == nullptr) return;
  unpoison(window, window_bytes());
  munmap(window, window_bytes());
}

Limits& limits() {
  static Limits all;
  return all;
}

namespace {
// One for each OS thread: a lock would order what is to be seen as a race.
std::set<std::string>& own_launched() {
  static thread_local std::set<std::string> names;
  return names;
}
}  // namespace

const std::set<std::string>& launched() { return own_launched(); }

const char* launch(const Launch& how, const char* caller, void (*run)(const void*), const void* call) {
  Machine& m = own_machine();
  const std::string name = name_of(how, caller);
  if (running != nullptr) return complain(name, "launched by a kernel");
  const std::string why = refusal(how);
  if (!why.empty()) return complain(name, "cannot be launched: " + why);
  if (!provide(how)) return complain(name, "no memory for its threads");
  m.run = run;
  m.call = call;
  m.host.adopt();
  uint64_t seed;
  if (!chosen_seed(&seed))
    return complain(name, std::string("PYEFF_EMULATE_SEED is '") + std::getenv("PYEFF_EMULATE_SEED") +
                              "', expected a whole number");
  const int64_t clusters = int64_t{how.grid_x / how.cluster} * how.grid_y * how.grid_z;
  // Blocks come in any order on a GPU: a stride without a common divisor takes each once.
  uint64_t state = seed;
  int64_t stride = static_cast<int64_t>(draw(state) % static_cast<uint64_t>(clusters)) | 1;
  while (std::gcd(stride, clusters) != 1) stride += 2;
  int64_t number = static_cast<int64_t>(draw(state) % static_cast<uint64_t>(clusters));
  for (int64_t i = 0; i < clusters; ++i) {
    const std::string what = run_cluster(how, number, seed);
    if (!what.empty()) {
      acquire(&m.finished);
      return complain(name, what + " [PYEFF_EMULATE_SEED=" + std::to_string(seed) + "]");
    }
    number = (number + stride) % clusters;
  }
  own_launched().insert(name);
  // Not after each cluster: the blocks of a grid are not ordered, and their collisions are to be seen.
  acquire(&m.finished);
  return nullptr;
}

}  // namespace pyeff::gpu::emulate
