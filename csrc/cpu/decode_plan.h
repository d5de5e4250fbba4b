// The rows of a decode call and how their keys are cut into splits.
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "params.h"

namespace deltamem::DELTAMEM_ISA {

// With num_splits = 0, a row is cut so that its (split, kv head) pairs are about this many, enough for threads to
// share one row evenly, and splits are long enough that writing and merging a partial result is little beside them.
// Both depend on the row alone, so that its bits do, too.
inline constexpr int64_t kSplitsPerRow = 128;
inline constexpr int64_t kShortestSplit = 256;

struct Row {
  int64_t number = 0;
  Span span = {};          // of its tokens in the batch; those from `tokens` on are masked or padding
  int64_t tokens = 0;
  int64_t first_slot = 0;  // of the first token; negative if keys are fewer than tokens
  int64_t lo = 0, hi = 0;  // slots that some token sees
  int64_t split_keys = 0;
  int64_t splits = 0;
  int64_t first_split = 0;  // in the call
};

struct Slots {
  int64_t from, to;
};

// Slots of row's keys that its token i sees.
inline Slots visible_slots(const Row& row, int64_t i, const Softmax& softmax) {
  Slots seen = {row.lo, row.hi};
  const int64_t slot = row.first_slot + i;
  const int64_t right = softmax.causal ? 0 : softmax.window_right;
  if (softmax.window_left >= 0) seen.from = max(seen.from, slot - softmax.window_left);
  if (right >= 0) seen.to = min(seen.to, slot + right + 1);
  return seen;
}

// Every row of a call, and one more for tokens of a packed batch that belong to none.
class DecodePlan {
 public:
  DecodePlan(const DeltaDecodeParams& p, int64_t kv_heads)
      : count_(num_rows(p.attention.attention.rows, p.attention.attention.q.size[0]) + 1), rows_(count_) {
    const DeltaAttentionParams& attention = p.attention.attention;
    for (int64_t n = 0; n < count_; ++n) {
      rows_[n] = n + 1 < count_ ? row(p, n, kv_heads) : tokens_past_end(attention);
      rows_[n].number = n;
      rows_[n].first_split = splits_;
      splits_ += rows_[n].splits;
      most_tokens_ = max(most_tokens_, rows_[n].tokens);
    }
  }

  int64_t count() const { return count_; }
  int64_t splits() const { return splits_; }
  int64_t most_tokens() const { return most_tokens_; }
  const Row& operator[](int64_t n) const { return rows_.data[n]; }

 private:
  static Row row(const DeltaDecodeParams& p, int64_t n, int64_t kv_heads) {
    const DeltaAttentionParams& attention = p.attention.attention;
    const Cache& cache = p.attention.cache;
    Row row;
    row.span = row_span(attention.rows, n, attention.q.size[1]);
    if (is_padding(p.attention.state_indices, n)) return row;
    row.tokens = unmasked_length(attention.rows, row.span);
    if (row.tokens == 0) return row;
    const int64_t filled = *cache.cache_seqlens.at<int32_t>(n);
    row.hi = filled + (p.attention.appended ? row.tokens : 0);
    row.first_slot = row.hi - row.tokens;
    row.lo = cache.cache_leftpad ? *cache.cache_leftpad.at<int32_t>(n) : 0;
    row.lo = max<int64_t>(0, visible_slots(row, 0, attention.softmax).from);
    row.hi = max(row.lo, visible_slots(row, row.tokens - 1, attention.softmax).to);
    cut(row, p.attention.num_splits, kv_heads);
    return row;
  }

  static void cut(Row& row, int64_t num_splits, int64_t kv_heads) {
    const int64_t keys = row.hi - row.lo;
    if (num_splits == 0) {
      num_splits = max<int64_t>(1, min(ceil_div(kSplitsPerRow, kv_heads), keys / kShortestSplit));
    }
    row.split_keys = round_up(ceil_div(keys, num_splits), kKeys);
    row.splits = row.split_keys > 0 ? ceil_div(keys, row.split_keys) : 0;
  }

  static Row tokens_past_end(const DeltaAttentionParams& attention) {
    Row row;
    if (!attention.rows.cu_seqlens) return row;
    const int64_t end = packed_end(attention.rows);
    row.span = {0, end, attention.q.size[1] - end};
    return row;
  }

  int64_t count_;
  Buffer<Row> rows_;
  int64_t splits_ = 0, most_tokens_ = 0;
};

}  // namespace deltamem::DELTAMEM_ISA
