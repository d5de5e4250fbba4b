// Matrix products of attention: C [rows, lanes] from A [rows, k] in panels and B [k, lanes], accumulated in
// fp32.
//
// The unit along k is a 32-bit word: one fp32 number, or where the processor multiplies bf16 pairs, two bf16
// numbers. A word of A is broadcast and meets a vector of B's words; lanes are queries (or keys), so that
// softmax statistics are vectors too and need no reduction across lanes.
#pragma once

#include "cpu/row_vectors.h"

namespace deltamem::DELTAMEM_ISA {

// The sums of a panel stay in registers: 8 x 3 vectors of AVX-512's 32, 4 x 3 of AVX2's 16.
#if defined(__AVX512F__)
inline constexpr int kPanel = 8;
#else
inline constexpr int kPanel = 4;
#endif
inline constexpr int kLaneVectors = 3;
inline constexpr int kLanes = kLaneVectors * kWidth;

struct Pair {
  bf16 first, second;
};

template <class Word>
inline constexpr int kTerms = 1;  // numbers in a word
template <>
inline constexpr int kTerms<Pair> = 2;

// What numbers of dtype T are multiplied as.
template <class T>
struct WordOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct WordOf<bf16> {
  using type = Pair;
};
#endif

inline void store_words(void* p, F32 x) { *static_cast<F32*>(p) = x; }
inline F32 broadcast_word(const float* p) { return broadcast(*p); }
inline F32 multiply_add(float, F32 a, F32 b, F32 sum) { return a * b + sum; }

inline F32 load_words(const void* p) { return *static_cast<const F32*>(p); }
#if defined(__AVX512BF16__)
inline F32 broadcast_word(const Pair* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return reinterpret_cast<F32>(_mm512_set1_epi32(bits));
}
inline F32 multiply_add(Pair, F32 a, F32 b, F32 sum) {
  return reinterpret_cast<F32>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                reinterpret_cast<__m512bh>(b)));
}
#endif

// Calls f with the number of vectors, as Int, that hold a tile's first `lanes` lanes: short rows fill few.
template <class F>
inline void dispatch_vectors(int64_t lanes, F&& f) {
  static_assert(kLaneVectors == 3);
  if (lanes <= kWidth) return f(Int<1>{});
  if (lanes <= 2 * kWidth) return f(Int<2>{});
  f(Int<3>{});
}

template <int V>
using Sums = F32[kPanel][V];

// sum[r] += sum_k a[k, r] b[k]                                              a [steps, kPanel], b [steps,
// kLanes]
template <int V, class Word>
inline __attribute__((always_inline)) void multiply_panel(const Word* a, const Word* b, int64_t steps,
                                                          Sums<V>& sum) {
  for (int64_t k = 0; k < steps; ++k, a += kPanel, b += kLanes) {
    F32 lanes[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) lanes[v] = load_words(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kPanel; ++r) {
      F32 word = broadcast_word(a + r);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(Word{}, word, lanes[v], sum[r][v]);
    }
  }
}

// Words of a dot that one running sum takes; a longer dot is a sum of such sums, as libraries do it.
inline constexpr int64_t kDotWords = 128;

// c = scale a b                                       a [panels, steps, kPanel], c [panels * kPanel, kLanes]
// The first V vectors of the lanes, as everywhere below.
template <int V, class Word>
inline void multiply(const Word* a, const Word* b, int64_t panels, int64_t steps, float scale, float* c) {
  for (int64_t p = 0; p < panels; ++p, a += steps * kPanel) {
    Sums<V> sum = {};
    multiply_panel<V>(a, b, min(steps, kDotWords), sum);
    for (int64_t k = kDotWords; k < steps; k += kDotWords) {
      Sums<V> more = {};
      multiply_panel<V>(a + k * kPanel, b + k * kLanes, min(steps - k, kDotWords), more);
      for (int r = 0; r < kPanel; ++r) {
        for (int v = 0; v < V; ++v) sum[r][v] = sum[r][v] + more[r][v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kPanel; ++r, c += kLanes) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(c + v * kWidth, sum[r][v] * scale);
    }
  }
}

// c = c * lane_scale + a b                        panels of a are a_stride words apart; c [panels * kPanel,
// kLanes] The block's product is summed apart: one running fp32 sum over thousands of rows would lose digits.
template <int V, class Word>
inline void multiply_into(const Word* a, int64_t a_stride, const Word* b, int64_t panels, int64_t steps,
                          const float* lane_scale, float* c) {
  F32 scale[V];
  for (int v = 0; v < V; ++v) scale[v] = load(lane_scale + v * kWidth);
  for (int64_t p = 0; p < panels; ++p, a += a_stride) {
    Sums<V> sum = {};
    multiply_panel<V>(a, b, steps, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kPanel; ++r, c += kLanes) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(c + v * kWidth, load(c + v * kWidth) * scale[v] + sum[r][v]);
    }
  }
}

}  // namespace deltamem::DELTAMEM_ISA
