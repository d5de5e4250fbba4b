// The preparation of raw head rows, the only one on the CPU: delta_prep is it, attention and decode use it as
// their prologue.
//
//     x' = RoPE(RMSNorm(x + delta reads)),    RMSNorm(x) = x / sqrt(mean(x^2) + eps) * norm
//
// One row is the D channels of one head of one token. In use, per call:
//
//     CorrectionWeights weights(params.on_q, HQ, D, HR, eps, convert_all, num_threads);
//     per thread:
//       Buffer<float> weight_scratch(weights.scratch_size()), token_scratch(token_scratch_size(reads,
//       rotary)); HeadCorrection head = weights.head(h, weight_scratch);      // any order: heads outside
//       tokens or inside TokenInputs token = token_inputs(reads, rotary, batch, t, position, token_scratch);
//       prepare_row(q.at<T>(batch, t, h), head, token, row);        // fp32 [D]; round_row stores it
//
// The result of a row depends on nothing but its operands: not on convert_all, threads or neighbours.
#pragma once

#include <cmath>

#include "cpu/simd.h"
#include "params.h"

namespace deltamem::DELTAMEM_ISA {

// ---- weights
// -----------------------------------------------------------------------------------------------

// One head's weights as fp32, rows padded with zeros to whole vectors.
struct HeadCorrection {
  int64_t D = 0;
  int64_t HR = 0;                // H * R, the length of a token's reads
  const float* delta = nullptr;  // [HR, padded D], null: nothing is added
  const float* norm = nullptr;   // [padded D], null: no RMSNorm
  float eps = 0.0f;

  int64_t padded() const { return round_up(D, kWidth); }
};

// The first kCols values of D rows, `stride` apart, as columns of target [kCols, padded D]. Returns how many
// rows are done: whole blocks of kWidth.
template <int kCols, class T>
inline int64_t transpose_blocks(const T* source, int64_t stride, int64_t D, float* target) {
  int64_t d = 0, padded = round_up(D, kWidth);
  for (; d + kWidth <= D; d += kWidth) {
    T rows[kWidth * kCols];
    const T* block = source + d * stride;
    int64_t step = stride;
    if (kCols != kWidth) {
      step = kWidth;
      if (stride != kCols) {
        for (int i = 0; i < kWidth; ++i) std::memcpy(rows + i * kCols, block + i * stride, sizeof(T) * kCols);
        block = rows;
      }
    }
    F32 v[kCols];
#pragma GCC unroll 16
    for (int i = 0; i < kCols; ++i) v[i] = load(block + i * step);
    transpose_lanes<kCols>(v);
#pragma GCC unroll 16
    for (int i = 0; i < kCols; ++i) store(target + i * padded + d, v[i]);
  }
  return d;
}

// target [HR, padded D] = rows [first, first + D) of weight [., HR], transposed, as fp32.
inline void transpose_weight(const Tensor& weight, int64_t first, int64_t D, float* target) {
  const int64_t HR = weight.size[1], padded = round_up(D, kWidth);
  dispatch_float(weight.dtype, [&](auto type) {
    const auto* source = weight.at<decltype(type)>(first);
    const int64_t stride = weight.stride[0];
    const int cols = HR % kWidth == 0 ? kWidth : HR % 8 == 0 ? 8 : HR % 4 == 0 ? 4 : 1;
    int64_t done = 0;
    for (int64_t j = 0; cols > 1 && j < HR; j += cols) {
      float* column = target + j * padded;
      done = cols == kWidth ? transpose_blocks<kWidth>(source + j, stride, D, column)
             : cols == 8    ? transpose_blocks<8>(source + j, stride, D, column)
                            : transpose_blocks<4>(source + j, stride, D, column);
    }
    for (int64_t j = 0; j < HR; ++j) {
      for (int64_t d = done; d < D; ++d) target[j * padded + d] = to_float(source[d * stride + j]);
      for (int64_t d = D; d < padded; ++d) target[j * padded + d] = 0.0f;
    }
  });
}

// The weights of all heads of one projection, or of any tall weight [rows, HR] in pieces of D rows, the last
// one as long as it is. convert_all: every head's delta is converted here, once, for callers that come to a
// head many times; otherwise head() converts it into its caller's scratch, for calls of few tokens, where
// each head is met once.
class CorrectionWeights {
 public:
  CorrectionWeights(const Correction& correction, int64_t heads, int64_t D, int64_t HR, float eps,
                    bool convert_all, int num_threads)
      : delta_(correction.delta),
        head_{D, HR, nullptr, nullptr, eps},
        head_size_(correction.delta ? HR * round_up(D, kWidth) : 0),
        converted_all_(convert_all),
        norm_(correction.norm ? round_up(D, kWidth) : 0),
        all_(convert_all ? heads * head_size_ : 0) {
    if (correction.norm) {
      load_row(correction.norm, 0, 0, 0, norm_, D);
      for (int64_t d = D; d < round_up(D, kWidth); ++d) norm_[d] = 0.0f;
      head_.norm = norm_;
    }
    if (!convert_all || !delta_) return;
    const bool threads_pay = heads * head_size_ > (1 << 16);
#pragma omp parallel for num_threads(num_threads) schedule(static) if (threads_pay)
    for (int64_t h = 0; h < heads; ++h) transpose_weight(delta_, h * D, length(h), all_ + h * head_size_);
  }

  int64_t scratch_size() const { return converted_all_ ? 0 : head_size_; }

  HeadCorrection head(int64_t h, float* scratch) const {
    HeadCorrection found = head_;
    if (!delta_) return found;
    found.D = length(h);
    if (converted_all_) {
      found.delta = all_.data + h * head_size_;
    } else {
      transpose_weight(delta_, h * head_.D, found.D, scratch);
      found.delta = scratch;
    }
    return found;
  }

 private:
  int64_t length(int64_t h) const { return min(head_.D, delta_.size[0] - h * head_.D); }

  Tensor delta_;
  HeadCorrection head_;
  int64_t head_size_;
  bool converted_all_;
  Buffer<float> norm_;
  Buffer<float> all_;
};

// ---- tokens
// ------------------------------------------------------------------------------------------------

// What all heads of a token share. Channels from 2 * rotary_half on do not rotate.
struct TokenInputs {
  const float* reads = nullptr;  // [HR]
  const float* cos = nullptr;    // [rotary_half], null: no RoPE
  const float* sin = nullptr;
  int64_t rotary_half = 0;
  bool interleaved = false;
};

inline int64_t rotary_half(const Rotary& rotary) {
  return rotary.cos ? rotary.cos.size[rotary.cos.ndim - 1] : 0;
}

inline int64_t token_scratch_size(const Tensor& reads, const Rotary& rotary) {
  return 2 * rotary_half(rotary) + (reads ? reads.size[2] * reads.size[3] : 0);
}

// A table's row for token (batch, t): the row itself if fp32, else a copy in scratch.
inline const float* table_row(const Tensor& table, int64_t batch, int64_t t, int64_t position,
                              float* scratch) {
  const int64_t i0 = table.ndim == 3 ? batch : position, i1 = table.ndim == 3 ? t : 0;
  if (table.dtype == DType::f32) return table.at<float>(i0, i1);
  load_row(table, i0, i1, 0, scratch, table.size[table.ndim - 1]);
  return scratch;
}

inline const float* reads_row(const Tensor& reads, int64_t batch, int64_t t, float* scratch) {
  const int64_t H = reads.size[2], R = reads.size[3];
  if (H == 1 || reads.stride[2] == R) return reads.at<float>(batch, t);
  for (int64_t h = 0; h < H; ++h) {
    std::memcpy(scratch + h * R, reads.at<float>(batch, t, h), R * sizeof(float));
  }
  return scratch;
}

// position: the token's row in two-dimensional tables unless rotary.positions says another.
// reads: absent where no projection of the call is corrected. Points into scratch and into the tensors.
inline TokenInputs token_inputs(const Tensor& reads, const Rotary& rotary, int64_t batch, int64_t t,
                                int64_t position, float* scratch) {
  TokenInputs token;
  if (rotary.cos) {
    const int64_t half = rotary_half(rotary);
    if (rotary.positions) position = *rotary.positions.at<int32_t>(batch, t);
    token.cos = table_row(rotary.cos, batch, t, position, scratch);
    token.sin = table_row(rotary.sin, batch, t, position, scratch + half);
    token.rotary_half = half;
    token.interleaved = rotary.interleaved;
    scratch += 2 * half;
  }
  if (reads) token.reads = reads_row(reads, batch, t, scratch);
  return token;
}

// The token without its RoPE, for v.
inline TokenInputs without_rotary(TokenInputs token) {
  token.cos = token.sin = nullptr;
  token.rotary_half = 0;
  return token;
}

// ---- one row
// -----------------------------------------------------------------------------------------------

// kCount vectors of x + delta reads from channel d on. Returns the squares' sum by lanes.
template <int kCount, class T>
inline F32 correct_vectors(const T* x, const HeadCorrection& head, const float* reads, int64_t d,
                           float* out) {
  F32 sum[kCount] = {};
  if (head.delta != nullptr) {
    const float* weight = head.delta + d;
    for (int64_t j = 0; j < head.HR; ++j, weight += head.padded()) {
      const F32 read = broadcast(reads[j]);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) sum[i] = sum[i] + load(weight + i * kWidth) * read;
    }
  }
  F32 squares = zero();
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const F32 y = load(x + d + i * kWidth) + sum[i];
    store(out + d + i * kWidth, y);
    squares = squares + y * y;
  }
  return squares;
}

// out [D] = x + delta reads; returns the sum of its squares.
template <class T>
inline float correct_row(const T* x, const HeadCorrection& head, const float* reads, float* out) {
  const int64_t D = head.D;
  F32 squares = zero();
  int64_t d = 0;
  for (; d + 4 * kWidth <= D; d += 4 * kWidth) squares = squares + correct_vectors<4>(x, head, reads, d, out);
  for (; d + kWidth <= D; d += kWidth) squares = squares + correct_vectors<1>(x, head, reads, d, out);
  if (d < D) {
    const int rest = static_cast<int>(D - d);
    F32 sum = zero();
    for (int64_t j = 0; head.delta != nullptr && j < head.HR; ++j) {
      sum = sum + load(head.delta + j * head.padded() + d) * broadcast(reads[j]);
    }
    const F32 y = load_n(x + d, rest) + sum;
    store_n(out + d, y, rest);
    squares = squares + y * y;
  }
  return reduce_add(squares);
}

inline float rms_scale(float sum_of_squares, int64_t D, float eps) {
  return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(D) + eps);
}

// x [D] *= scale * weight
inline void scale_row(float* x, const float* weight, float scale, int64_t D) {
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) store(x + d, load(x + d) * scale * load(weight + d));
  for (; d < D; ++d) x[d] = x[d] * scale * weight[d];
}

// (a, b) -> (a cos - b sin, b cos + a sin) for the pairs of x's first 2 * rotary_half channels, in place.
// direction -1 turns back: the transpose, which a gradient takes.
inline void rotate_row(float* x, const TokenInputs& token, float direction = 1.0f) {
  const int64_t half = token.rotary_half;
  const float *cos = token.cos, *sin = token.sin;
  const int64_t step_a = token.interleaved ? 2 : 1, to_b = token.interleaved ? 1 : half;
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const F32 c = load(cos + i), s = load(sin + i) * direction;
    if (token.interleaved) {
      float *low = x + 2 * i, *high = low + kWidth;
      const F32 a = evens(load(low), load(high)), b = odds(load(low), load(high));
      const F32 turned_a = a * c - b * s, turned_b = b * c + a * s;
      store(low, interleave_low(turned_a, turned_b));
      store(high, interleave_high(turned_a, turned_b));
    } else {
      const F32 a = load(x + i), b = load(x + half + i);
      store(x + i, a * c - b * s);
      store(x + half + i, b * c + a * s);
    }
  }
  for (; i < half; ++i) {
    const float a = x[i * step_a], b = x[i * step_a + to_b], c = cos[i], s = sin[i] * direction;
    x[i * step_a] = a * c - b * s;
    x[i * step_a + to_b] = b * c + a * s;
  }
}

// prepare_row of a row of kCount vectors, which stays in registers from its load to its store.
template <int kCount, class T>
inline void prepare_vectors(const T* x, const HeadCorrection& head, const TokenInputs& token, float* out) {
  F32 y[kCount] = {};
  if (head.delta != nullptr) {
    const float* weight = head.delta;
    for (int64_t j = 0; j < head.HR; ++j, weight += kCount * kWidth) {
      const F32 read = broadcast(token.reads[j]);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) y[i] = y[i] + load(weight + i * kWidth) * read;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) y[i] = load(x + i * kWidth) + y[i];
  if (head.norm != nullptr) {
    F32 squares[2] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) squares[i % 2] = squares[i % 2] + y[i] * y[i];
    const F32 scale = broadcast(rms_scale(reduce_add(squares[0] + squares[1]), head.D, head.eps));
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) y[i] = y[i] * scale * load(head.norm + i * kWidth);
  }
  const bool turn_here = token.cos != nullptr && !token.interleaved && 2 * token.rotary_half == head.D;
  if (turn_here) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      const F32 c = load(token.cos + i * kWidth), s = load(token.sin + i * kWidth);
      const F32 a = y[i], b = y[i + kCount / 2];
      y[i] = a * c - b * s;
      y[i + kCount / 2] = b * c + a * s;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) store(out + i * kWidth, y[i]);
  if (!turn_here && token.cos != nullptr) rotate_row(out, token);
}

// out [D] = RoPE(RMSNorm(x + delta reads)) as fp32. x: fp32, bf16 or f16; out may be x.
template <class T>
inline void prepare_row(const T* x, const HeadCorrection& head, const TokenInputs& token, float* out) {
  switch (head.D) {
    case 2 * kWidth:
      return prepare_vectors<2>(x, head, token, out);
    case 4 * kWidth:
      return prepare_vectors<4>(x, head, token, out);
    case 8 * kWidth:
      return prepare_vectors<8>(x, head, token, out);
    case 16 * kWidth:
      return prepare_vectors<16>(x, head, token, out);
  }
  const float squares = correct_row(x, head, token.reads, out);
  if (head.norm != nullptr) scale_row(out, head.norm, rms_scale(squares, head.D, head.eps), head.D);
  if (token.cos != nullptr) rotate_row(out, token);
}

}  // namespace deltamem::DELTAMEM_ISA
