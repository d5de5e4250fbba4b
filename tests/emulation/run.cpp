#include "run.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>

#include "device.h"
#include "sanitizers.h"

namespace deltamem::emulation {

Here here;
Run* run = nullptr;

namespace {

constexpr int64_t kMaxIdle = 1 << 22;  // yields in a row while nothing else happens
constexpr int64_t kMaxRaceThreads = 8000;

// Tell TSan that a grid's threads follow what came before it, and what comes after it them.
char begun, ended;

// From "... [with auto kKernel = deltamem::cuda::scan<8>; Args = ...]".
std::string kernel_name(const char* text) {
  std::string name = text;
  if (size_t at = name.find("kKernel = "); at != std::string::npos) name = name.substr(at + 10);
  return name.substr(0, name.find_first_of(";]("));
}

void thread_main() {
  run->thread().fiber.entered();
  acquire(&begun);
  run->grid().run_thread(run->grid().arguments);
  run->end_thread();
}

}  // namespace

std::string line_of(Site site) {
  const char* slash = strrchr(site.file_name(), '/');
  return std::string(slash != nullptr ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

// ---- the grid --------------------------------------------------------------------------------------------

std::string Run::refusal() const {
  if (grid_.blocks < 1 || grid_.blocks > INT_MAX) return "a grid has 1 to 2^31 - 1 blocks";
  if (grid_.threads < kWarp || grid_.threads > kThreadsPerBlock || grid_.threads % kWarp != 0) {
    return "a block has whole warps, 1 to 32, got " + std::to_string(grid_.threads) + " threads";
  }
  if (grid_.shared_bytes > static_cast<size_t>(shared_memory_per_block())) {
    return "a block has at most " + std::to_string(shared_memory_per_block()) +
           " bytes of shared memory, got " + std::to_string(grid_.shared_bytes);
  }
  if (kRaces && grid_.blocks * grid_.threads > kMaxRaceThreads) {
    return "TSan knows at most 8000 threads, got " + std::to_string(grid_.blocks * grid_.threads);
  }
  return "";
}

std::string Run::finish_grid() {
  const char* wrong_schedule = schedule_.begin(getenv("DELTAMEM_EMULATION_SCHEDULE"), grid_.blocks);
  error_ = wrong_schedule != nullptr ? wrong_schedule : refusal();
  caller_.adopt_caller();
  while (error_.empty()) {
    admit();
    if (resident_.empty()) break;
    Thread* thread = next();
    if (thread == nullptr) {
      error_ = "deadlock: " + waiting_threads();
      break;
    }
    enter(*thread);
    caller_.switch_to(thread->fiber);
    acquire(&ended);
    for (size_t i = resident_.size(); i-- > 0;) {
      if (resident_[i]->live_warps > 0) continue;
      ended_.push_back(resident_[i]);
      resident_.erase(resident_.begin() + static_cast<ptrdiff_t>(i));
    }
    if (!kRaces) retire();
  }
  ended_.insert(ended_.end(), resident_.begin(), resident_.end());
  retire();
  caller_.destroy();
  if (error_.empty() && grid_.overlaps_previous && !waited_for_previous_kernel) {
    error_ = "it overlaps the previous kernel and never calls wait_for_previous_kernel";
  }
  if (error_.empty()) return "";
  return "emulated kernel " + kernel_name(grid_.kernel) + ": " + error_ + "; schedule " + schedule_.name();
}

int64_t Run::residency() const {
  if (kRaces) return INT64_MAX;  // a stack that is used again would be a race, or order its threads
  const int64_t by_threads = kThreadsPerMultiprocessor / grid_.threads;
  const int64_t by_memory =
      shared_memory_per_multiprocessor() / static_cast<int64_t>(grid_.shared_bytes + 1024);
  return multiprocessors() * std::max<int64_t>(1, std::min({by_threads, by_memory, int64_t{16}}));
}

void Run::admit() {
  const int64_t most = residency();
  while (next_block_ < grid_.blocks && static_cast<int64_t>(resident_.size()) < most) {
    auto* block = new Block(schedule_.block_at(next_block_++), grid_.threads / kWarp);
    if (grid_.shared_bytes > 0) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 1024, grid_.shared_bytes) != 0) throw std::bad_alloc();
      memset(memory, 0xff, grid_.shared_bytes);  // NaN
      block->shared_memory = static_cast<char*>(memory);
    }
    for (auto& warp : block->warps) {
      for (Thread& thread : warp->threads) thread.fiber.create();
    }
    release(&begun);
    schedule_.prioritise(*block);
    resident_.push_back(block);
    progress();
  }
}

void Run::retire() {
  for (Block* block : ended_) {
    if (last_ != nullptr && last_->block == block) last_ = nullptr;
    if (kRaces && !error_.empty()) continue;  // threads that are given up race with who frees their memory
    for (const char* zone : block->red_zones) {
      unpoison_memory(zone, kRedZone);
      for (int j = 0; j < kRedZone && error_.empty(); ++j) {
        if (static_cast<unsigned char>(zone[j]) == 0xff) continue;
        error_ = "something was stored behind an array, at byte " +
                 std::to_string(zone + j - block->shared_memory) + " of the shared memory of block " +
                 std::to_string(block->index);
      }
    }
    free(block->shared_memory);
    for (auto& warp : block->warps) {
      for (Thread& thread : warp->threads) thread.fiber.destroy();
    }
    delete block;
  }
  ended_.clear();
}

// ---- threads ---------------------------------------------------------------------------------------------

Thread* Run::next() {
  Thread* thread = schedule_.pick(resident_, last_);
  if (thread == nullptr && resume_yielded()) thread = schedule_.pick(resident_, last_);
  return thread;
}

bool Run::resume_yielded() {
  bool any = false;
  for (Block* block : resident_) {
    if (block->yielded_warps == 0) continue;
    any = true;
    block->yielded_warps = 0;
    for (auto& warp : block->warps) {
      if (warp->yielded != 0) block->make_ready(*warp, warp->yielded);
      warp->yielded = 0;
    }
  }
  return any;
}

void Run::enter(Thread& thread) {
  running_ = &thread;
  last_ = thread.warp;
  const Block& block = *thread.warp->block;
  here = {thread.index(), block.index, grid_.blocks, block.shared_memory};
  if (!thread.fiber.started()) thread.fiber.start(thread_main);
}

// The next thread is entered from this one: the caller's stack is for blocks that end, and for errors.
void Run::wait() {
  Thread& self = thread();
  Thread* other = next();
  if (other == &self) return;
  if (other != nullptr) enter(*other);
  self.fiber.switch_to(other != nullptr ? other->fiber : caller_);
}

void Run::yield() {
  if (++idle_ > kMaxIdle) violate("threads wait for each other without end: " + waiting_threads(), Site{});
  Thread& self = thread();
  Warp& warp = *self.warp;
  if (schedule_.yields_for_all()) {
    warp.yielded |= 1u << self.lane;
    warp.block->yielded_warps |= 1u << warp.index;
    warp.block->make_waiting(warp, 1u << self.lane);
  }
  wait();
}

void Run::end_thread() {
  Thread& self = thread();
  Warp& warp = *self.warp;
  Block& block = *warp.block;
  self.waits_in = "end";
  warp.alive &= ~(1u << self.lane);
  block.make_waiting(warp, 1u << self.lane);
  if ((warp.meeting | warp.at_barrier) != 0) {
    const Thread& other = warp.waiting_lane();
    violate("it ends while " + place(other) + " waits in " + other.waits_in, other.waits_at);
  }
  progress();
  release(&ended);
  if (warp.alive == 0) {
    --block.live_warps;
    block.pass_if_complete(0);
  }
  Thread* other = block.live_warps == 0 || !error_.empty() ? nullptr : next();
  if (other != nullptr) enter(*other);
  self.fiber.finish_to(other != nullptr ? other->fiber : caller_);
}

void Run::violate(const std::string& rule, Site site) {
  Thread& self = thread();
  if (error_.empty()) {
    error_ = rule + " (" + place(self) + (site.line() != 0 ? ", " + line_of(site) : "") + ")";
  }
  release(&ended);
  self.fiber.finish_to(caller_);
}

std::string Run::place(const Thread& thread) const {
  return "block " + std::to_string(thread.warp->block->index) + " thread " + std::to_string(thread.index());
}

// The first of those that wait alike, with their number.
std::string Run::waiting_threads() const {
  struct Group {
    const Thread* first;
    int count;
  };
  std::map<std::string, Group> groups;
  for (const Block* block : resident_) {
    for (auto& warp : block->warps) {
      for (const Thread& thread : warp->threads) {
        const uint32_t bit = 1u << thread.lane;
        if ((warp->alive & bit) == 0) continue;
        const bool waits = ((warp->meeting | warp->at_barrier) & bit) != 0;
        const std::string what =
            waits ? std::string(thread.waits_in) + " at " + line_of(thread.waits_at) : "a loop over atomics";
        ++groups.try_emplace(what, Group{&thread, 0}).first->second.count;
      }
    }
  }
  std::string text;
  for (const auto& [what, group] : groups) {
    text += (text.empty() ? "" : ", ") + std::to_string(group.count) + " threads from " +
            place(*group.first) + " in " + what;
  }
  return text;
}

}  // namespace deltamem::emulation
