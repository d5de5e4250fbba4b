// Which keys a query sees. Queries and keys stand at slots: the index in the sequence, or in the cache.
#pragma once

#include "rows.h"

namespace deltamem {

// Slots [begin, end).
struct KeyRange {
  int64_t begin, end;
  DELTAMEM_HD bool empty() const { return end <= begin; }
  DELTAMEM_HD KeyRange joined(KeyRange other) const {
    return {begin < other.begin ? begin : other.begin, end > other.end ? end : other.end};
  }
  DELTAMEM_HD bool covers(KeyRange other) const { return begin <= other.begin && other.end <= end; }
};

// What the causal rule and the window leave of `keys` to the query at `slot`. Differences, not sums, are
// compared with the window: it may be as large as an int64.
DELTAMEM_HD KeyRange visible_keys(const Softmax& softmax, int64_t slot, KeyRange keys) {
  int64_t left = softmax.window_left, right = softmax.causal ? 0 : softmax.window_right;
  KeyRange seen = keys;
  if (left >= 0 && left < slot - keys.begin) seen.begin = slot - left;
  if (right >= 0 && right < keys.end - 1 - slot) seen.end = slot + right + 1;
  return seen.empty() ? KeyRange{0, 0} : seen;
}

// One row of a call as attention sees it.
struct Sequence {
  Span span;           // its queries
  int64_t first_slot;  // slot of the first query
  KeyRange keys;       // slots that hold keys
};

// Without a cache, slots count the tokens of the span.
DELTAMEM_HD Sequence self_sequence(const Rows& rows, int64_t row, int64_t tokens) {
  Span span = row_span(rows, row, tokens);
  return {span, 0, {0, span.length}};
}

// With a cache: masked tail tokens are no queries; the queries are the last slots before the keys' end.
DELTAMEM_HD Sequence cached_sequence(const DeltaAttentionCacheParams& p, int64_t row) {
  const Rows& rows = p.attention.rows;
  Span span = row_span(rows, row, p.attention.q.size[1]);
  span.length = is_padding(p.state_indices, row) ? 0 : unmasked_length(rows, span);
  int64_t filled = *p.cache.cache_seqlens.at<int32_t>(row);
  int64_t end = p.appended ? filled + span.length : filled;
  int64_t begin = p.cache.cache_leftpad ? *p.cache.cache_leftpad.at<int32_t>(row) : 0;
  return {span, end - span.length, {begin, begin < end ? end : begin}};
}

// Where the rows of keys (or values) of one sequence and kv head lie: slots of a batch row, or pages.
struct KeyRows {
  const Tensor* tensor;
  int64_t batch, start, head;
  const int32_t* pages;  // of this sequence, optional

  template <class T>
  DELTAMEM_HD const T* at(int64_t slot) const {
    if (pages == nullptr) return tensor->at<T>(batch, start + slot, head);
    int64_t page_size = tensor->size[1];
    return tensor->at<T>(pages[slot / page_size], slot % page_size, head);
  }
};

}  // namespace deltamem
