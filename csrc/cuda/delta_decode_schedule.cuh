// Which block walks which keys: found on the device, from the lengths and the grid.
//
// The tiles of all items, an item being (row, kv head, block of query columns), stand in one list, row by row. Block b
// of the grid has the range [b, b + 1) * per_block of it: batches of any lengths are balanced to a tile. Items
// are cut into splits, and a block walks those that begin in its range:
//
//     num_splits = 0   at the ranges' ends: each block has one split or a few whole items
//     num_splits = n   into n splits of equal length, wherever they lie in the list: a row's bits are its own
//
// An item without keys counts as one tile, so that some block writes its zeros.
#pragma once

#include "cuda/delta_decode_call.cuh"
#include "cuda/load.cuh"

namespace deltamem::cuda::decode {

// A row of the call and what is walked of its cache.
struct Row {
  int number;
  Span span;           // its tokens
  int tokens;          // the first ones, which are not masked
  int64_t first_slot;  // of token 0; negative where there are fewer keys than tokens
  KeyRange keys;       // slots that hold keys
  int begin, end;      // slots that some token sees, or that are new
  int first_tile, tiles;
  int column_blocks;

  DELTAMEM_DEVICE int items(const Argument& call) const { return call.kv_heads * column_blocks; }
  DELTAMEM_DEVICE int listed_tiles() const { return max(tiles, 1); }
};

// Of a packed row that is longer than max_seqlen promised, the first tokens.
template <int kD>
DELTAMEM_DEVICE Row load_row(const Argument& call, int number) {
  const DeltaAttentionCacheParams& p = call.p.attention;
  const Sequence sequence = cached_sequence(p, number);
  Row row = {number, row_span(p.attention.rows, number, p.attention.q.size[1])};
  row.span.length = min(row.span.length, static_cast<int64_t>(call.tokens));
  row.tokens = static_cast<int>(min(sequence.span.length, static_cast<int64_t>(call.tokens)));
  row.first_slot = sequence.first_slot;
  row.keys = sequence.keys;
  row.column_blocks = max(ceil_div(row.tokens * call.group, kMaxColumns<kD>), 1);
  KeyRange walked = {0, 0};
  if (row.tokens > 0) {
    const KeyRange fresh = {row.first_slot, row.first_slot + row.tokens};
    if (p.appended) row.keys.end = max(row.keys.begin, fresh.end);
    const Softmax& softmax = p.attention.softmax;
    const KeyRange first = visible_keys(softmax, fresh.begin, row.keys);
    const KeyRange last = visible_keys(softmax, fresh.end - 1, row.keys);
    if (!last.empty()) walked = {first.empty() ? row.keys.begin : first.begin, last.end};
    if (p.appended) walked = walked.empty() ? fresh : walked.joined(fresh);
  }
  row.begin = static_cast<int>(walked.begin), row.end = static_cast<int>(walked.end);
  row.first_tile = row.begin / kTileSlots;
  row.tiles = walked.empty() ? 0 : ceil_div(row.end, kTileSlots) - row.first_tile;
  return row;
}

// A split of an item, walked by one block.
struct Segment {
  int kv_head, column_block;
  int first_column, columns;  // of the row's tokens x group, token by token
  int item;                   // in item_counters
  int item_tiles, listed_tiles;  // of the item and of this split in the list
  int first_tile, tiles;         // to be walked
  int split, splits;
  int first_slot, next_slot, slot_step;  // where the splits' partial results lie

  DELTAMEM_DEVICE int slot_of(int s) const { return s == 0 ? first_slot : next_slot + s * slot_step; }
};

template <int kD>
class Schedule {
 public:
  // Every thread of the block calls it.
  DELTAMEM_DEVICE Schedule(const Argument& call, Words* words) : call_(call) {
    const int chunk = ceil_div(call.rows, kThreads), first = min(ptx::thread() * chunk, call.rows);
    const int last = min(first + chunk, call.rows);
    int own = 0, longest = 0;
    for (int n = first; n < last; ++n) {
      const Row row = load_row<kD>(call, n);
      own += row.items(call) * row.listed_tiles();
      longest = max(longest, row.listed_tiles());
    }
    int upto = own;  // and the lanes before
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = ptx::shfl_up(upto, distance);
      if (ptx::lane() >= distance) upto += before;
      longest = max(longest, ptx::shfl_xor(longest, distance));
    }
    if (ptx::lane() == 31) words->tiles[ptx::warp()] = upto, words->longest[ptx::warp()] = longest;
    ptx::sync_block();
    int start = upto - own;
    for (int w = 0; w < kWarps; ++w) {
      if (w < ptx::warp()) start += words->tiles[w];
      total_ += words->tiles[w];
      longest = max(longest, words->longest[w]);
    }
    const int blocks = static_cast<int>(ptx::num_blocks());
    per_block_ = ceil_div(total_, blocks);
    if (call.num_splits == 0) per_block_ = max(per_block_, ceil_div(longest, kLongestMerge));
    position_ = static_cast<int>(min(ptx::block() * per_block_, static_cast<int64_t>(total_)));
    end_ = min(position_ + per_block_, total_);
    for (int n = first; n < last && position_ >= start; ++n) {  // the thread whose rows the range begins in
      const Row row = load_row<kD>(call, n);
      const int tiles = row.items(call) * row.listed_tiles();
      if (position_ < start + tiles) words->first_row = n, words->first_row_start = start;
      start += tiles;
    }
    ptx::sync_block();
    if (is_done()) return;
    row_start_ = words->first_row_start;
    row_ = load_row<kD>(call, words->first_row);
    skip_to_split();
  }

  DELTAMEM_DEVICE bool is_done() const { return position_ >= end_; }
  DELTAMEM_DEVICE const Row& row() const { return row_; }

  // The segment at hand, of row(). Valid while not is_done().
  DELTAMEM_DEVICE Segment segment() const {
    const int tiles = row_.listed_tiles(), index = (position_ - row_start_) / tiles;
    const int start = row_start_ + index * tiles, offset = position_ - start;
    Segment s;
    s.kv_head = index / row_.column_blocks, s.column_block = index % row_.column_blocks;
    s.first_column = s.column_block * kMaxColumns<kD>;
    s.columns = max(0, min(kMaxColumns<kD>, row_.tokens * call_.group - s.first_column));
    s.item = row_.number * call_.kv_heads * call_.column_blocks + index;
    s.item_tiles = tiles;
    if (call_.num_splits > 0) {
      const int length = ceil_div(tiles, call_.num_splits);
      s.listed_tiles = min(length, tiles - offset);
      s.split = offset / length, s.splits = ceil_div(tiles, length);
      s.first_slot = s.next_slot = s.item * call_.num_splits, s.slot_step = 1;
    } else {
      const int first = start / per_block_, block = position_ / per_block_;
      s.listed_tiles = min(start + tiles, (block + 1) * per_block_) - position_;
      s.split = block - first, s.splits = (start + tiles - 1) / per_block_ - first + 1;
      // Of a block's two partial results, the first continues an item or begins with the range.
      s.first_slot = 2 * first + (start % per_block_ != 0), s.next_slot = 2 * first, s.slot_step = 2;
    }
    s.first_tile = row_.first_tile + offset;
    s.tiles = row_.tiles == 0 ? 0 : s.listed_tiles;
    return s;
  }

  DELTAMEM_DEVICE void advance(int listed_tiles) {
    position_ += listed_tiles;
    if (is_done()) return;
    const int row_tiles = row_.items(call_) * row_.listed_tiles();
    if (position_ - row_start_ < row_tiles) return;
    row_start_ += row_tiles;
    row_ = load_row<kD>(call_, row_.number + 1);
  }

 private:
  // A range may begin inside a split that is another block's.
  DELTAMEM_DEVICE void skip_to_split() {
    if (call_.num_splits == 0) return;
    const int tiles = row_.listed_tiles(), length = ceil_div(tiles, call_.num_splits);
    const int offset = (position_ - row_start_) % tiles;
    const int skipped = min(ceil_div(offset, length) * length, tiles) - offset;
    if (skipped > 0) advance(skipped);
  }

  const Argument& call_;
  int total_ = 0, per_block_ = 0;
  int position_ = 0, end_ = 0;  // in the list
  int row_start_ = 0;           // row_'s first tile there
  Row row_ = {};
};

}  // namespace deltamem::cuda::decode
