// How attention is cut into tasks: tiles of kLanes columns, several to a task, so that what the task packs
// for one of its tiles serves the others. A column's arithmetic does not depend on the cut.
#pragma once

#include "cpu/matmul.h"

namespace deltamem::DELTAMEM_ISA {

inline constexpr int64_t kBlock =
    128;  // rows (keys; in the loop over keys, queries) that meet a tile at a time

struct Task {
  int32_t row, first;  // of the call; first column
};

// Tasks of one kv head; every kv head has the same. The last columns of every row come first.
class TaskList {
 public:
  // length(row): columns of a row. tile_bytes: what a tile keeps from block to block.
  template <class Length>
  TaskList(int64_t rows, int64_t kv_heads, int64_t tile_bytes, int num_threads, Length&& length)
      : tiles(pick_tiles(rows, kv_heads, tile_bytes, num_threads, length)),
        count(total(rows, tiles * kLanes, length)),
        tasks_(count) {
    int64_t filled = 0;
    for (int64_t n = longest(rows, tiles * kLanes, length) - 1; n >= 0; --n) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t first = n * tiles * kLanes;
        if (first < length(row)) tasks_[filled++] = {static_cast<int32_t>(row), static_cast<int32_t>(first)};
      }
    }
  }

  const Task& operator[](int64_t i) const { return tasks_.data[i]; }

  const int64_t tiles;  // to a task, at most
  const int64_t count;

 private:
  template <class Length>
  static int64_t total(int64_t rows, int64_t columns, Length&& length) {
    int64_t sum = 0;
    for (int64_t row = 0; row < rows; ++row) sum += ceil_div(length(row), columns);
    return sum;
  }

  template <class Length>
  static int64_t longest(int64_t rows, int64_t columns, Length&& length) {
    int64_t most = 0;
    for (int64_t row = 0; row < rows; ++row) most = max(most, ceil_div(length(row), columns));
    return most;
  }

  // 16 tiles halve the time spent fetching K and V rows against 8 (they lie a head's stride apart, which no
  // hardware prefetcher follows); fewer where the second-level cache or the threads ask for it.
  template <class Length>
  static int64_t pick_tiles(int64_t rows, int64_t kv_heads, int64_t tile_bytes, int num_threads,
                            Length&& length) {
    const int64_t fitting = (640 << 10) / tile_bytes;
    const int64_t share = total(rows, kLanes, length) * kv_heads / (8 * num_threads);
    const int64_t useful = min<int64_t>(16, longest(rows, kLanes, length));
    return max<int64_t>(1, min(useful, min(fitting, share)));
  }

  Buffer<Task> tasks_;
};

inline int team_size(int num_threads, int64_t items) {
  return static_cast<int>(max<int64_t>(1, min<int64_t>(num_threads, items)));
}

}  // namespace deltamem::DELTAMEM_ISA
