// The reverse of correction.h, in blocks of kBlock tokens, so that a weight is loaded once for all of them;
// and the sums over tokens that make weight gradients, whose order depends on shapes alone.
#pragma once

#include "cpu/correction.h"

namespace deltamem::DELTAMEM_ISA {

inline constexpr int kBlock = 4;

// In place: dy, the gradient of a prepared row, becomes that of x + delta reads.
//
//     dy~ = RoPE^T dy,   n = c scale,   dc = scale (dy~ w - n mean(dy~ w n)),   dw += dy~ n,   c = x + delta
//     reads
//
// dy, corrected (scratch) [padded D], zero beyond D. dnorm [padded D]; dcos, dsin [rotary_half] or null:
// added to.
inline void prepare_row_bwd(const float* x, const HeadCorrection& head, const TokenInputs& token, float* dy,
                            float* corrected, float* dnorm, float* dcos, float* dsin) {
  float scale = 1.0f;
  if (head.norm != nullptr || dcos != nullptr) {
    const float squares = correct_row(x, head, token.reads, corrected);
    if (head.norm != nullptr) scale = rms_scale(squares, head.D, head.eps);
  }
  if (dcos != nullptr) {
    for (int64_t i = 0; i < token.rotary_half; ++i) {
      const int64_t at_a = token.interleaved ? 2 * i : i,
                    at_b = token.interleaved ? at_a + 1 : i + token.rotary_half;
      const float a = corrected[at_a] * scale * (head.norm != nullptr ? head.norm[at_a] : 1.0f);
      const float b = corrected[at_b] * scale * (head.norm != nullptr ? head.norm[at_b] : 1.0f);
      dcos[i] += dy[at_a] * a + dy[at_b] * b;
      dsin[i] += dy[at_b] * a - dy[at_a] * b;
    }
  }
  if (token.cos != nullptr) rotate_row(dy, token, -1.0f);
  if (head.norm == nullptr) return;
  F32 along = zero();
  for (int64_t d = 0; d < head.D; d += kWidth) {
    const F32 g = load(dy + d), n = load(corrected + d) * scale;
    store(dnorm + d, load(dnorm + d) + g * n);
    store(corrected + d, n);
    along = along + g * load(head.norm + d) * n;
  }
  const float mean = reduce_add(along) / static_cast<float>(head.D);
  for (int64_t d = 0; d < head.D; d += kWidth) {
    store(dy + d, (load(dy + d) * load(head.norm + d) - load(corrected + d) * mean) * scale);
  }
}

// kCount components of dreads from j on: dreads[i][j] += delta[j] . dc[i].  dc [kBlock, padded D]
template <int kCount>
inline void reads_gradient(const HeadCorrection& head, const float* dc, int64_t j, float* dreads) {
  const int64_t padded = head.padded();
  const float* weight = head.delta + j * padded;
  F32 sum[kBlock][kCount] = {};
  for (int64_t d = 0; d < padded; d += kWidth) {
    F32 w[kCount];
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) w[n] = load(weight + n * padded + d);
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) {
      const F32 g = load(dc + i * padded + d);
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) sum[i][n] = sum[i][n] + g * w[n];
    }
  }
  for (int i = 0; i < kBlock; ++i) {
    for (int n = 0; n < kCount; ++n) dreads[i * head.HR + j + n] += reduce_add(sum[i][n]);
  }
}

// The gradients through delta reads of a block of tokens, given dc [kBlock, padded D] of the corrected rows:
//     dreads[i] += delta^T dc[i],   ddelta += sum_i dc[i] reads[i]^T       dreads [kBlock, HR], ddelta [HR,
//     padded D]
inline void correction_gradients(const HeadCorrection& head, const float* dc, const float* const* reads,
                                 float* dreads, float* ddelta) {
  const int64_t padded = head.padded();
  int64_t j = 0;
  for (; j + 4 <= head.HR; j += 4) reads_gradient<4>(head, dc, j, dreads);
  for (; j < head.HR; ++j) reads_gradient<1>(head, dc, j, dreads);
  for (j = 0; j < head.HR; ++j) {
    F32 read[kBlock];
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) read[i] = broadcast(reads[i][j]);
    for (int64_t d = 0; d < padded; d += kWidth) {
      F32 sum = zero();  // of the block first: short chains of additions lose the least
#pragma GCC unroll 4
      for (int i = 0; i < kBlock; ++i) sum = sum + read[i] * load(dc + i * padded + d);
      store(ddelta + j * padded + d, load(ddelta + j * padded + d) + sum);
    }
  }
}

// Sums over tokens: blocks of tokens are dealt to parts, a part sums its own in order, and the parts are
// added in order. Their number depends on the shapes alone, so the result does not depend on threads.
class TokenSums {
 public:
  TokenSums(int64_t blocks, int64_t floats)
      : blocks_(blocks),
        floats_(round_up(floats, kWidth)),
        parts_(min(ceil_div(blocks, kMinBlocks),
                   min(kMaxParts, max(kMaxFloats / max<int64_t>(floats, 1), kMinParts)))),
        sums_(parts_ * floats_) {}

  int64_t parts() const { return parts_; }
  int64_t first_block(int64_t part) const { return part * blocks_ / parts_; }
  float* part(int64_t part) { return sums_ + part * floats_; }
  // floats [first, first + n) of a part += block, a block's own sum; n in whole vectors
  void add(int64_t part, int64_t first, const float* block, int64_t n) {
    float* sum = this->part(part) + first;
    for (int64_t i = 0; i < n; i += kWidth) store(sum + i, load(sum + i) + load(block + i));
  }
  void clear(int64_t part) { std::memset(this->part(part), 0, floats_ * sizeof(float)); }

  // target [n] = floats [first, first + n) summed over the parts, rounded once.
  void total(int64_t first, int64_t n, float* target) const {
    for (int64_t i = 0; i < n; i += kWidth) {
      const int64_t count = min<int64_t>(n - i, kWidth);
      double sum[kWidth] = {};
      for (int64_t part = 0; part < parts_; ++part) {
        const float* source = sums_.data + part * floats_ + first + i;
        for (int64_t j = 0; j < count; ++j) sum[j] += source[j];
      }
      for (int64_t j = 0; j < count; ++j) target[i + j] = static_cast<float>(sum[j]);
    }
  }

 private:
  static constexpr int64_t kMinBlocks = 8, kMinParts = 4, kMaxParts = 256, kMaxFloats = 1 << 22;

  int64_t blocks_, floats_, parts_;
  Buffer<float> sums_;
};

// Rows [first, first + D) of target [., HR] from sums of [HR, padded D] that start at float `at`.
inline void store_weight_gradient(const TokenSums& sums, int64_t at, const Tensor& target, int64_t first,
                                  int64_t D) {
  const int64_t HR = target.size[1], padded = round_up(D, kWidth);
  Buffer<float> total(HR * padded), row(HR);
  sums.total(at, HR * padded, total);
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t j = 0; j < HR; ++j) row[j] = total[j * padded + d];
    store_row(target, first + d, 0, 0, row, HR);
  }
}

inline void store_norm_gradient(const TokenSums& sums, int64_t at, const Tensor& target) {
  Buffer<float> total(target.size[0]);
  sums.total(at, target.size[0], total);
  store_row(target, 0, 0, 0, total, target.size[0]);
}

}  // namespace deltamem::DELTAMEM_ISA
