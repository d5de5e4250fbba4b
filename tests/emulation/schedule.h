// Which thread runs next. Any order is legal on the device; each of these shows other mistakes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "threads.h"

namespace deltamem::emulation {

// Read from DELTAMEM_EMULATION_SCHEDULE:
//   order        lowest thread first
//   random:N     any thread, any block first; of seed N
//   priority:N   the warp of the highest priority, drawn anew at each barrier: one warp runs far ahead
class Schedule {
 public:
  // Of a grid. Null, or what is wrong with the text.
  const char* begin(const char* text, int64_t blocks);
  const std::string& name() const { return name_; }

  // A ready thread of these blocks; null: there is none.
  Thread* pick(const std::vector<Block*>& resident, Warp* last);
  // The block that becomes resident as the i-th.
  int64_t block_at(int64_t i) const { return (first_block_ + i * block_step_) % blocks_; }
  void prioritise(Block& block);
  // A thread that yields runs again once no other is ready, or by chance.
  bool yields_for_all() const { return policy_ != Policy::random; }

 private:
  enum class Policy { order, random, priority };

  uint64_t random();
  Warp* pick_warp(const std::vector<Block*>& resident, Warp* last);

  Policy policy_ = Policy::order;
  uint64_t state_ = 0;
  std::string name_;
  int64_t blocks_ = 1, first_block_ = 0, block_step_ = 1;
  bool prioritised_ = false;
};

}  // namespace deltamem::emulation
