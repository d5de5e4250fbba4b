#include "schedule.h"

#include <bit>
#include <cstdlib>
#include <numeric>

namespace deltamem::emulation {

const char* Schedule::begin(const char* text, int64_t blocks) {
  name_ = text == nullptr || *text == '\0' ? "order" : text;
  if (name_ == "order") {
    blocks_ = blocks;
    return nullptr;
  }
  const size_t colon = name_.find(':');
  const std::string policy = name_.substr(0, colon);
  const char* seed = colon == std::string::npos ? "" : name_.c_str() + colon + 1;
  char* end = nullptr;
  state_ = 0x9e3779b97f4a7c15u * (strtoull(seed, &end, 10) + 1);
  const bool known = policy == "random" || policy == "priority";
  if (!known || *seed == '\0' || *end != '\0') {
    return "DELTAMEM_EMULATION_SCHEDULE must be order, random:N or priority:N";
  }
  policy_ = policy == "random" ? Policy::random : Policy::priority;
  blocks_ = blocks;
  if (policy_ == Policy::random && blocks > 1) {
    first_block_ = static_cast<int64_t>(random() % blocks);
    block_step_ = static_cast<int64_t>(random() % blocks);
    while (std::gcd(block_step_, blocks) != 1) block_step_ = (block_step_ + 1) % blocks;
  }
  return nullptr;
}

// xorshift64*
uint64_t Schedule::random() {
  state_ ^= state_ >> 12;
  state_ ^= state_ << 25;
  state_ ^= state_ >> 27;
  return state_ * 0x2545f4914f6cdd1du >> 16;
}

void Schedule::prioritise(Block& block) {
  if (policy_ != Policy::priority) return;
  for (auto& warp : block.warps) warp->priority = random();
  prioritised_ = true;
}

Warp* Schedule::pick_warp(const std::vector<Block*>& resident, Warp* last) {
  const bool last_is_ready = last != nullptr && last->ready != 0;
  if (policy_ == Policy::priority) {
    if (last_is_ready && !prioritised_) return last;
    prioritised_ = false;
    Warp* best = nullptr;
    for (Block* block : resident) {
      for (uint32_t ready = block->ready_warps; ready != 0; ready &= ready - 1) {
        Warp* warp = block->warps[std::countr_zero(ready)].get();
        if (best == nullptr || warp->priority > best->priority) best = warp;
      }
    }
    return best;
  }
  if (policy_ == Policy::random) {
    if (last_is_ready && random() % 8 != 0) return last;
    const size_t first = resident.empty() ? 0 : random() % resident.size();
    for (size_t i = 0; i < resident.size(); ++i) {
      Block* block = resident[(first + i) % resident.size()];
      if (block->ready_warps == 0) continue;
      const int turn = static_cast<int>(random() % kMaxWarps);
      return block->warps[(std::countr_zero(std::rotr(block->ready_warps, turn)) + turn) % kMaxWarps].get();
    }
    return nullptr;
  }
  if (last_is_ready) return last;
  if (last != nullptr && last->block->ready_warps != 0) {
    return last->block->warps[std::countr_zero(last->block->ready_warps)].get();
  }
  for (Block* block : resident) {
    if (block->ready_warps != 0) return block->warps[std::countr_zero(block->ready_warps)].get();
  }
  return nullptr;
}

Thread* Schedule::pick(const std::vector<Block*>& resident, Warp* last) {
  Warp* warp = pick_warp(resident, last);
  if (warp == nullptr) return nullptr;
  const int turn = policy_ == Policy::order ? 0 : static_cast<int>(random() % kWarp);
  return &warp->threads[(std::countr_zero(std::rotr(warp->ready, turn)) + turn) % kWarp];
}

}  // namespace deltamem::emulation
