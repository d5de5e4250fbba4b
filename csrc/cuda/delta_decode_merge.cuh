// From the warps' shares to results: four warps' make a split's, the splits' in their order the item's. A
// result is rounded once, here.
#pragma once

#include "cuda/delta_decode_tiles.cuh"

namespace deltamem::cuda::decode {

template <class T, int kD>
class Merge {
 public:
  DELTAMEM_DEVICE Merge(const Argument& call, const Row& row, const Segment& segment,
                        const Shared<T, kD>& shared)
      : call_(call), row_(row), segment_(segment), block_(shared.block) {
    sums_ = reinterpret_cast<float*>(shared.ring);
    stats_ = sums_ + kWarps * columns() * kRow;
  }

  // This warp's share into shared memory; the warps' rings are done with.
  template <int kN>
  DELTAMEM_DEVICE void put(const Sums<kD, kN>& sums) const {
    const int lane = ptx::lane();
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * n + 2 * (lane % 4) + e;
        float* row = sums_ + (ptx::warp() * columns() + column) * kRow + lane / 4;
#pragma unroll
        for (int m = 0; m < kD / 16; ++m)
          row[16 * m] = sums.out[m][n][e], row[16 * m + 8] = sums.out[m][n][e + 2];
        if (lane < 4)
          set_stats(stats_ + 2 * (ptx::warp() * columns() + column), sums.peak[n][e], sums.total[n][e]);
      }
    }
  }

  // The split's result from the warps' shares: the caller's, if it is all of the item, or a partial one.
  DELTAMEM_DEVICE void join_warps() const {
    for (int i = ptx::thread(); i < segment_.columns * kQuads; i += kThreads) {
      const int column = i / kQuads, channel = i % kQuads * 4;
      float peak = -INFINITY, total = 0.0f, x[4] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) peak = max(peak, stats_[2 * (w * columns() + column)]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* stats = stats_ + 2 * (w * columns() + column);
        const float scale = ptx::exp2(stats[0] - finite(peak));
        total += stats[1] * scale;
        add(x, scale, *reinterpret_cast<const float4*>(sums_ + (w * columns() + column) * kRow + channel));
      }
      if (segment_.splits == 1) {
        store_result(column, channel, x, peak, total);
      } else {
        float* sums = partial_sums(segment_.split, column) + channel;
        *reinterpret_cast<float4*>(sums) = {x[0], x[1], x[2], x[3]};
        if (channel == 0) set_stats(partial_stats(segment_.split, column), peak, total);
      }
    }
  }

  // Whether this block's split is the last of the item's to arrive. Every thread calls it.
  DELTAMEM_DEVICE bool is_last() const {
    if (segment_.splits == 1) return true;
    ptx::sync_block();
    if (ptx::thread() == 0) {
      block_->is_last_split =
          arrive(call_.item_counters + segment_.item, segment_.listed_tiles, segment_.item_tiles);
    }
    ptx::sync_block();
    return block_->is_last_split;
  }

  // The item's result from the partial ones. First the weight of each split in each column, all loads at
  // once.
  DELTAMEM_DEVICE void join_splits() const {
    float* weights = sums_;  // [splits, columns]
    for (int column = ptx::warp(); column < segment_.columns; column += kWarps) {
      float peak = -INFINITY, total = 0.0f;
      for (int s = ptx::lane(); s < segment_.splits; s += 32) {
        peak = max(peak, ptx::load_shared_by_blocks(partial_stats(s, column)));
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) peak = max(peak, ptx::shfl_xor(peak, distance));
      for (int s = ptx::lane(); s < segment_.splits; s += 32) {
        const float* stats = partial_stats(s, column);
        const float weight = ptx::exp2(ptx::load_shared_by_blocks(stats) - finite(peak));
        weights[s * segment_.columns + column] = weight;
        total += weight * ptx::load_shared_by_blocks(stats + 1);
      }
      total = sum_of_warp(total);
      if (ptx::lane() == 0) set_stats(stats_ + 2 * column, peak, total);
    }
    ptx::sync_block();
    for (int i = ptx::thread(); i < segment_.columns * kQuads; i += kThreads) {
      const int column = i / kQuads, channel = i % kQuads * 4;
      float x[4] = {};
#pragma unroll 8
      for (int s = 0; s < segment_.splits; ++s) {
        const float* sums = partial_sums(s, column) + channel;
        add(x, weights[s * segment_.columns + column],
            ptx::load_shared_by_blocks(reinterpret_cast<const float4*>(sums)));
      }
      store_result(column, channel, x, stats_[2 * column], stats_[2 * column + 1]);
    }
  }

  // Zeros for the masked tokens of the item's heads.
  DELTAMEM_DEVICE void clear_masked_tokens() const {
    if (segment_.column_block > 0) return;
    const int group = call_.group, masked = (row_.length - row_.tokens) * group;
    const float zeros[4] = {};
    for (int i = ptx::thread(); i < masked * kQuads; i += kThreads) {
      store_row(row_.tokens * group + i / kQuads, i % kQuads * 4, zeros, -INFINITY);
    }
  }

  // Adds to a counter of tiles; whether they were the last ones, and then it is zero again.
  DELTAMEM_DEVICE static bool arrive(int* counter, int tiles, int all) {
    ptx::fence();
    const bool is_last = ptx::atomic_add(counter, tiles) + tiles == all;
    if (is_last) ptx::atomic_add(counter, -all);
    ptx::fence();
    return is_last;
  }

 private:
  static constexpr int kQuads = kD / 4;  // of channels
  static constexpr int kRow = Shared<T, kD>::kSumsRow;

  DELTAMEM_DEVICE int columns() const { return covered_columns<kD>(segment_.columns); }
  DELTAMEM_DEVICE static float finite(float peak) { return peak == -INFINITY ? 0.0f : peak; }
  DELTAMEM_DEVICE static void set_stats(float* stats, float peak, float total) {
    stats[0] = peak, stats[1] = total;
  }
  DELTAMEM_DEVICE static void add(float (&x)[4], float scale, float4 y) {
    x[0] += scale * y.x, x[1] += scale * y.y, x[2] += scale * y.z, x[3] += scale * y.w;
  }
  DELTAMEM_DEVICE float* partial_sums(int split, int column) const {
    return call_.sums + (static_cast<int64_t>(segment_.slot_of(split)) * call_.columns + column) * kD;
  }
  DELTAMEM_DEVICE float* partial_stats(int split, int column) const {
    return call_.stats + (static_cast<int64_t>(segment_.slot_of(split)) * call_.columns + column) * 2;
  }

  DELTAMEM_DEVICE void store_result(int column, int channel, float (&x)[4], float peak, float total) const {
    constexpr float kLn2 = 0.6931471805599453f;
    const float share = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] *= share;
    store_row(segment_.first_column + column, channel, x,
              total > 0.0f ? (peak + log2f(total)) * kLn2 : -INFINITY);
  }

  // Four channels of a column of the row; its first thread stores lse.
  DELTAMEM_DEVICE void store_row(int column, int channel, const float (&x)[4], float lse) const {
    const DeltaAttentionParams& p = call_.p.attention.attention;
    const int64_t batch = row_.batch, t = row_.start + column / call_.group;
    const int head = segment_.kv_head * call_.group + column % call_.group;
    T* target = p.out.at<T>(batch, t, head) + channel;
    if (channel + 4 <= call_.D) {
      store_vector(target, x);
    } else {
      for (int i = 0; channel + i < call_.D; ++i) target[i] = ptx::from_float<T>(x[i]);
    }
    if (channel == 0) *p.lse.at<float>(batch, head, t) = lse;
  }

  const Argument& call_;
  const Row& row_;
  const Segment& segment_;
  BlockState* block_;
  float *sums_, *stats_;  // [kWarps, columns, kRow], [kWarps, columns, 2]
};

}  // namespace deltamem::cuda::decode
