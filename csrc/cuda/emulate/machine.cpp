#include "cuda/emulate/machine.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>

namespace pyeff::gpu::emulate {

PYEFF_THREAD_LOCAL ThreadView* running = nullptr;
PYEFF_THREAD_LOCAL Machine* machine_in_use = nullptr;
__thread int unseen_now = 0;

Machine& own_machine() {
  static thread_local const std::unique_ptr<Machine> own = std::make_unique<Machine>();
  machine_in_use = own.get();
  return *own;
}

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::none:
      return "the kernel's code";
    case Wait::barrier:
      return "barrier";
    case Wait::named_barrier:
      return "named_barrier";
    case Wait::warp_barrier:
      return "warp_barrier";
    case Wait::cluster_barrier:
      return "cluster_barrier";
    case Wait::shuffle:
      return "shuffle";
    case Wait::vote:
      return "ballot, any or all";
    case Wait::ldmatrix:
      return "ldmatrix";
    case Wait::mma:
      return "mma_tile";
    case Wait::wgmma:
      return "wgmma";
    case Wait::wgmma_wait:
      return "wgmma_wait";
    case Wait::ended:
      return "the kernel's end";
  }
  return "";
}

std::string place(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

void make_ready(Thread& t) {
  Machine& m = machine();
  Ready& ready = m.ready.data()[t.warp];
  if (ready.count == 0) m.ready_warps.data()[m.ready_count++] = t.warp;
  ready.lanes[ready.count++] = &t;
}

void draw_manner() { machine().greedy = draw(machine().random) % 4 != 0; }

// A barrier too few shows when one warp is far ahead of another one, which it never is while the choice falls on any
// thread each time: who runs a warp to its end before the next one begins sees it. But a warp must be interrupted, too,
// where it meets in shuffles. So between two barriers of a block it is the one or the other.
Thread* pick_ready() {
  Machine& m = machine();
  if (m.ready_count == 0) return nullptr;
  const uint64_t random = draw(m.random);
  int at = static_cast<int>((random >> 32) % static_cast<uint64_t>(m.ready_count));
  if (m.greedy && m.ready.data()[m.last_warp].count != 0)
    while (m.ready_warps.data()[at] != m.last_warp) at = at + 1 == m.ready_count ? 0 : at + 1;
  m.last_warp = m.ready_warps.data()[at];
  Ready& ready = m.ready.data()[m.last_warp];
  const uint32_t lane = static_cast<uint32_t>(random) % static_cast<uint32_t>(ready.count);
  Thread* picked = ready.lanes[lane];
  ready.lanes[lane] = ready.lanes[--ready.count];
  if (ready.count == 0) m.ready_warps.data()[at] = m.ready_warps.data()[--m.ready_count];
  return picked;
}

void give_way() {
  Machine& m = machine();
  Thread& from = self();
  Thread* to = pick_ready();
  if (to == nullptr) {
    from.fiber.change_to(m.host);
    return;
  }
  if (to == &from) return;
  running = to;
  from.fiber.change_to(to->fiber);
}

void trap(Site site, const char* format, ...) {
  Machine& m = machine();
  const Thread& t = self();
  int used = std::snprintf(
      m.complaint, sizeof m.complaint, "block (%d, %d, %d), thread %d (warp %d, lane %d), %s:%d: ", t.block->index[0],
      t.block->index[1], t.block->index[2], t.index, t.index / kLanes, t.index % kLanes, site.file, site.line);
  if (used < 0 || used >= static_cast<int>(sizeof m.complaint)) used = 0;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(m.complaint + used, sizeof m.complaint - static_cast<size_t>(used), format, arguments);
  va_end(arguments);
  Unseen::end_all();
  release(&m.finished);
  self().fiber.change_to(m.host);
  __builtin_unreachable();
}

void live(void* thread) {
  Machine& m = machine();
  Thread& t = *static_cast<Thread*>(thread);
  for (;;) {
    acquire(&m.begun);
    m.run(m.call);
    if (t.products_done != t.products_issued) trap(t.site, "ends without a wgmma_wait for its last wgmma");
    t.wait = Wait::ended;
    ++m.ended;
    release(&m.finished);
    give_way();
  }
}

bool arrive(Meeting& meeting, int wanted, Wait kind, Site site, bool same_site) {
  Thread& t = self();
  if (meeting.arrived == 0) {
    meeting.kind = kind;
    meeting.site = site;
    meeting.wanted = wanted;
  } else if (meeting.kind != kind || (same_site && !same(meeting.site, site))) {
    trap(site, "divergence: it comes to %s while others wait at %s (%s:%d)", name_of(kind), name_of(meeting.kind),
         meeting.site.file, meeting.site.line);
  } else if (meeting.wanted != wanted) {
    trap(site, "it expects %d threads here, others (%s:%d) expect %d", wanted, meeting.site.file, meeting.site.line,
         meeting.wanted);
  }
  t.wait = kind;
  t.site = site;
  t.at = &meeting;
  return ++meeting.arrived == wanted;
}

void release_all(Meeting& meeting, Thread* const* first, int count) {
  for (int i = 0; i < count; ++i) {
    Thread& t = *first[i];
    if (t.at != &meeting) continue;
    t.at = nullptr;
    t.wait = Wait::none;
    make_ready(t);
  }
  if (count > kLanes) draw_manner();
  meeting.arrived = 0;
  ++meeting.phase;
  give_way();
}

namespace {

// "0-31, 64".
std::string list(const std::vector<int>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    if (!text.empty()) text += ", ";
    text += std::to_string(numbers[i]);
    if (end > i + 1) text += "-" + std::to_string(numbers[end - 1]);
    i = end;
  }
  return text;
}

}  // namespace

std::string describe_waiting() {
  Machine& m = machine();
  std::string text = "divergence, no thread can go on:";
  for (int b = 0; b < m.cluster; ++b) {
    const Block& block = *m.blocks[static_cast<size_t>(b)];
    std::map<std::tuple<int, int, std::string>, std::vector<int>> places;
    for (const Thread* t : block.members)
      places[{static_cast<int>(t->wait), t->wait == Wait::named_barrier ? t->barrier_id : 0,
              t->wait == Wait::ended ? std::string() : place(t->site)}]
          .push_back(t->index);
    text += " block (" + std::to_string(block.index[0]) + ", " + std::to_string(block.index[1]) + ", " +
            std::to_string(block.index[2]) + "):";
    const char* between = " ";
    for (const auto& entry : places) {
      const Wait wait = static_cast<Wait>(std::get<0>(entry.first));
      text += between + ("threads " + list(entry.second));
      if (wait == Wait::ended) {
        text += " have ended";
      } else {
        text += std::string(" wait at ") + name_of(wait);
        if (wait == Wait::named_barrier) text += " " + std::to_string(std::get<1>(entry.first));
        text += " (" + std::get<2>(entry.first) + ")";
      }
      between = ", ";
    }
    text += ";";
  }
  text.pop_back();
  return text;
}

void block_barrier(Site site) {
  Block& block = self().of();
  meet(block.barriers[0], block.members.data(), block.threads, block.threads, Wait::barrier, site, true, true, [] {});
}

void named_barrier(int id, int threads, Site site) {
  Thread& t = self();
  Block& block = t.of();
  if (id < 1 || id > 15) trap(site, "named_barrier takes 1 to 15, not %d", id);
  if (threads < kLanes || threads > block.threads || threads % kLanes != 0)
    trap(site, "named_barrier for %d threads in a block of %d; whole warps", threads, block.threads);
  t.barrier_id = id;
  Meeting& meeting = block.barriers[id];
  meet(meeting, block.members.data(), block.threads, threads, Wait::named_barrier, site, true, false, [&] {
    // The hardware counts warps: one that is there in part has diverged.
    for (int first = 0; first < block.threads; first += kLanes) {
      int there = 0;
      for (int i = first; i < first + kLanes; ++i) there += block.members.data()[i]->at == &meeting;
      if (there != 0 && there != kLanes)
        trap(site, "divergence: %d lanes of warp %d are at named_barrier %d, the others are not", there, first / kLanes,
             id);
    }
  });
}

void warp_barrier(Site site) {
  meet_warp(Wait::warp_barrier, site, nullptr, true, [](Thread* const*) {});
}

void cluster_barrier(Site site) {
  Machine& m = machine();
  Meeting& meeting = m.cluster_meeting;
  char* order = &meeting.order[meeting.phase & 1];
  release(order);
  if (arrive(meeting, m.live, Wait::cluster_barrier, site, true)) {
    for (int i = 0; i < m.live; ++i) {
      Thread& t = *m.threads.data()[i];
      t.at = nullptr;
      t.wait = Wait::none;
      make_ready(t);
    }
    draw_manner();
    meeting.arrived = 0;
    ++meeting.phase;
  }
  give_way();
  acquire(order);
}

uint64_t shuffle(uint64_t bits, int from, Site site) {
  struct Slot {
    uint64_t in, out;
    int from;
  } slot{bits, 0, from};
  meet_warp(Wait::shuffle, site, &slot, false, [](Thread* const* lanes) {
    for (int i = 0; i < kLanes; ++i) {
      Slot& s = *static_cast<Slot*>(lanes[i]->slot);
      s.out = static_cast<Slot*>(lanes[s.from & (kLanes - 1)]->slot)->in;
    }
  });
  return slot.out;
}

uint32_t ballot(bool p, Site site) {
  struct Slot {
    bool in;
    uint32_t out;
  } slot{p, 0};
  meet_warp(Wait::vote, site, &slot, false, [](Thread* const* lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < kLanes; ++i) votes |= uint32_t{static_cast<Slot*>(lanes[i]->slot)->in} << i;
    for (int i = 0; i < kLanes; ++i) static_cast<Slot*>(lanes[i]->slot)->out = votes;
  });
  return slot.out;
}

}  // namespace pyeff::gpu::emulate
