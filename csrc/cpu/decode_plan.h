// The rows of a decode call and how their keys are cut into splits.
#pragma once

#include "cpu/attention_tile.h"
#include "mask.h"

namespace deltamem::DELTAMEM_ISA {

// With num_splits = 0, a row is cut so that its (split, kv head) pairs are about this many, enough for
// threads to share one row evenly, and splits are long enough that writing and merging a partial result is
// little beside them. Both depend on the row alone, so that its bits do, too.
inline constexpr int64_t kSplitsPerRow = 128;
inline constexpr int64_t kShortestSplit = 256;

struct Row {
  int64_t number = 0;
  Span span = {};  // all tokens of the row; the first `tokens` are live, the others masked or padding
  int64_t tokens = 0;
  int64_t first_slot = 0;  // of the first token; negative if there are fewer keys than tokens
  KeyRange filled = {};    // slots that hold keys
  KeyRange keys = {};      // slots that some token sees
  int64_t split_keys = 0, splits = 0;
  int64_t first_split = 0;  // in the call
};

// Every row of a call, and one more for tokens of a packed batch that belong to none.
class DecodePlan {
 public:
  DecodePlan(const DeltaAttentionCacheParams& p, int64_t kv_heads)
      : count_(num_rows(p.attention.rows, p.attention.q.size[0]) + 1), rows_(count_) {
    for (int64_t n = 0; n < count_; ++n) {
      Row& row = rows_[n];
      row = n + 1 < count_ ? live_row(p, n) : tokens_past_end(p.attention);
      row.number = n;
      cut(row, p.num_splits, kv_heads);
      row.first_split = splits_;
      splits_ += row.splits;
      most_tokens_ = max(most_tokens_, row.tokens);
    }
  }

  int64_t count() const { return count_; }
  int64_t splits() const { return splits_; }
  int64_t most_tokens() const { return most_tokens_; }
  const Row& operator[](int64_t n) const { return rows_.data[n]; }

 private:
  static Row live_row(const DeltaAttentionCacheParams& p, int64_t n) {
    const Sequence sequence = cached_sequence(p, n);
    Row row;
    row.span = row_span(p.attention.rows, n, p.attention.q.size[1]);
    row.tokens = sequence.span.length;
    row.first_slot = sequence.first_slot;
    row.filled = sequence.keys;
    for (int64_t i = 0; i < row.tokens; ++i) {
      const KeyRange seen = visible_keys(p.attention.softmax, row.first_slot + i, row.filled);
      if (seen.empty()) continue;
      row.keys =
          row.keys.empty() ? seen : KeyRange{min(row.keys.begin, seen.begin), max(row.keys.end, seen.end)};
    }
    return row;
  }

  static Row tokens_past_end(const DeltaAttentionParams& attention) {
    Row row;
    if (!attention.rows.cu_seqlens) return row;
    const int64_t end = packed_end(attention.rows);
    row.span = {0, end, attention.q.size[1] - end};
    return row;
  }

  static void cut(Row& row, int64_t num_splits, int64_t kv_heads) {
    const int64_t keys = row.keys.end - row.keys.begin;
    if (keys == 0) return;
    if (num_splits == 0) {
      num_splits = max<int64_t>(1, min(ceil_div(kSplitsPerRow, kv_heads), keys / kShortestSplit));
    }
    row.split_keys = round_up(ceil_div(keys, num_splits), kKeys);
    row.splits = ceil_div(keys, row.split_keys);
  }

  int64_t count_;
  Buffer<Row> rows_;
  int64_t splits_ = 0, most_tokens_ = 0;
};

}  // namespace deltamem::DELTAMEM_ISA
