// The preparation of raw head rows on the device: delta_prep is it, attention and decode use it as their
// prologue.
//
//     x' = RoPE(RMSNorm(x + delta reads)),    RMSNorm(x) = x / sqrt(mean(x^2) + eps) * norm
//
// One warp prepares one row, the D channels of one head of one token; lane l holds channels [l kD/32, (l+1)
// kD/32). What all rows of a head share stays in registers:
//
//     HeadPreparation<128> head(p.on_q, p.norm_eps, p.rotary, h, D, HR);
//     float y[4];
//     head.prepare(q.at<T>(b, t, h), reads, b, t, position, scratch, y);    // every lane of the warp
//
// The result of a row depends on nothing but its operands.
#pragma once

#include "cuda/load.cuh"

namespace deltamem::cuda {

// Row of a RoPE table for a token: tables are [S, half] by position, or [B, T, half] by token.
DELTAMEM_DEVICE int64_t rotary_row(const Tensor& table, int64_t batch, int64_t token, int64_t position) {
  return table.ndim == 3 ? table.offset(batch, token) : table.offset(position);
}

// kD >= D channels. kHR > 0: the head's delta weight has kHR columns and is kept in registers; 0: any number,
// read again for every row.
template <int kD, int kHR>
class HeadPreparation {
 public:
  static constexpr int kChannels = kD / 32;  // of a lane

  DELTAMEM_DEVICE HeadPreparation(const Correction& on, float eps, const Rotary& rotary, int64_t head, int D,
                                  int HR)
      : on_(on), rotary_(rotary), head_(head), eps_(eps), D_(D), HR_(HR) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      norm_[i] = on.norm && first() + i < D ? load_float(on.norm, first() + i) : 0.0f;
      if constexpr (kHR > 0) {
        if (first() + i < D) {
          load_floats(on.delta, on.delta.offset(head * D + first() + i), weight_[i]);
        }
      }
    }
  }

  // The first channel of this lane.
  DELTAMEM_DEVICE static int first() { return ptx::lane() * kChannels; }

  // y [kChannels] = x' of this lane. x [D] and reads [HR] (unused without a delta weight) in any memory;
  // scratch [kD] is this warp's, in shared memory.
  template <class T>
  DELTAMEM_DEVICE void prepare(const T* x, const float* reads, int64_t batch, int64_t token, int64_t position,
                               float* scratch, float (&y)[kChannels]) const {
    correct(x, reads, y);
    if (on_.norm) {
      const float scale = rms_scale(y);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) y[i] *= scale * norm_[i];
    }
    if (rotary_.cos) rotate(batch, token, position, scratch, y);
  }

  // y = x + delta reads; channels past D are 0.
  template <class T>
  DELTAMEM_DEVICE void correct(const T* x, const float* reads, float (&y)[kChannels]) const {
    if (D_ == kD) {
      load_vector(x + first(), y);
    } else {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) y[i] = first() + i < D_ ? ptx::to_float(x[first() + i]) : 0.0f;
    }
    if (!on_.delta) return;
    if constexpr (kHR > 0) {
      float read[kHR];
      load_vector(reads, read);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kHR; ++j) sum += weight_[i][j] * read[j];
        y[i] = first() + i < D_ ? y[i] + sum : 0.0f;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        if (first() + i >= D_) continue;
        const int64_t row = on_.delta.offset(head_ * D_ + first() + i);
        float sum = 0.0f;
        for (int j = 0; j < HR_; ++j) sum += load_float(on_.delta, row + j) * reads[j];
        y[i] += sum;
      }
    }
  }

  DELTAMEM_DEVICE float rms_scale(const float (&y)[kChannels]) const {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) squares += y[i] * y[i];
    return 1.0f / sqrtf(sum_of_warp(squares) / static_cast<float>(D_) + eps_);
  }

  // (a, b) -> (a cos - b sin, b cos + a sin) for the pairs of the first rotary_dim channels; direction -1
  // turns back, the transpose that a gradient takes.
  DELTAMEM_DEVICE void rotate(int64_t batch, int64_t token, int64_t position, float* scratch,
                              float (&y)[kChannels], float direction = 1.0f) const {
    const int half = static_cast<int>(rotary_.cos.size[rotary_.cos.ndim - 1]);
    const int64_t cos_row = rotary_row(rotary_.cos, batch, token, position);
    const int64_t sin_row = rotary_row(rotary_.sin, batch, token, position);
    ptx::sync_warp();  // the last row's reads of scratch
#pragma unroll
    for (int i = 0; i < kChannels; ++i) scratch[first() + i] = y[i];
    ptx::sync_warp();
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int d = first() + i;
      if (d >= 2 * half) continue;
      const bool is_a = rotary_.interleaved ? d % 2 == 0 : d < half;
      const int pair = rotary_.interleaved ? d / 2 : is_a ? d : d - half;
      const float partner = scratch[rotary_.interleaved ? d ^ 1 : is_a ? d + half : d - half];
      const float c = load_float(rotary_.cos, cos_row + pair),
                  s = load_float(rotary_.sin, sin_row + pair) * direction;
      y[i] = is_a ? y[i] * c - partner * s : y[i] * c + partner * s;
    }
  }

 private:
  Correction on_;
  Rotary rotary_;
  int64_t head_;
  float eps_;
  int D_, HR_;
  float norm_[kChannels];
  float weight_[kChannels][kHR > 0 ? kHR : 1];
};

}  // namespace deltamem::cuda
