// What the parts of the decode kernel share: its constants, its argument, its shared memory.
#pragma once

#include "cuda/shared_memory.cuh"
#include "cuda/tile.cuh"
#include "mask.h"

namespace deltamem::cuda::decode {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kSlice = 16;                   // slots of a tile that a warp attends: the M of an mma
inline constexpr int kTileSlots = kWarps * kSlice;  // tiles begin at multiples of it
inline constexpr int kMaxTokens = 16;               // new tokens of a row
inline constexpr int kMaxStages = 4;                // tiles under way to a block
inline constexpr int kBlocksPerMultiprocessor = 2;  // 255 registers a thread allow no more
inline constexpr int kLongestMerge = 64;            // splits of an item where the kernel chooses
inline constexpr int kMaxSplits = 256;              // where the caller does

// Query columns of an item. The sums, kD x columns over 32 lanes, take 64, 96 and 128 registers; with 32
// columns at kD = 128 sm_120 spills.
template <int kD>
inline constexpr int kMaxColumns = kD > 128  ? 16
                                   : kD > 64 ? 24
                                             : 32;

// Columns that the products cover: one mma's, or all that there may be.
template <int kD>
DELTAMEM_HD int covered_columns(int columns) {
  return columns <= 8 ? 8 : kMaxColumns<kD>;
}

struct Argument {
  DeltaDecodeParams p;
  float* sums;         // [slots, columns, kD] of partial results
  float* stats;        // [slots, columns, 2]: peak and total
  int* row_counters;   // [rows], tiles whose block has read the row's state
  int* item_counters;  // [rows, kv_heads, column_blocks], tiles whose partial result is stored
  int rows, kv_heads, group, D, HR;
  int tokens;         // of a row, at most
  int column_blocks;  // of a row and kv head, at most
  int columns;        // of one of them, at most
  int num_splits;     // 0: the kernel chooses
  int stages;
  bool copies_chunks;  // 16 aligned bytes of the caches at once
};
static_assert(sizeof(Argument) <= 4096, "more than every chip takes as a kernel's argument");

// A row of the call and what is walked of its cache.
struct Row {
  int number, batch;
  int start, length;         // its tokens
  int tokens;                // the first ones, which are not masked
  int first_slot;            // of token 0; negative where there are fewer keys than tokens
  int keys_begin, keys_end;  // slots that hold keys
  int begin, end;            // slots that some token sees, or that are new
  int first_tile, tiles;
  int column_blocks;

  DELTAMEM_DEVICE int listed_tiles() const { return max(tiles, 1); }
};

// A split of an item, walked by one block.
struct Segment {
  int kv_head, column_block;
  int first_column, columns;     // of the row's tokens x group, token by token
  int item;                      // in item_counters
  int item_tiles, listed_tiles;  // of the item and of this split in the list
  int first_tile, tiles;         // to be walked
  int split, splits;
  int first_slot, next_slot, slot_step;  // where the splits' partial results lie
  bool is_last;                          // of the block's

  DELTAMEM_DEVICE int slot_of(int s) const { return s == 0 ? first_slot : next_slot + s * slot_step; }
};

// What all threads of a block know. It stands in shared memory: the sums take the registers.
struct BlockState {
  // The block's place in the list of tiles, see delta_decode_schedule.cuh.
  int per_block, position, end;
  int row_start;  // of row
  Row row;
  Segment segment;
  int tiles[kWarps], longest[kWarps];  // of the rows that a warp counts
  int is_last_reader, is_last_split;
};

template <class T, int kD>
struct Shared {
  BlockState* block;
  float* reads;              // [tokens, HR]
  float* scratch;            // [kWarps, kD]
  int2* seen;                // [columns]: slots that a column sees
  Tile<T, kD> queries;       // [columns]
  Tile<T, kD> new_k, new_v;  // [tokens], prepared, by token
  T* ring;                   // [kWarps, stages, k and v, kSlice, kD]; between tiles the block's to merge in
  size_t bytes;

  DELTAMEM_HD Shared(Carver carver, const Argument& call)
      : block(carver.take<BlockState>(1)),
        reads(carver.take<float>(call.tokens * call.HR)),
        scratch(carver.take<float>(kWarps * kD)),
        seen(carver.take<int2>(covered_columns<kD>(call.columns))),
        queries{carver.take<T, 128>(covered_columns<kD>(call.columns) * kD)},
        new_k{carver.take<T, 128>(call.p.k ? call.tokens * kD : 0)},
        new_v{carver.take<T, 128>(call.p.k ? call.tokens * kD : 0)},
        ring(carver.take<T, 128>(ring_size(call))),
        bytes(carver.used()) {}

  // Rows of sums are four floats longer than kD: the lanes of a store then fall on different banks.
  static constexpr int kSumsRow = kD + 4;

  DELTAMEM_HD static int ring_size(const Argument& call) {
    const int tiles = call.stages * 2 * kTileSlots * kD;
    const int merge = kWarps * covered_columns<kD>(call.columns) * (kSumsRow + 2) *
                      static_cast<int>(sizeof(float) / sizeof(T));
    return tiles > merge ? tiles : merge;
  }
  // Of this warp.
  DELTAMEM_DEVICE Tile<T, kD> stage(int stages, int stage, int is_v) const {
    return {ring + ((ptx::warp() * stages + stage) * 2 + is_v) * kSlice * kD};
  }
};

}  // namespace deltamem::cuda::decode
