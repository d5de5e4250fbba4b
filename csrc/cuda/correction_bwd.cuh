// Reverse of y = x + delta reads for rows of kD channels, one warp a row, as prepare.cuh goes forward:
//
//     dreads += delta^T dy        summed over the heads of a token: by each warp in its own row, over warps
//     at the end ddelta += dy reads^T        summed over tokens: in registers over a chunk of them, over
//     chunks and parts in memory
//
// A part is the run of tokens that one block takes; parts are added in order by sum_parts, so sums have one
// order.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/prepare.cuh"

namespace deltamem::cuda {

inline constexpr int kBwdWarps = 8;
inline constexpr int kChunk = 32;      // tokens for which a warp keeps a head's sums in registers
inline constexpr int kMaxParts = 256;  // about two blocks for each multiprocessor of the largest chips

// The tokens of a call, rows of T, in parts of whole chunks, a part a block; the same on every chip, as are
// the bits of the sums. HR: numbers of a token's reads.
struct Parts {
  int64_t T, tokens, chunks_each;
  int HR;

  Parts(int64_t T, int64_t tokens, int HR)
      : T(T),
        tokens(tokens),
        chunks_each(ceil_div(ceil_div(tokens, int64_t{kChunk}), int64_t{kMaxParts})),
        HR(HR) {
    if (chunks_each == 0) chunks_each = 1;
  }
  int64_t count() const { return ceil_div(tokens, kChunk * chunks_each); }
};

// ddelta's rows of one head over a chunk of tokens. kHR = 0: no registers could hold them, so they are added
// to memory token by token.
template <int kD, int kHR>
class DeltaGradient {
 public:
  static constexpr int kChannels = kD / 32;

  // sums: the head's rows [D, HR] of this part; later chunks add to them.
  DELTAMEM_DEVICE DeltaGradient(float* sums, int D, int HR, bool is_first_chunk)
      : sums_(sums), D_(D), HR_(HR), keep_(!is_first_chunk) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      if constexpr (kHR > 0) {
#pragma unroll
        for (int j = 0; j < kHR; ++j) sum_[i][j] = 0.0f;
      } else if (is_first_chunk && channel(i) < D) {
        for (int j = 0; j < HR; ++j) sums[int64_t{channel(i)} * HR + j] = 0.0f;
      }
    }
  }

  DELTAMEM_DEVICE void add(const float (&dy)[kChannels], const float* reads) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      if constexpr (kHR > 0) {
#pragma unroll
        for (int j = 0; j < kHR; ++j) sum_[i][j] += dy[i] * reads[j];
      } else if (channel(i) < D_) {
        for (int j = 0; j < HR_; ++j) sums_[int64_t{channel(i)} * HR_ + j] += dy[i] * reads[j];
      }
    }
  }

  DELTAMEM_DEVICE void store() {
    if constexpr (kHR > 0) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        if (channel(i) >= D_) continue;
        float* row = sums_ + channel(i) * kHR;
        if (keep_) {
          float before[kHR];
          load_vector(row, before);
#pragma unroll
          for (int j = 0; j < kHR; ++j) sum_[i][j] += before[j];
        }
        store_vector(row, sum_[i]);
      }
    }
  }

 private:
  DELTAMEM_DEVICE static int channel(int i) { return HeadPreparation<kD, kHR>::channel(i); }

  float* sums_;
  int D_, HR_;
  bool keep_;
  float sum_[kChannels][kHR > 0 ? kHR : 1];
};

// dreads [HR] += delta^T dy, in this warp's own memory. With eight columns, lanes halve them as they add:
// after three exchanges a lane has one column of a quarter of the channels' owners, after two more all of it.
template <int kD, int kHR>
DELTAMEM_DEVICE void add_dreads(const HeadPreparation<kD, kHR>& head, const float (&dy)[kD / 32], int HR,
                                float* dreads) {
  const int lane = ptx::lane();
  if constexpr (kHR == 8) {
    float sum[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sum[j] = 0.0f;
#pragma unroll
      for (int i = 0; i < kD / 32; ++i) sum[j] += head.weight(i, j) * dy[i];
    }
    int column = 0;
#pragma unroll
    for (int count = 4, distance = 16; count > 0; count /= 2, distance /= 2) {
      const bool upper = lane & distance;
      column = 2 * column + upper;
#pragma unroll
      for (int j = 0; j < count; ++j) {
        const float sent = upper ? sum[j] : sum[j + count];
        sum[j] = (upper ? sum[j + count] : sum[j]) + ptx::shfl_xor(sent, distance);
      }
    }
    sum[0] += ptx::shfl_xor(sum[0], 2);
    sum[0] += ptx::shfl_xor(sum[0], 1);
    if (lane % 4 == 0) dreads[column] += sum[0];
  } else {
    for (int j = 0; j < HR; ++j) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kD / 32; ++i) sum += head.weight(i, j) * dy[i];
      sum = sum_of_warp(sum);
      if (lane == j % 32) dreads[j] += sum;
    }
  }
}

// target [count] = sum over warps of rows [kBwdWarps, count], by the whole block.
DELTAMEM_DEVICE float sum_of_warps(const float* rows, int count, int i) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kBwdWarps; ++w) sum += rows[int64_t{w} * count + i];
  return sum;
}

// The chunks of this block's part: reads [kChunk, HR] of one into shared memory, work(first token, count,
// this warp's dreads, whether it is the part's first), then what the warps left in all_dreads [kBwdWarps,
// kChunk, HR] summed to `to`, if it is there. The whole block calls it.
template <class Work>
DELTAMEM_DEVICE void walk_chunks(const Parts& s, const Tensor& from, const Tensor& to, float* reads,
                                 float* all_dreads, Work&& work) {
  float* dreads = all_dreads + int64_t{ptx::warp()} * kChunk * s.HR;
  for (int64_t chunk = 0; chunk < s.chunks_each; ++chunk) {
    const int64_t first = (ptx::block() * s.chunks_each + chunk) * kChunk;
    const int count = s.tokens - first < kChunk ? s.tokens - first : kChunk;
    if (count <= 0) break;
    ptx::sync_block();  // the last chunk's sums are read, its reads used
    for (int i = ptx::warp(); i < count && s.HR > 0; i += kBwdWarps) {
      load_reads(from, (first + i) / s.T, (first + i) % s.T, reads + i * s.HR);
    }
    for (int i = ptx::lane(); i < kChunk * s.HR; i += kWarp) dreads[i] = 0.0f;
    ptx::sync_block();
    work(first, count, dreads, chunk == 0);
    ptx::sync_block();
    for (int i = ptx::thread(); to && i < count * s.HR; i += kBwdWarps * kWarp) {
      const int64_t token = first + i / s.HR;
      const int j = i % s.HR, R = to.size[3];
      *(to.at<float>(token / s.T, token % s.T, j / R) + j % R) = sum_of_warps(all_dreads, kChunk * s.HR, i);
    }
  }
}

// out [count] = sum over parts of parts [num_parts, stride], rounded to out's dtype.
void sum_parts(Call& call, const float* parts, int64_t num_parts, int64_t stride, int64_t count,
               const Tensor& out);

}  // namespace deltamem::cuda
