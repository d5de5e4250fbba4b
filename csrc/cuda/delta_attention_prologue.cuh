// The prologue of attention: RoPE(RMSNorm(q + delta reads)) of the block's columns, in place in their tile of
// shared memory. A warp takes kBatch rows of one head at a time, so that the loads and the sums of one hide
// those of the others; the head's weights are read once for them.
#pragma once

#include "cuda/delta_attention.cuh"
#include "cuda/prepare.cuh"

namespace deltamem::cuda {

inline constexpr int kBatch = 4;
inline constexpr int kReads = 8;  // columns of a delta weight at a time

// x = reads [first, first + kCount) of a token.
template <int kCount>
DELTAMEM_DEVICE void load_reads(const Tensor& reads, const TokenPlace& place, int first, float (&x)[kCount]) {
  const int R = static_cast<int>(reads.size[3]);
  int h = first / R, r = first % R;
  if (reads.size[2] == 1 || reads.stride[2] == R) {  // heads in line
    return load_vector(reads.at<float>(place.batch, place.token) + first, x);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = reads.at<float>(place.batch, place.token, h)[r];
    if (++r == R) r = 0, ++h;
  }
}

template <int D>
struct QueryRows {
  static constexpr int kChannels = D / 32;  // of a lane, from channel() on
  using Values = float[kBatch][kChannels];

  DELTAMEM_DEVICE static int channel() { return ptx::lane() * kChannels; }

  // y += delta reads
  DELTAMEM_DEVICE static void correct(const DeltaAttentionParams& p, int head,
                                      const TokenPlace (&place)[kBatch], Values& y) {
    const int HR = static_cast<int>(p.on_q.delta.size[1]);
    int first = 0;
#pragma unroll 1
    for (; first + kReads <= HR; first += kReads) add_columns<kReads>(p, head, place, first, y);
#pragma unroll 1
    for (; first < HR; ++first) add_columns<1>(p, head, place, first, y);
  }

  // Of columns [first, first + kCount) of delta.
  template <int kCount>
  DELTAMEM_DEVICE static void add_columns(const DeltaAttentionParams& p, int head,
                                          const TokenPlace (&place)[kBatch], int first, Values& y) {
    float reads[kBatch][kCount], weight[kChannels][kCount];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) load_reads(p.reads, place[b], first, reads[b]);
    const Tensor& delta = p.on_q.delta;
    dispatch_float(delta.dtype, [&](auto type) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        load_vector(delta.at<decltype(type)>(int64_t(head) * D + channel() + i) + first, weight[i]);
      }
    });
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) y[b][i] += weight[i][j] * reads[b][j];
      }
    }
  }

  // y = RMSNorm(y)
  DELTAMEM_DEVICE static void normalize(const Tensor& norm, float eps, Values& y) {
    float squares[kBatch] = {}, weight[kChannels];
    load_floats(norm, channel(), weight);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) squares[b] += y[b][i] * y[b][i];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) squares[b] = sum_of_warp(squares[b]);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const float scale = 1.0f / sqrtf(squares[b] / static_cast<float>(D) + eps);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) y[b][i] *= scale * weight[i];
    }
  }

  // y = RoPE(y). Where halves pair up in whole lanes a lane has its partner's channels by shuffles, else
  // through scratch [D].
  DELTAMEM_DEVICE static void rotate(const Rotary& rotary, const TokenPlace (&place)[kBatch], float* scratch,
                                     Values& y) {
    const int half = static_cast<int>(rotary.cos.size[rotary.cos.ndim - 1]);
    if (rotary.interleaved || half % kChannels != 0) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) HeadPreparation<D, 0>::rotate(rotary, place[b], scratch, y[b]);
      return;
    }
    const bool is_first = channel() < half, turns = channel() < 2 * half;
    const int index = is_first ? channel() : turns ? channel() - half : 0;
    const int distance = half / kChannels;
    const int partner = !turns ? ptx::lane() : is_first ? ptx::lane() + distance : ptx::lane() - distance;
    Values cos, sin;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) load_floats(rotary.cos, place[b].row_of(rotary.cos) + index, cos[b]);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) load_floats(rotary.sin, place[b].row_of(rotary.sin) + index, sin[b]);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const float other = ptx::shfl(y[b][i], partner), s = is_first ? -sin[b][i] : sin[b][i];
        y[b][i] = turns ? y[b][i] * cos[b][i] + other * s : y[b][i];
      }
    }
  }
};

DELTAMEM_DEVICE bool prepares(const DeltaAttentionParams& p) {
  return p.on_q.delta || p.on_q.norm || p.rotary.cos || p.softmax.scale < 0;
}

// Rows of the tile, of columns of one query head, in place. A negative scale's sign goes into q.
template <class T, int D>
DELTAMEM_DEVICE void prepare_rows(const DeltaAttentionParams& p, const ColumnTile& tile, int head,
                                  const int (&row)[kBatch], Tile<T, D> q, float* scratch) {
  using Rows = QueryRows<D>;
  typename Rows::Values y;
  TokenPlace place[kBatch];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    load_vector(q.at(row[b], Rows::channel()), y[b]);
    const int query = (tile.first + row[b]) / tile.group;
    const int64_t token = tile.start + query;
    // a query before slot 0 sees nothing, yet its rotation must be a row of the table
    place[b] = {tile.batch, token,
                position_of(p.rotary, tile.batch, token, greater(0, tile.first_slot + query))};
  }
  if (p.on_q.delta) Rows::correct(p, head, place, y);
  if (p.on_q.norm) Rows::normalize(p.on_q.norm, p.norm_eps, y);
  if (p.rotary.cos) Rows::rotate(p.rotary, place, scratch, y);
  const float sign = p.softmax.scale < 0 ? -1.0f : 1.0f;
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
#pragma unroll
    for (int i = 0; i < D / 32; ++i) y[b][i] *= sign;
    store_vector(q.at(row[b], Rows::channel()), y[b]);
  }
}

}  // namespace deltamem::cuda
