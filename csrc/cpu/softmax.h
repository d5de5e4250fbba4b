// Softmax over scores held [keys, kLanes]: every lane is a query, so maxima and sums run down the rows.
// V: vectors of the lanes that are in use.
#pragma once

#include "cpu/matmul.h"
#include "mask.h"

namespace deltamem::DELTAMEM_ISA {

// e^x for x <= 88 to about 1 ulp, in half the instructions of exp(): 2^n times a degree-6 polynomial of 2^r,
// r in
// [-1/2, 1/2], that is exactly 1 at 0. e^-inf = 0; NaN stays.
inline F32 fast_exp(F32 x) {
  const float kLog2e = 1.44269504088896341f;
  x = vmax(broadcast(-104.0f), x);  // in this order NaN stays
#if defined(__AVX512F__)
  F32 n = reinterpret_cast<F32>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x * kLog2e),
                                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  F32 magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  F32 n = (x * kLog2e + magic) - magic;
#endif
  F32 r = x * kLog2e - n;
  F32 p = broadcast(1.535336196e-04f);
  p = p * r + 1.339887385e-03f;
  p = p * r + 9.618436918e-03f;
  p = p * r + 5.550332367e-02f;
  p = p * r + 2.402264774e-01f;
  p = p * r + 6.931471825e-01f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  I32 exponent = (__builtin_convertvector(n, I32) + 127) << 23;
  return select(x < -87.0f, zero(), p * reinterpret_cast<F32&>(exponent));
#endif
}

// ---- scores
// --------------------------------------------------------------------------------------------------

// The slots that each lane's query sees, and what they have in common.
struct LaneMask {
  int32_t begin[kLanes], end[kLanes];
  KeyRange any;  // slots that some lane sees
  KeyRange all;  // slots that every lane sees that sees one at all

  void clear() {
    for (int i = 0; i < kLanes; ++i) begin[i] = end[i] = 0;
    any = {INT32_MAX, 0};
    all = {0, INT32_MAX};
  }
  void set(int lane, KeyRange seen) {
    if (seen.empty()) return;
    begin[lane] = static_cast<int32_t>(seen.begin);
    end[lane] = static_cast<int32_t>(seen.end);
    any = any.joined(seen);
    all = {max(all.begin, seen.begin), min(all.end, seen.end)};
  }
  // Whole panels of the block of slots from start on that hold all that some lane sees.
  KeyRange rows_of_block(int64_t start, int64_t size) const {
    return {max(any.begin - start, int64_t(0)) / kPanel * kPanel,
            round_up(min(any.end - start, size), kPanel)};
  }
};

inline I32 lane_numbers() {
  I32 x;
  for (int i = 0; i < kWidth; ++i) x[i] = i;
  return x;
}

// Scores of slots that a lane does not see become -inf. hidden [keys]: nobody sees the key; optional.
template <int V>
inline void hide(float* scores, int64_t first_slot, int64_t keys, const LaneMask& mask, const bool* hidden) {
  const F32 minus_inf = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < keys; ++j) {
    int32_t slot = static_cast<int32_t>(hidden != nullptr && hidden[j] ? -1 : first_slot + j);
    for (int v = 0; v < V; ++v) {
      const I32 begin = *reinterpret_cast<const I32*>(mask.begin + v * kWidth);
      const I32 end = *reinterpret_cast<const I32*>(mask.end + v * kWidth);
      float* at = scores + j * kLanes + v * kWidth;
      store(at, select((begin <= slot) & (end > slot), load(at), minus_inf));
    }
  }
}

// The same where a row of scores is a query, which sees the slots seen[j], and lanes are keys from first_slot
// on.
template <int V>
inline void hide_rows(float* scores, int64_t first_slot, int64_t rows, const KeyRange* seen) {
  const F32 minus_inf = broadcast(-__builtin_inff());
  const KeyRange lanes = {first_slot, first_slot + kLanes};
  for (int64_t j = 0; j < rows; ++j) {
    if (seen[j].covers(lanes)) continue;
    const I32 begin = I32{} + static_cast<int32_t>(seen[j].begin),
              end = I32{} + static_cast<int32_t>(seen[j].end);
    for (int v = 0; v < V; ++v) {
      const I32 slot = lane_numbers() + static_cast<int32_t>(first_slot + v * kWidth);
      float* at = scores + j * kLanes + v * kWidth;
      store(at, select((begin <= slot) & (end > slot), load(at), minus_inf));
    }
  }
}

// softcap tanh(x) of scores already divided by softcap.
template <int V>
inline void cap(float* scores, int64_t keys, float softcap) {
  for (int64_t j = 0; j < keys; ++j, scores += kLanes) {
    for (int v = 0; v < V; ++v) store(scores + v * kWidth, tanh(load(scores + v * kWidth)) * softcap);
  }
}

// ---- weights
// -------------------------------------------------------------------------------------------------

// Weights of consecutive keys j .. j + kTerms as words of the product with V, [keys / kTerms, kLanes].
inline void store_weights(float* words, F32 (&p)[1]) { store(words, p[0]); }
#if defined(__AVX512BF16__)
inline void store_weights(Pair* words, F32 (&p)[2]) {
  __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(p[0])));
  __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(p[1])));
  store_words(words, reinterpret_cast<F32>(_mm512_or_si512(first, _mm512_slli_epi32(second, 16))));
}
#endif

// Statistics of a tile of lanes over the keys met so far, [kLanes] each: weights are exp(score - maximum).
struct LaneStats {
  float *maximum, *sum;
  void clear() {
    for (int i = 0; i < kLanes; ++i) maximum[i] = -__builtin_inff(), sum[i] = 0;
  }
};

// Scores [keys, kLanes] to weights in the same place, words along the keys; advances the statistics.
// lane_scale: what products summed so far are to be multiplied with.
template <int V, class Word>
inline void online_softmax(float* scores, int64_t keys, const LaneStats& stats, float* lane_scale) {
  constexpr int terms = kTerms<Word>;
  F32 top[V], sum[V] = {};
  for (int v = 0; v < V; ++v) top[v] = load(stats.maximum + v * kWidth);
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) top[v] = vmax(top[v], load(scores + j * kLanes + v * kWidth));
  }
  for (int v = 0; v < V; ++v) {
    F32 before = load(stats.maximum + v * kWidth);
    store(stats.maximum + v * kWidth, top[v]);
    top[v] =
        select(top[v] == -__builtin_inff(), zero(), top[v]);  // nothing seen yet: -inf - 0, not -inf + inf
    store(lane_scale + v * kWidth, fast_exp(before - top[v]));
  }
  Word* words = reinterpret_cast<Word*>(scores);  // word row j / terms lies at or before score row j
  for (int64_t j = 0; j < keys; j += terms) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      F32 p[terms];
#pragma GCC unroll 2
      for (int t = 0; t < terms; ++t) {
        p[t] = fast_exp(load(scores + (j + t) * kLanes + v * kWidth) - top[v]);
        sum[v] = sum[v] + p[t];
      }
      store_weights(words + j / terms * kLanes + v * kWidth, p);
    }
  }
  for (int v = 0; v < V; ++v) {
    float* total = stats.sum + v * kWidth;
    store(total, load(total) * load(lane_scale + v * kWidth) + sum[v]);
  }
}

// ---- backward
// ------------------------------------------------------------------------------------------------

// One statistic of a lane, or of a whole row of scores.
struct PerLane {
  const float* values;
  F32 at(int64_t, int v) const { return load(values + v * kWidth); }
};
struct PerRow {
  const float* values;
  F32 at(int64_t row, int) const { return broadcast(values[row]); }
};

// P = exp(score - lse) and dS = P (dP - delta), times the softcap's derivative, in the places of scores and
// dP, as words along the rows. inverse_cap: 1 / softcap, 0 without a softcap.
template <int V, class Word, class Statistic>
inline void softmax_bwd(float* scores, float* dp, int64_t rows, Statistic lse, Statistic delta,
                        float inverse_cap) {
  constexpr int terms = kTerms<Word>;
  for (int64_t j = 0; j < rows; j += terms) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      F32 p[terms], ds[terms];
#pragma GCC unroll 2
      for (int t = 0; t < terms; ++t) {
        const int64_t at = (j + t) * kLanes + v * kWidth;
        const F32 score = load(scores + at);
        p[t] = fast_exp(score - lse.at(j + t, v));
        ds[t] = p[t] * (load(dp + at) - delta.at(j + t, v));
        if (inverse_cap > 0) {
          const F32 tanh = vmax(score * inverse_cap, broadcast(-1.0f));  // a hidden score is -inf
          ds[t] = ds[t] * (1.0f - tanh * tanh);
        }
      }
      store_weights(reinterpret_cast<Word*>(scores) + j / terms * kLanes + v * kWidth, p);
      store_weights(reinterpret_cast<Word*>(dp) + j / terms * kLanes + v * kWidth, ds);
    }
  }
}

}  // namespace deltamem::DELTAMEM_ISA
