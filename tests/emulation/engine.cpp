// The words as the engine sees them: who waits for whom, and which rules hold.
#include "engine.h"

#include <bit>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "run.h"
#include "sanitizers.h"

namespace deltamem::emulation {

namespace {

char fences;  // tells TSan of fences: each is ordered after all before it

bool same_line(Site a, Site b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

// A lane comes to a place where its whole warp has to come.
void expect_whole_warp(Thread& self, const char* word, Site site, uint32_t elsewhere) {
  Warp& warp = *self.warp;
  if (warp.alive != kAllLanes) {
    run->violate(std::string(word) + " wants all lanes of the warp, and lane " +
                     std::to_string(std::countr_one(warp.alive)) + " has ended",
                 site);
  }
  if (elsewhere != 0) {
    const Thread& other = warp.threads[std::countr_zero(elsewhere)];
    run->violate("lanes of one warp part: " + run->place(other) + " is in " + other.waits_in + " at " +
                     line_of(other.waits_at) + ", and here is " + word,
                 site);
  }
  self.waits_in = word;
  self.waits_at = site;
}

// The lanes that wait in the same way as this one, but elsewhere.
void expect_same_line(Thread& self, uint32_t waiting) {
  if (waiting == 0) return;
  const Thread& other = self.warp->threads[std::countr_zero(waiting)];
  if (other.waits_in == self.waits_in && same_line(other.waits_at, self.waits_at)) return;
  expect_whole_warp(self, self.waits_in, self.waits_at, waiting);
}

void arrive(int id, int threads, const char* word, Site site) {
  Thread& self = run->thread();
  Warp& warp = *self.warp;
  Block& block = *warp.block;
  Barrier& barrier = block.barriers[id];
  expect_whole_warp(self, word, site, warp.meeting);
  expect_same_line(self, warp.at_barrier);
  if (barrier.arrived == 0) {
    barrier.threads = threads;
    barrier.site = site;
  } else if (barrier.threads != threads || (id == 0 && !same_line(barrier.site, site))) {
    run->violate(std::string("threads of one block part: others are in ") + word + " at " +
                     line_of(barrier.site) + " with " + std::to_string(barrier.threads) +
                     " threads, and here are " + std::to_string(threads),
                 site);
  }
  self.barrier = id;
  warp.at_barrier |= 1u << self.lane;
  ++barrier.arrived;
  char* tag = &barrier.happens_before[barrier.generation % 2];
  release(tag);
  block.make_waiting(warp, 1u << self.lane);
  if (block.pass_if_complete(id)) run->barrier_passed(block);
  if ((warp.ready >> self.lane & 1) == 0) run->wait();
  acquire(tag);
}

}  // namespace

bool Block::pass_if_complete(int id) {
  Barrier& barrier = barriers[id];
  const int expected = id == 0 ? live_warps * kWarp : barrier.threads;
  if (barrier.arrived == 0 || barrier.arrived < expected) return false;
  for (auto& warp : warps) {
    if (warp->at_barrier == 0 || warp->waiting_lane().barrier != id) continue;
    if (warp->at_barrier != kAllLanes) {
      run->violate("whole warps come to a barrier, and not so that of " + run->place(warp->waiting_lane()),
                   barrier.site);
    }
    make_ready(*warp, warp->at_barrier);
    warp->at_barrier = 0;
  }
  barrier.arrived = 0;
  ++barrier.generation;
  return true;
}

void sync_block(Site site) { arrive(0, 0, "sync_block", site); }

void sync_named(int id, int threads, Site site) {
  if (id < 1 || id >= kBarriers || threads < kWarp || threads % kWarp != 0 || threads > run->grid().threads) {
    run->violate("sync_named takes an id from 1 to 15 and the threads of whole warps, got " +
                     std::to_string(id) + " and " + std::to_string(threads),
                 site);
  }
  arrive(id, threads, "sync_named", site);
}

void meet(Meeting& meeting) {
  Thread& self = run->thread();
  Warp& warp = *self.warp;
  expect_whole_warp(self, name_of(meeting.word), meeting.site, warp.at_barrier);
  expect_same_line(self, warp.meeting);
  warp.meetings[self.lane] = &meeting;
  warp.meeting |= 1u << self.lane;
  const bool orders = meeting.word == Word::sync_warp;
  char* tag = &warp.happens_before[warp.generation % 2];
  if (orders) release(tag);
  if (warp.meeting == kAllLanes) {
    if (const char* error = perform(warp.meetings)) {
      run->violate(std::string(name_of(meeting.word)) + " " + error, meeting.site);
    }
    warp.meeting = 0;
    ++warp.generation;
    warp.block->make_ready(warp, kAllLanes);
    run->progress();
  } else {
    warp.block->make_waiting(warp, 1u << self.lane);
    run->wait();
  }
  if (orders) acquire(tag);
}

void fence() {
  acquire(&fences);
  release(&fences);
}

void yield() { run->yield(); }

// ---- copies ----------------------------------------------------------------------------------------------

namespace {

bool in_shared_memory(const void* p) {
  const size_t bytes = run->grid().shared_bytes;
  const auto offset = static_cast<const char*>(p) - here.shared_memory;
  return here.shared_memory != nullptr && offset >= 0 && static_cast<size_t>(offset) + 16 <= bytes;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

void check_shared_row(const void* row, const char* word, Site site) {
  if (!in_shared_memory(row)) run->violate(std::string(word) + " reads outside shared memory", site);
  if (!aligned(row)) run->violate(std::string(word) + " reads a row that is not aligned to 16 bytes", site);
}

void start_copy(const Copy& copy, Site site) {
  if (!in_shared_memory(copy.target)) run->violate("cp_async writes outside shared memory", site);
  if (!aligned(copy.target) || (copy.valid && !aligned(copy.source))) {
    run->violate("cp_async takes addresses aligned to 16 bytes", site);
  }
  Thread& self = run->thread();
  self.copies.push_back({copy, self.groups});
}

void commit_copies() { ++run->thread().groups; }

const Copy* next_copy(int pending) {
  Thread& self = run->thread();
  if (self.next_copy == self.copies.size()) {
    self.copies.clear();
    self.next_copy = 0;
    return nullptr;
  }
  const Thread::Issued& issued = self.copies[self.next_copy];
  if (issued.group >= self.groups - pending) return nullptr;
  ++self.next_copy;
  return &issued.copy;
}

// ---- the grid --------------------------------------------------------------------------------------------

void poison(void* behind_array, int bytes) {
  char* zone = static_cast<char*>(behind_array);
  auto& zones = run->block().red_zones;
  if (!zones.empty() && zone <= zones.back()) return;  // another thread's, of the same arrays
  zones.push_back(zone);
  poison_memory(zone, bytes);
}

void wait_for_previous_kernel() { run->waited_for_previous_kernel = true; }

namespace {

// A line for each launch, in the file that DELTAMEM_EMULATION_LAUNCHES names.
void log_launch(const Grid& grid) {
  const char* path = getenv("DELTAMEM_EMULATION_LAUNCHES");
  if (path == nullptr) return;
  FILE* log = fopen(path, "a");
  if (log == nullptr) return;
  fprintf(log, "%d %zu %s\n", grid.threads, grid.shared_bytes, grid.kernel);
  fclose(log);
}

}  // namespace

const char* launch(const Grid& grid) {
  static std::mutex one_at_a_time;
  thread_local std::string error;
  const std::lock_guard lock(one_at_a_time);
  on_report([](const char*) {
    if (run == nullptr) return;
    fprintf(stderr, "emulation: %s, schedule %s\n", run->place(run->thread()).c_str(),
            run->schedule().c_str());
  });
  log_launch(grid);
  Run this_run(grid);
  run = &this_run;
  error = this_run.finish_grid();
  run = nullptr;
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace deltamem::emulation
