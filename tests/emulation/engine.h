// What the emulated words ask of the engine, which runs each CUDA thread as a fiber of one OS thread. Fibers
// change only inside these calls. The engine is never instrumented by TSan; the words are, so that reports
// name lines of kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace deltamem::emulation {

using Site = std::source_location;

// The thread that runs.
struct Here {
  int thread;
  int64_t block, blocks;
  char* shared_memory;
};
extern Here here;

enum class Word : uint8_t {
  sync_warp,
  shfl,
  ballot,
  ldmatrix,
  ldmatrix_transposed,
  movmatrix,
  mma_bf16,
  mma_f16
};

// What a lane brings to a word of its warp and takes from it. The last lane to come does the work of all, and
// stores only into lanes' own frames.
struct Meeting {
  Word word;
  Site site;
  uint32_t value = 0;  // shfl, ballot, movmatrix: given, then taken
  int source_lane = 0;
  const uint32_t* row = nullptr;  // ldmatrix: this lane's 16 bytes
  uint32_t* fragment = nullptr;
  float* d = nullptr;
  const uint32_t *a = nullptr, *b = nullptr;
};
void meet(Meeting& meeting);

void sync_block(Site site);
void sync_named(int id, int threads, Site site);
void fence();
// Lets other threads run first: before whatever blocks may wait for each other with.
void yield();

struct Copy {
  void* target;
  const void* source;
  bool valid;
};
void check_shared_row(const void* row, const char* word, Site site);
void start_copy(const Copy& copy, Site site);
void commit_copies();
// A copy of this thread that has to arrive before at most `pending` groups are under way; null: none is left.
const Copy* next_copy(int pending);

#ifndef DELTAMEM_RED_ZONE
#define DELTAMEM_RED_ZONE 128
#endif
inline constexpr int kRedZone = DELTAMEM_RED_ZONE;  // 0: shared memory as a GPU has it
void poison(void* behind_array, int bytes);
void wait_for_previous_kernel();

struct Grid {
  const char* kernel;  // a text that ends in its name
  void (*run_thread)(const void* arguments);
  const void* arguments;
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  bool overlaps_previous;
};
// Runs all of it. Returns what went wrong, or null.
const char* launch(const Grid& grid);

}  // namespace deltamem::emulation
