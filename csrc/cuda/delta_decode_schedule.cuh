// Which block walks which keys: found on the device, from the lengths and the grid.
//
// The tiles of all items, an item being (row, kv head, block of query columns), stand in one list, row by
// row. Block b of the grid has the range [b, b + 1) * per_block of it: batches of any lengths are balanced to
// a tile. Items are cut into splits, and a block walks those that begin in its range:
//
//     num_splits = 0   at the ranges' ends: each block has one split or a few whole items
//     num_splits = n   into n splits of equal length, wherever they lie in the list: a row's bits are its own
//
// An item without keys counts as one tile, so that some block writes its zeros.
#pragma once

#include "cuda/delta_decode_call.cuh"
#include "cuda/load.cuh"

namespace deltamem::cuda::decode {

// Of a packed row that is longer than max_seqlen promised, the first tokens.
template <int kD>
DELTAMEM_DEVICE Row load_row(const Argument& call, int number) {
  const DeltaAttentionCacheParams& p = call.p.attention;
  const Softmax& softmax = p.attention.softmax;
  const Span span = row_span(p.attention.rows, number, p.attention.q.size[1]);
  const Sequence sequence = cached_sequence(p, number);
  Row row;
  row.number = number;
  row.batch = static_cast<int>(span.batch), row.start = static_cast<int>(span.start);
  row.length = min(static_cast<int>(span.length), call.tokens);
  row.tokens = min(static_cast<int>(sequence.span.length), call.tokens);
  row.first_slot = static_cast<int>(sequence.first_slot);
  row.column_blocks = max(ceil_div(row.tokens * call.group, kMaxColumns<kD>), 1);
  KeyRange keys = sequence.keys, walked = {0, 0};
  if (row.tokens > 0) {
    const KeyRange fresh = {row.first_slot, int64_t{row.first_slot} + row.tokens};
    if (p.appended) keys.end = max(keys.begin, fresh.end);
    const KeyRange first = visible_keys(softmax, fresh.begin, keys);
    const KeyRange last = visible_keys(softmax, fresh.end - 1, keys);
    if (!last.empty()) walked = {first.empty() ? keys.begin : first.begin, last.end};
    if (p.appended) walked = walked.empty() ? fresh : walked.joined(fresh);
  }
  row.keys_begin = static_cast<int>(keys.begin), row.keys_end = static_cast<int>(keys.end);
  row.begin = static_cast<int>(walked.begin), row.end = static_cast<int>(walked.end);
  row.first_tile = row.begin / kTileSlots;
  row.tiles = walked.empty() ? 0 : ceil_div(row.end, kTileSlots) - row.first_tile;
  return row;
}

template <int kD>
class Schedule {
 public:
  DELTAMEM_DEVICE Schedule(const Argument& call, BlockState* block) : call_(call), b_(*block) {}

  // Finds the block's range, and the row in which it begins. Every thread calls it.
  DELTAMEM_DEVICE void begin() {
    const int chunk = ceil_div(call_.rows, kThreads), first = min(ptx::thread() * chunk, call_.rows);
    const int last = min(first + chunk, call_.rows);
    int own = 0, longest = 0;
    for (int n = first; n < last; ++n) {
      const Row row = load_row<kD>(call_, n);
      own += row_tiles(row);
      longest = max(longest, row.listed_tiles());
    }
    int upto = own;  // and the lanes before
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = ptx::shfl_up(upto, distance);
      if (ptx::lane() >= distance) upto += before;
      longest = max(longest, ptx::shfl_xor(longest, distance));
    }
    if (ptx::lane() == 31) b_.tiles[ptx::warp()] = upto, b_.longest[ptx::warp()] = longest;
    ptx::sync_block();
    int start = upto - own, total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < ptx::warp()) start += b_.tiles[w];
      total += b_.tiles[w];
      longest = max(longest, b_.longest[w]);
    }
    int per_block = ceil_div(total, static_cast<int>(ptx::num_blocks()));
    if (call_.num_splits == 0) per_block = max(per_block, ceil_div(longest, kLongestMerge));
    const int position = static_cast<int>(min(ptx::block() * per_block, static_cast<int64_t>(total)));
    if (ptx::thread() == 0) {
      b_.per_block = per_block, b_.position = position, b_.end = min(position + per_block, total);
      b_.segment.listed_tiles = 0;  // nothing is walked yet
    }
    // The thread among whose rows the range begins.
    if (position < total && start <= position && position < start + own) {
      b_.row.number = first;
      b_.row_start = start;
    }
  }

  // Of the segment at hand.
  DELTAMEM_DEVICE const Row& row() const { return b_.row; }
  DELTAMEM_DEVICE const Segment& segment() const { return b_.segment; }

  // To the first segment, or the next one; false: there is none. Every thread calls it.
  DELTAMEM_DEVICE bool advance() {
    ptx::sync_block();
    if (ptx::thread() == 0) {
      b_.position += b_.segment.listed_tiles;
      find_first(b_.row.number, b_.row_start);
    }
    ptx::sync_block();
    return b_.position < b_.end;
  }

 private:
  DELTAMEM_DEVICE int row_tiles(const Row& row) const {
    return call_.kv_heads * row.column_blocks * row.listed_tiles();
  }

  // The first segment from b_.position on, looked for from row n on, which starts at `start`. By one thread.
  DELTAMEM_DEVICE void find_first(int n, int start) {
    for (; b_.position < b_.end; start += row_tiles(b_.row), ++n) {
      b_.row = load_row<kD>(call_, n);
      b_.row_start = start;
      if (b_.position >= start + row_tiles(b_.row)) continue;
      skip_to_split();
      if (b_.position >= start + row_tiles(b_.row)) continue;
      if (b_.position < b_.end) find_segment();
      return;
    }
  }

  // A range may begin inside a split that is another block's.
  DELTAMEM_DEVICE void skip_to_split() {
    if (call_.num_splits == 0) return;
    const int tiles = b_.row.listed_tiles(), length = ceil_div(tiles, call_.num_splits);
    const int offset = (b_.position - b_.row_start) % tiles;
    b_.position += min(ceil_div(offset, length) * length, tiles) - offset;
  }

  DELTAMEM_DEVICE void find_segment() {
    const int tiles = b_.row.listed_tiles(), index = (b_.position - b_.row_start) / tiles;
    const int start = b_.row_start + index * tiles, offset = b_.position - start;
    Segment s;
    s.kv_head = index / b_.row.column_blocks, s.column_block = index % b_.row.column_blocks;
    s.first_column = s.column_block * kMaxColumns<kD>;
    s.columns = max(0, min(kMaxColumns<kD>, b_.row.tokens * call_.group - s.first_column));
    s.item = b_.row.number * call_.kv_heads * call_.column_blocks + index;
    s.item_tiles = tiles;
    if (call_.num_splits > 0) {
      const int length = ceil_div(tiles, call_.num_splits);
      s.listed_tiles = min(length, tiles - offset);
      s.split = offset / length, s.splits = ceil_div(tiles, length);
      s.first_slot = s.next_slot = s.item * call_.num_splits, s.slot_step = 1;
    } else {
      const int first = start / b_.per_block, block = b_.position / b_.per_block;
      s.listed_tiles = min(start + tiles, (block + 1) * b_.per_block) - b_.position;
      s.split = block - first, s.splits = (start + tiles - 1) / b_.per_block - first + 1;
      // Of a block's two partial results, the first continues an item or begins with the range.
      s.first_slot = 2 * first + (start % b_.per_block != 0), s.next_slot = 2 * first, s.slot_step = 2;
    }
    s.first_tile = b_.row.first_tile + offset;
    s.tiles = b_.row.tiles == 0 ? 0 : s.listed_tiles;
    s.is_last = b_.position + s.listed_tiles >= b_.end;
    b_.segment = s;
  }

  const Argument& call_;
  BlockState& b_;
};

}  // namespace deltamem::cuda::decode
