// What the engine knows of the blocks that are resident: their warps, threads and barriers.
//
// `happens_before`: tags that tell TSan of a barrier, in turn by generation; one for all would order threads
// after whoever has come to the next barrier already.
#pragma once

#include <bit>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "fiber.h"

namespace deltamem::emulation {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;
inline constexpr int kMaxWarps = 32;
inline constexpr int kBarriers = 16;  // 0 is the block's

struct Warp;
struct Block;

struct Thread {
  Fiber fiber;
  Warp* warp = nullptr;
  int lane = 0;
  int index() const;  // in the block

  const char* waits_in = nullptr;  // the word
  Site waits_at;
  int barrier = 0;

  struct Issued {
    Copy copy;
    int group;
  };
  std::vector<Issued> copies;  // [next_copy:] are under way
  size_t next_copy = 0;
  int groups = 0;  // committed
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  uint64_t priority = 0;
  uint32_t alive = kAllLanes;
  uint32_t ready = kAllLanes;
  uint32_t yielded = 0;     // would run, but others first
  uint32_t meeting = 0;     // wait in a word of the warp
  uint32_t at_barrier = 0;  // wait in a barrier of the block
  Meeting* meetings[kWarp] = {};
  Thread threads[kWarp];
  int generation = 0;  // of meetings
  char happens_before[2] = {};

  const Thread& waiting_lane() const { return threads[std::countr_zero(meeting | at_barrier)]; }
};

inline int Thread::index() const { return warp->index * kWarp + lane; }

struct Barrier {
  int threads = 0;  // that it waits for; of the block's, all that have not ended
  int arrived = 0;
  Site site;
  int generation = 0;
  char happens_before[2] = {};
};

struct Block {
  Block(int64_t index, int warp_count);

  const int64_t index;
  std::vector<std::unique_ptr<Warp>> warps;
  uint32_t ready_warps = 0, yielded_warps = 0;
  int live_warps;
  Barrier barriers[kBarriers];
  char* shared_memory = nullptr;
  std::vector<char*> red_zones;  // ascending

  void make_ready(Warp& warp, uint32_t lanes) {
    warp.ready |= lanes;
    ready_warps |= 1u << warp.index;
  }
  bool pass_if_complete(int id);
  void make_waiting(Warp& warp, uint32_t lanes) {
    warp.ready &= ~lanes;
    if (warp.ready == 0) ready_warps &= ~(1u << warp.index);
  }
};

inline Block::Block(int64_t index, int warp_count) : index(index), live_warps(warp_count) {
  for (int w = 0; w < warp_count; ++w) {
    Warp& warp = *warps.emplace_back(new Warp);
    warp.block = this;
    warp.index = w;
    for (int i = 0; i < kWarp; ++i) {
      warp.threads[i].warp = &warp;
      warp.threads[i].lane = i;
    }
    make_ready(warp, kAllLanes);
  }
}

// Does the word for all lanes. Null, or why it cannot.
const char* perform(Meeting* const (&lanes)[kWarp]);
const char* name_of(Word word);

}  // namespace deltamem::emulation
