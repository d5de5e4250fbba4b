// Rows of queries, keys and values into the operands of matmul.h. Rows are staged as zero-padded words first;
// a row that nobody may see is staged as zeros, so that what its memory holds (NaN, even) cannot reach a
// result.
#pragma once

#include "cpu/matmul.h"

namespace deltamem::DELTAMEM_ISA {

// Sizes that follow from the head size.
template <class Word>
struct HeadDims {
  int64_t D, steps, width, panels, rows;
  explicit HeadDims(int64_t D)
      : D(D),
        steps(ceil_div(D, kTerms<Word>)),      // words of a row
        width(round_up(steps, kWidth)),        // words of a staged row
        panels(ceil_div(D, int64_t(kPanel))),  // panels of channels
        rows(round_up(D, kWidth)) {}           // channels of a transposed product
};

// ---- rows to words
// -----------------------------------------------------------------------------------------

// The staged rows' padding is zeroed once, when their buffer is made, and never written.
inline void stage_row(const float* row, const HeadDims<float>& dims, float* words) {
  convert_row(row, words, dims.D);
}
inline void stage_row(const f16* row, const HeadDims<float>& dims, float* words) {
  convert_row(row, words, dims.D);
}
inline void stage_row(const bf16* row, const HeadDims<float>& dims, float* words) {
  convert_row(row, words, dims.D);
}
inline void stage_row(const bf16* row, const HeadDims<Pair>& dims, Pair* words) {
  int64_t i = 0;
  for (; i + kWidth <= dims.D / 2; i += kWidth) std::memcpy(words + i, row + 2 * i, 4 * kWidth);
  std::memcpy(words + i, row + 2 * i, sizeof(bf16) * (dims.D - 2 * i));
}
template <class Word>
inline void stage_zeros(const HeadDims<Word>& dims, Word* words) {
  std::memset(words, 0, sizeof(Word) * dims.width);
}

// An fp32 row [D], rounded to T first. `row` may be `words` where words are fp32.
template <class T>
inline void stage_rounded(const float* row, const HeadDims<float>& dims, float* words) {
  T rounded[kWidth];
  int64_t i = 0;
  for (; i + kWidth <= dims.D; i += kWidth) {
    store(rounded, load(row + i));
    store(words + i, load(rounded));
  }
  for (; i < dims.D; ++i) words[i] = to_float(from_float<T>(row[i]));
}
template <class T>
inline void stage_rounded(const float* row, const HeadDims<Pair>& dims, Pair* words) {
  round_row(row, &words->first, dims.D);
}

// row_at(i), or zeros where that is null, for i < rows. Rows of a head lie far apart, and no hardware
// prefetcher sees the next one coming.
template <class T, class Word, class RowAt>
inline void stage_rows(int64_t rows, const HeadDims<Word>& dims, Word* staged, RowAt&& row_at) {
  constexpr int64_t kAhead = 8;
  for (int64_t i = 0; i < rows; ++i, staged += dims.width) {
    const T* next = i + kAhead < rows ? row_at(i + kAhead) : nullptr;
    if (next != nullptr) {
      for (int64_t d = 0; d < dims.D; d += 64 / sizeof(T)) __builtin_prefetch(next + d);
    }
    const T* row = row_at(i);
    if (row != nullptr) {
      stage_row(row, dims, staged);
    } else {
      stage_zeros(dims, staged);
    }
  }
}

// kWidth rows from source on, `stride` words apart, as columns: x[i] holds word i of every row.
template <class Word>
inline __attribute__((always_inline)) void load_transposed(const Word* source, int64_t stride,
                                                           F32 (&x)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) x[i] = load_words(source + i * stride);
  transpose_lanes<kWidth>(x);
}

// ---- operands
// ----------------------------------------------------------------------------------------------

// kWidth staged rows into lanes lane .. lane + kWidth of [steps, kLanes].
template <class Word>
inline void pack_lanes(const Word* staged, const HeadDims<Word>& dims, int64_t lane, Word* lanes) {
  for (int64_t w0 = 0; w0 < dims.steps; w0 += kWidth) {
    F32 x[kWidth];
    load_transposed(staged + w0, dims.width, x);
    int64_t n = min<int64_t>(kWidth, dims.steps - w0);
    for (int64_t i = 0; i < n; ++i) store_words(lanes + (w0 + i) * kLanes + lane, x[i]);
  }
}

// `rows` (a multiple of kWidth) staged rows into [rows / kPanel, steps, kPanel]: the panels of a product over
// channels.
template <class Word>
inline void pack_row_panels(const Word* staged, const HeadDims<Word>& dims, int64_t rows, Word* panels) {
  static_assert(kWidth == 2 * kPanel);
  for (int64_t r = 0; r < rows; r += kWidth, staged += kWidth * dims.width) {
    for (int64_t w0 = 0; w0 < dims.steps; w0 += kWidth) {
      F32 x[kWidth];
      load_transposed(staged + w0, dims.width, x);
      int64_t n = min<int64_t>(kWidth, dims.steps - w0);
      for (int64_t i = 0; i < n; ++i) {
        Word* target = panels + (r / kPanel * dims.steps + w0 + i) * kPanel;
        std::memcpy(target, &x[i], 4 * kPanel);
        std::memcpy(target + dims.steps * kPanel, reinterpret_cast<char*>(&x[i]) + 4 * kPanel, 4 * kPanel);
      }
    }
  }
}

// `rows` staged rows into [panels of channels, capacity / kTerms, kPanel]: the panels of a product over rows.
inline void pack_column_panels(const float* staged, const HeadDims<float>& dims, int64_t rows,
                               int64_t capacity, float* panels) {
  for (int64_t r = 0; r < rows; ++r, staged += dims.width, panels += kPanel) {
    for (int64_t p = 0; p < dims.panels; ++p) {
      std::memcpy(panels + p * capacity * kPanel, staged + p * kPanel, 4 * kPanel);
    }
  }
}
inline void pack_column_panels(const Pair* staged, const HeadDims<Pair>& dims, int64_t rows, int64_t capacity,
                               Pair* panels) {
  int64_t panel_words = capacity / 2 * kPanel;
  for (int64_t r = 0; r < rows; r += 2, staged += 2 * dims.width, panels += kPanel) {
    const bf16 *even = &staged->first, *odd = &staged[dims.width].first;
    for (int64_t p = 0; p < dims.panels; p += 2) {
      U32 first = __builtin_convertvector(*reinterpret_cast<const U16*>(even + p * kPanel), U32);
      U32 second = __builtin_convertvector(*reinterpret_cast<const U16*>(odd + p * kPanel), U32);
      U32 words = first | (second << 16);
      std::memcpy(panels + p * panel_words, &words, 4 * kPanel);
      if (p + 1 < dims.panels) {
        std::memcpy(panels + (p + 1) * panel_words, reinterpret_cast<char*>(&words) + 4 * kPanel, 4 * kPanel);
      }
    }
  }
}

// Lanes lane .. lane + kWidth of a transposed product [dims.rows, kLanes], times lane_scale, into rows [D] of
// T; a null row is left out.
template <class T, class Word>
inline void unpack_lanes(const float* lanes, const HeadDims<Word>& dims, int64_t lane, F32 lane_scale,
                         T* const* rows) {
  for (int64_t d = 0; d < dims.D; d += kWidth) {
    F32 x[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) x[i] = load(lanes + (d + i) * kLanes + lane) * lane_scale;
    transpose_lanes<kWidth>(x);
    const int64_t n = min<int64_t>(kWidth, dims.D - d);
    for (int i = 0; i < kWidth; ++i) {
      if (rows[i] == nullptr) continue;
      if (n == kWidth) {
        store(rows[i] + d, x[i]);
      } else {
        store_n(rows[i] + d, x[i], static_cast<int>(n));
      }
    }
  }
}

}  // namespace deltamem::DELTAMEM_ISA
