// The online softmax of a warp's rows over tiles of keys. Row (m, h) of a thread is row lane / 4 + 8 h of its
// m-th fragment, in elements 2 h, 2 h + 1; the four lanes of a quad share a row.
#pragma once

#include "cuda/delta_attention.cuh"

namespace deltamem::cuda {

inline constexpr int kFragments = 2;  // of 16 rows, of a warp of the forward kernel

// How products become exponents of 2.
struct Scores {
  float factor;     // 2^(factor score); never negative, the sign of the scale is in q
  float cap, bend;  // score = cap tanh(bend product), where cap > 0

  DELTAMEM_HD explicit Scores(const Softmax& softmax) : cap(softmax.softcap) {
    const float scale = softmax.scale < 0 ? -softmax.scale : softmax.scale;
    bend = cap > 0 ? scale / cap : 0.0f;
    factor = (cap > 0 ? 1.0f : scale) * kLog2E;
    if (factor == 0.0f) factor = 1e-30f;  // hidden scores are -inf, and stay so
  }
};

// tanh to a rounding unit of 1: enough for what is added to other scores.
DELTAMEM_DEVICE float tanh_of(float x) {
  return 1.0f - 2.0f * ptx::reciprocal(1.0f + ptx::exp2(x * (2.0f * kLog2E)));
}

template <int kM>
DELTAMEM_DEVICE void cap_scores(float (&s)[kM][8][4], float cap, float bend) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = cap * tanh_of(s[m][n][i] * bend);
    }
  }
}

// Scores of a row that it does not see become -inf. sees: bit i stands for key i of the tile.
DELTAMEM_DEVICE void hide(float (&s)[8][4], int h, uint64_t sees) {
  const uint64_t own = sees >> (ptx::lane() % 4 * 2);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t half = static_cast<uint32_t>(own >> (n / 4 * 32));
      if (!(half >> (n % 4 * 8 + i) & 1)) s[n][2 * h + i] = -INFINITY;
    }
  }
}

// Reductions over the row of a quad.
DELTAMEM_DEVICE float max_of_quad(float x) {
  x = fmaxf(x, ptx::shfl_xor(x, 1));
  return fmaxf(x, ptx::shfl_xor(x, 2));
}
DELTAMEM_DEVICE float sum_of_quad(float x) {
  x += ptx::shfl_xor(x, 1);
  return x + ptx::shfl_xor(x, 2);
}

// What the mainloop hands to the epilogue: of each row sum_j p_j v_j, sum_j p_j (this thread's part of it)
// and the largest score, where p_j = 2^(factor (score_j - peak)).
template <int D>
struct Attended {
  float out[kFragments][D / 8][4];
  float sum[kFragments][2], peak[kFragments][2];

  DELTAMEM_DEVICE Attended() {
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] = 0.0f;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[m][h] = 0.0f, peak[m][h] = -INFINITY;
    }
  }

  // Takes the scores of a tile: s becomes p, what was gathered shrinks to the new peak.
  DELTAMEM_DEVICE void meet(float (&s)[kFragments][8][4], float factor) {
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float highest = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < 8; ++n) highest = fmaxf(highest, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        highest = fmaxf(peak[m][h], max_of_quad(highest));
        const float base = highest == -INFINITY ? 0.0f : highest * factor;  // -inf: nothing seen yet
        const float shrink = ptx::exp2(peak[m][h] * factor - base);
        peak[m][h] = highest;
        float gained = 0.0f;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& p = s[m][n][2 * h + i];
            p = ptx::exp2(p * factor - base);
            gained += p;
          }
        }
        sum[m][h] = sum[m][h] * shrink + gained;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          out[m][n][2 * h] *= shrink;
          out[m][n][2 * h + 1] *= shrink;
        }
      }
    }
  }
};

}  // namespace deltamem::cuda
