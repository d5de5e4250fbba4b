// A kernel with the hazards of the real ones, and one mistake at a time planted into it: what the emulation
// and its sanitizers must find. `planted NAME` runs it under DELTAMEM_EMULATION_SCHEDULE and prints the
// greatest error of its result.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/ptx.cuh"
#include "cuda/shared_memory.cuh"

using namespace deltamem;
using cuda::Carver;

namespace {

enum class Plant {
  none,
  missing_barrier,     // after the wait for copies
  overwritten_stage,   // no barrier before the next copies into a stage
  missing_wait,        // for copies
  weak_wait,           // for one group too few
  missing_sync_warp,   // in an exchange of one warp
  missing_fence,       // before a block says that its part is done
  global_read,         // behind a tensor: the tail's predicate dropped
  shared_read,         // behind an array, inside the block's shared memory
  shared_write,        // the same
  shared_read_behind,  // behind the block's shared memory
  skipped_shuffle,     // by one lane
  other_barrier,       // one thread takes another one
  early_end,           // of a lane
  misaligned_copy,
  misaligned_load,
  endless_wait,       // for a block that never counts
  deadlock,           // a barrier that too few threads come to
  missing_grid_wait,  // in a kernel that may overlap the previous one
  kCount
};
constexpr const char* kNames[] = {
    "none",          "missing_barrier",   "overwritten_stage",  "missing_wait",
    "weak_wait",     "missing_sync_warp", "missing_fence",      "global_read",
    "shared_read",   "shared_write",      "shared_read_behind", "skipped_shuffle",
    "other_barrier", "early_end",         "misaligned_copy",    "misaligned_load",
    "endless_wait",  "deadlock",          "missing_grid_wait"};
static_assert(sizeof(kNames) / sizeof(kNames[0]) == static_cast<int>(Plant::kCount));

constexpr int kRows = 64, kColumns = 64, kDepth = 32, kStages = 2;
constexpr int kThreads = kRows / 16 * 32;
constexpr int kPitch = kDepth + 8;  // of a row in shared memory

struct Tiles {
  bf16 *a, *b;      // [kStages, 64, kPitch]
  float* row_sums;  // [warp, 16]
  int* last;
  size_t bytes;
  DELTAMEM_HD explicit Tiles(Carver carver)
      : a(carver.take<bf16>(kStages * kRows * kPitch)),
        b(carver.take<bf16>(kStages * kColumns * kPitch)),
        row_sums(carver.take<float>(kRows)),
        last(carver.take<int>(1)),
        bytes(carver.used()) {}
};

struct Product {
  const bf16 *a, *b;  // [64, depth]
  int depth;          // a multiple of 8
  float* parts;       // [num_blocks, 64, 64]
  uint32_t* arrived;
  float* c;     // [64, 64]
  float* sums;  // [64] of each row of c
};

template <Plant kPlant>
DELTAMEM_DEVICE void load_stage(const Product& p, const Tiles& tiles, int stage, int k0) {
  for (int i = ptx::thread(); i < kRows * kDepth / 8; i += kThreads) {
    const int row = i / (kDepth / 8), k = k0 + i % (kDepth / 8) * 8;
    const int at = (stage * kRows + row) * kPitch + i % (kDepth / 8) * 8;
    const bool valid = kPlant == Plant::global_read || k < p.depth;
    const int shift = kPlant == Plant::misaligned_copy ? 1 : 0;
    ptx::cp_async(tiles.a + at, p.a + row * p.depth + (valid ? k : 0) + shift, valid);
    ptx::cp_async(tiles.b + at, p.b + row * p.depth + (valid ? k : 0), valid);
  }
  ptx::cp_async_commit();
}

// c = a b^T, its depth split over blocks; the last block to arrive adds the parts, in order.
template <Plant kPlant>
__global__ void __launch_bounds__(kThreads) product(const __grid_constant__ Product p) {
  const Tiles tiles(Carver::of_block());
  const int lane = ptx::lane(), warp = ptx::warp(), g = lane / 4, c = lane % 4 * 2;
  if (kPlant == Plant::early_end && ptx::thread() == 37) return;

  if (kPlant == Plant::deadlock && warp == 1) ptx::sync_named(1, 64);

  const int steps = (p.depth + kDepth - 1) / kDepth;
  const int per_block =
      (steps + static_cast<int>(ptx::num_blocks()) - 1) / static_cast<int>(ptx::num_blocks());
  const int first = static_cast<int>(ptx::block()) * per_block;
  const int end = min(first + per_block, steps);

  float d[kColumns / 8][4] = {};
  if (first < end) load_stage<kPlant>(p, tiles, 0, first * kDepth);
  for (int step = first; step < end; ++step) {
    const int stage = (step - first) % kStages;
    if (step + 1 < end) {
      load_stage<kPlant>(p, tiles, 1 - stage, (step + 1) * kDepth);
    } else {
      ptx::cp_async_commit();
    }
    if (kPlant != Plant::missing_wait) ptx::cp_async_wait<kPlant == Plant::weak_wait ? 2 : 1>();
    if (kPlant != Plant::missing_barrier) ptx::sync_block();

    const bf16* a = tiles.a + (stage * kRows + 16 * warp) * kPitch;
    const bf16* b = tiles.b + stage * kColumns * kPitch;
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t af[4];
      ptx::ldmatrix(af, a + (lane % 16) * kPitch + k + lane / 16 * 8);
      for (int n = 0; n < kColumns / 8; n += 2) {
        uint32_t bf[4];
        ptx::ldmatrix(bf, b + (8 * n + lane % 8 + lane / 16 * 8) * kPitch + k + lane / 8 % 2 * 8);
        ptx::mma<bf16>(d[n], af, bf[0], bf[1]);
        ptx::mma<bf16>(d[n + 1], af, bf[2], bf[3]);
      }
    }
    if (kPlant == Plant::other_barrier && ptx::thread() == 37) {
      ptx::sync_block();
    } else if (kPlant != Plant::overwritten_stage) {
      ptx::sync_block();
    }
  }

  float* part = p.parts + ptx::block() * kRows * kColumns + 16 * warp * kColumns;
  for (int n = 0; n < kColumns / 8; ++n) {
    for (int i = 0; i < 4; ++i) part[(g + i / 2 * 8) * kColumns + 8 * n + c + i % 2] = d[n][i];
  }
  if (kPlant != Plant::missing_fence) ptx::fence();
  ptx::sync_block();
  if (ptx::thread() == 0) {
    const auto last = static_cast<uint32_t>(ptx::num_blocks()) - 1;
    *tiles.last = ptx::atomic_inc(p.arrived, last) == last;
  }
  ptx::sync_block();
  if (kPlant == Plant::endless_wait && ptx::block() == 0) {
    while (ptx::atomic_add(reinterpret_cast<int*>(p.arrived), 0) >= 0) {
    }
  }
  if (*tiles.last == 0) return;
  ptx::fence();

  for (int row = 16 * warp; row < 16 * warp + 16; ++row) {
    float row_sum = 0.0f;
    for (int column = lane; column < kColumns; column += 32) {
      float sum = 0.0f;
      for (int i = 0; i < ptx::num_blocks(); ++i) {
        sum += ptx::load_shared_by_blocks(p.parts + (i * kRows + row) * kColumns + column);
      }
      p.c[row * kColumns + column] = sum;
      row_sum += sum;
    }
    if (kPlant != Plant::skipped_shuffle || lane != 31) row_sum += ptx::shfl_xor(row_sum, 16);
    for (int i = 8; i > 0; i /= 2) row_sum += ptx::shfl_xor(row_sum, i);
    if (lane == 0) tiles.row_sums[row] = row_sum;
  }
  if (kPlant != Plant::missing_sync_warp) ptx::sync_warp();
  if (kPlant == Plant::shared_write) tiles.row_sums[kRows + warp] = 0.0f;
  const int behind = kPlant == Plant::shared_read                                    ? kRows
                     : kPlant == Plant::shared_read_behind && warp == kRows / 16 - 1 ? 16 + 300
                                                                                     : 0;
  if (lane < 16) p.sums[16 * warp + lane] = tiles.row_sums[16 * warp + lane + behind];
  if (kPlant == Plant::misaligned_load) {
    p.c[0] = reinterpret_cast<const float2*>(tiles.row_sums + 1)->x * 0.0f + p.c[0];
  }
}

float value(int i) { return static_cast<float>(i * 37 % 101 - 50) / 64.0f; }

template <int kPlant>
int run(const char* name) {
  if constexpr (kPlant < static_cast<int>(Plant::kCount)) {
    if (strcmp(name, kNames[kPlant]) != 0) return run<kPlant + 1>(name);
    const int depth = 200, blocks = 3;
    std::vector<bf16> a(kRows * depth), b(kColumns * depth);
    for (int i = 0; i < kRows * depth; ++i) a[i] = ptx::from_float<bf16>(value(i));
    for (int i = 0; i < kColumns * depth; ++i) b[i] = ptx::from_float<bf16>(value(7 * i + 3));
    std::vector<float> parts(blocks * kRows * kColumns, NAN), c(kRows * kColumns, NAN), sums(kRows, NAN);
    auto arrived = std::make_unique<uint32_t>(0);
    const Product p{a.data(), b.data(), depth, parts.data(), arrived.get(), c.data(), sums.data()};
    const ptx::LaunchShape shape{.blocks = blocks,
                                 .threads = kThreads,
                                 .shared_bytes = Tiles(Carver()).bytes,
                                 .overlaps_previous = kPlant == static_cast<int>(Plant::missing_grid_wait)};
    if (const char* error = ptx::launch<product<static_cast<Plant>(kPlant)>>(shape, 0, nullptr, p)) {
      printf("%s\n", error);
      return 1;
    }
    double greatest = *arrived;  // left at zero
    for (int i = 0; i < kRows; ++i) {
      double row_sum = 0.0;
      for (int j = 0; j < kColumns; ++j) {
        double sum = 0.0;
        for (int k = 0; k < depth; ++k) sum += double(value(i * depth + k)) * value(7 * (j * depth + k) + 3);
        row_sum += sum;
        const double error = std::abs(c[i * kColumns + j] - sum);
        if (!(error <= greatest)) greatest = error;
      }
      const double error = std::abs(sums[i] - row_sum);
      if (!(error <= greatest)) greatest = error;
    }
    printf("error %g\n", greatest);
    return greatest < 1e-3 ? 0 : 2;
  } else {
    printf("no such plant: %s\n", name);
    return 3;
  }
}

}  // namespace

int main(int count, char** arguments) { return run<0>(count > 1 ? arguments[1] : "none"); }
