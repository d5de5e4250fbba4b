// The rows of a call: dense batch rows, or packed sequences cut by cu_seqlens; and their masks.
#pragma once

#include "params.h"

namespace deltamem {

// Tokens [start, start + length) of batch row `batch` form one sequence.
struct Span {
  int64_t batch, start, length;
};

DELTAMEM_HD int64_t num_rows(const Rows& rows, int64_t batch_size) {
  return rows.cu_seqlens ? rows.cu_seqlens.size[0] - 1 : batch_size;
}

DELTAMEM_HD Span row_span(const Rows& rows, int64_t row, int64_t tokens) {
  if (!rows.cu_seqlens) return {row, 0, tokens};
  const int32_t* cu = rows.cu_seqlens.at<int32_t>();
  return {0, cu[row], cu[row + 1] - cu[row]};
}

// First token that belongs to no sequence (tokens of a packed batch may run past the last one).
DELTAMEM_HD int64_t packed_end(const Rows& rows) {
  return *rows.cu_seqlens.at<int32_t>(rows.cu_seqlens.size[0] - 1);
}

// The row that token (batch, t) belongs to; -1 past the last packed sequence.
DELTAMEM_HD int64_t row_of(const Rows& rows, int64_t batch, int64_t t) {
  if (!rows.cu_seqlens) return batch;
  const int32_t* cu = rows.cu_seqlens.at<int32_t>();
  int64_t low = 0, high = rows.cu_seqlens.size[0];  // the first entry above t lies in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cu[middle] > t) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low == rows.cu_seqlens.size[0] ? -1 : low - 1;
}

DELTAMEM_HD bool is_masked(const Rows& rows, int64_t batch, int64_t token) {
  return rows.token_mask && !*rows.token_mask.at<bool>(batch, token);
}

// Tokens of a span that its mask leaves, where only a tail may be masked.
DELTAMEM_HD int64_t unmasked_length(const Rows& rows, const Span& span) {
  if (!rows.token_mask) return span.length;
  int64_t length = 0,
          masked = span.length;  // tokens below `length` are not masked, those from `masked` on are
  while (length < masked) {
    const int64_t middle = (length + masked) / 2;
    if (is_masked(rows, span.batch, span.start + middle)) {
      masked = middle;
    } else {
      length = middle + 1;
    }
  }
  return length;
}

DELTAMEM_HD bool is_padding(const Tensor& state_indices, int64_t row) {
  return state_indices && *state_indices.at<int32_t>(row) < 0;
}

}  // namespace deltamem
