// One grid that runs: which blocks are resident, which thread runs, how threads wait and end.
#pragma once

#include <string>
#include <vector>

#include "schedule.h"
#include "threads.h"

namespace deltamem::emulation {

class Run {
 public:
  explicit Run(const Grid& grid) : grid_(grid) {}

  // Runs it all. Empty, or what went wrong.
  std::string finish_grid();

  // By the running thread.
  Thread& thread() { return *running_; }
  Block& block() { return *running_->warp->block; }
  // Others run until someone has made this thread ready again.
  void wait();
  void yield();
  [[noreturn]] void end_thread();
  // Ends the grid.
  [[noreturn]] void violate(const std::string& rule, Site site);

  // Something was decided: whoever yields does not spin in vain.
  void progress() { idle_ = 0; }
  void barrier_passed(Block& block) {
    progress();
    schedule_.prioritise(block);
  }
  std::string place(const Thread& thread) const;
  const Grid& grid() const { return grid_; }
  const std::string& schedule() const { return schedule_.name(); }

  bool waited_for_previous_kernel = false;

 private:
  std::string refusal() const;
  int64_t residency() const;
  void admit();
  void retire();
  Thread* next();
  void enter(Thread& thread);
  bool resume_yielded();
  std::string waiting_threads() const;

  const Grid grid_;
  Schedule schedule_;
  std::vector<Block*> resident_, ended_;
  int64_t next_block_ = 0;
  Fiber caller_;
  Thread* running_ = nullptr;
  Warp* last_ = nullptr;
  int64_t idle_ = 0;
  std::string error_;
};

// The one that runs.
extern Run* run;

std::string line_of(Site site);

}  // namespace deltamem::emulation
