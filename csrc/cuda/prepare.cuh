// The preparation of raw head rows on the device: delta_prep is it, attention and decode use it as their
// prologue.
//
//     x' = RoPE(RMSNorm(x + delta reads)),    RMSNorm(x) = x / sqrt(mean(x^2) + eps) * norm
//
// One warp prepares one row, the D channels of one head of one token; lane l holds channels [l kD/32, (l+1)
// kD/32). What all rows of a head share stays in registers:
//
//     HeadPreparation<128, 8> head(p.on_q, h * D, D, HR);
//     float y[4];
//     head.load(q.at<T>(b, t, h), y);
//     head.prepare(reads, p.norm_eps, &p.rotary, {b, t, position}, scratch, y);    // every lane of the warp
//
// The result of a row depends on nothing but its operands.
#pragma once

#include "cuda/load.cuh"

namespace deltamem::cuda {

// Where a token's row of a RoPE table lies: tables are [S, half] by position, or [B, T, half] by token.
struct TokenPlace {
  int64_t batch, token, position;

  DELTAMEM_DEVICE int64_t row_of(const Tensor& table) const {
    return table.ndim == 3 ? table.offset(batch, token) : table.offset(position);
  }
};

// The token's own slot, unless positions are given.
DELTAMEM_DEVICE int64_t position_of(const Rotary& rotary, int64_t batch, int64_t token, int64_t slot) {
  return rotary.positions ? *rotary.positions.at<int32_t>(batch, token) : slot;
}

// Reads a token's row of `reads` [B, T, H, R] into target [HR], by the lanes of a warp.
DELTAMEM_DEVICE void load_reads(const Tensor& reads, int64_t batch, int64_t token, float* target) {
  const int R = static_cast<int>(reads.size[3]), HR = static_cast<int>(reads.size[2]) * R;
  for (int j = ptx::lane(); j < HR; j += 32) target[j] = *(reads.at<float>(batch, token, j / R) + j % R);
}

// kD >= D channels from row `first` of the weight on. kHR > 0: the weight has kHR columns and is kept in
// registers; 0: it has any number of them, read again for every row, kAtOnce at a time.
template <int kD, int kHR, int kAtOnce = 1>
class HeadPreparation {
 public:
  static constexpr int kChannels = kD / 32;  // of a lane

  DELTAMEM_DEVICE HeadPreparation(const Correction& on, int64_t first, int D, int HR)
      : on_(on), first_(first), D_(D), HR_(HR) {
    if (on.norm) load_floats(on.norm, channel(0), norm_, left());
    if constexpr (kHR > 0) {
      if (on.delta) {
        dispatch_float(on.delta.dtype, [&](auto type) { load_columns<decltype(type)>(0, weight_); });
      }
    }
  }

  DELTAMEM_DEVICE static int channel(int i) { return ptx::lane() * kChannels + i; }
  DELTAMEM_DEVICE int D() const { return D_; }
  DELTAMEM_DEVICE float norm(int i) const { return norm_[i]; }

  // Column j of channel i's weight.
  DELTAMEM_DEVICE float weight(int i, int j) const {
    if constexpr (kHR > 0) {
      return weight_[i][j];
    } else {
      return channel(i) < D_ ? load_float(on_.delta, on_.delta.offset(first_ + channel(i)) + j) : 0.0f;
    }
  }

  // y = this lane's channels of x [D]; 0 past D.
  template <class T>
  DELTAMEM_DEVICE void load(const T* x, float (&y)[kChannels]) const {
    load_vector(x + channel(0), y, left());
  }
  template <class T>
  DELTAMEM_DEVICE void store(T* x, const float (&y)[kChannels]) const {
    store_vector(x + channel(0), y, left());
  }

  // y = x' from y = x. reads [HR] in any memory, unused without a delta weight; rotary null: no RoPE; scratch
  // [kD]: this warp's, in shared memory.
  DELTAMEM_DEVICE void prepare(const float* reads, float eps, const Rotary* rotary, const TokenPlace& place,
                               float* scratch, float (&y)[kChannels]) const {
    correct(reads, y);
    if (on_.norm) {
      const float scale = rms_scale(y, eps);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) y[i] *= scale * norm_[i];
    }
    if (rotary != nullptr && rotary->cos) rotate(*rotary, place, scratch, y);
  }

  DELTAMEM_DEVICE void correct(const float* reads, float (&y)[kChannels]) const {
    if (!on_.delta) return;
    if constexpr (kHR > 0) {
      add_product(weight_, reads, y);
    } else {
      int j = 0;
#pragma unroll 1
      for (; kAtOnce > 1 && j + kAtOnce <= HR_; j += kAtOnce) {
        dispatch_float(on_.delta.dtype,
                       [&](auto type) { add_columns<decltype(type), kAtOnce>(j, reads, y); });
      }
      dispatch_float(on_.delta.dtype, [&](auto type) {
        for (; j < HR_; ++j) add_columns<decltype(type), 1>(j, reads, y);
      });
    }
  }

  DELTAMEM_DEVICE float rms_scale(const float (&y)[kChannels], float eps) const {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) squares += y[i] * y[i];
    return 1.0f / sqrtf(sum_of_warp(squares) / static_cast<float>(D_) + eps);
  }

  // (a, b) -> (a cos - b sin, b cos + a sin) for the pairs of the first 2 * half channels; direction -1 turns
  // back, the transpose that a gradient takes.
  DELTAMEM_DEVICE static void rotate(const Rotary& rotary, const TokenPlace& place, float* scratch,
                                     float (&y)[kChannels], float direction = 1.0f) {
    const int half = static_cast<int>(rotary.cos.size[rotary.cos.ndim - 1]);
    const int64_t cos_row = place.row_of(rotary.cos), sin_row = place.row_of(rotary.sin);
    exchange(scratch, y);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int d = channel(i);
      if (d >= 2 * half) continue;
      const RotaryPair pair(rotary, d, half);
      const float c = load_float(rotary.cos, cos_row + pair.index);
      const float s = load_float(rotary.sin, sin_row + pair.index) * (pair.is_first ? -direction : direction);
      y[i] = y[i] * c + scratch[pair.partner] * s;
    }
  }

  // Channel d's pair in the table, and its other channel.
  struct RotaryPair {
    bool is_first;
    int index, partner;

    DELTAMEM_DEVICE RotaryPair(const Rotary& rotary, int d, int half)
        : is_first(rotary.interleaved ? d % 2 == 0 : d < half),
          index(rotary.interleaved ? d / 2
                : is_first         ? d
                                   : d - half),
          partner(rotary.interleaved ? d ^ 1
                  : is_first         ? d + half
                                     : d - half) {}
  };

  // Shows all of a row's channels to every lane.
  DELTAMEM_DEVICE static void exchange(float* scratch, const float (&y)[kChannels]) {
    ptx::sync_warp();  // earlier readers are done
#pragma unroll
    for (int i = 0; i < kChannels; ++i) scratch[channel(i)] = y[i];
    ptx::sync_warp();
  }

 private:
  // Channels from the lane's first one on.
  DELTAMEM_DEVICE int left() const { return D_ - channel(0); }

  // Columns [j, j + kCount) of the lane's rows of the weight, of type W; 0 past D.
  template <class W, int kCount>
  DELTAMEM_DEVICE void load_columns(int j, float (&weight)[kChannels][kCount]) const {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      load_vector(on_.delta.at<W>(first_ + channel(i)) + j, weight[i], i < left() ? kCount : 0);
    }
  }
  template <int kCount>
  DELTAMEM_DEVICE static void add_product(const float (&weight)[kChannels][kCount], const float* reads,
                                          float (&y)[kChannels]) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      float sum = weight[i][0] * reads[0];
#pragma unroll
      for (int j = 1; j < kCount; ++j) sum += weight[i][j] * reads[j];
      y[i] += sum;
    }
  }
  template <class W, int kCount>
  DELTAMEM_DEVICE void add_columns(int j, const float* reads, float (&y)[kChannels]) const {
    float weight[kChannels][kCount];
    load_columns<W>(j, weight);
    add_product(weight, reads + j, y);
  }

  const Correction& on_;
  int64_t first_;
  int D_, HR_;
  float norm_[kChannels] = {};
  float weight_[kChannels][kHR > 0 ? kHR : 1] = {};
};

}  // namespace deltamem::cuda
