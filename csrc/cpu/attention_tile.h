// Attention of a tile of query columns over a block of keys, with a running softmax. A column is one query
// head of one token; all columns of a tile share a kv head.
//
//     s = q . k scale,   softcap tanh(s / softcap);   m' = max(m, s);   acc' = e^(m - m') acc + sum_j e^(s_j
//     - m') v_j
//
// Keys are reached through pointers, so that dense and paged caches are the same here.
#pragma once

#include "cpu/row_vectors.h"
#include "cpu/softmax.h"
#include "params.h"

namespace deltamem::DELTAMEM_ISA {

// Keys of a block: long enough to pay for the softmax's reductions, while the block's K and V of the heads
// that are taken together stay in the second-level cache with those of the next block.
inline constexpr int kKeys = 64;
// Accumulators of a score tile, kColumns x kTileKeys, are as many as a vector has lanes: one transposing
// reduction turns them into one vector of scores.
inline constexpr int kTileKeys = 4;
inline constexpr int kColumns = kWidth / kTileKeys;

template <class T>
struct KeyBlock {
  int count = 0;  // keys; pointers are repeated up to a multiple of kTileKeys
  int64_t first_slot = 0;
  const T* k[kKeys];  // of the first kv head
  const T* v[kKeys];
};

// Fetches keys that come later to the second-level cache, a few lines at a time: in bursts, or left to the
// hardware, which sees a stride where the heads of a key lie side by side, the same bytes take twice as long
// (Zen 4).
template <class T>
class Prefetch {
 public:
  Prefetch() = default;
  // The same `elements` of each of `count` rows, from `offset` on.
  Prefetch(const T* const* rows, int count, int64_t offset, int64_t elements)
      : row_(rows), end_(rows + count), offset_(offset), size_(elements * sizeof(T)) {}

  void finish() {
    while (row_ != end_) advance(size_);
  }

  void advance(int64_t bytes) {
    while (bytes > 0 && row_ != end_) {
      const char* line = reinterpret_cast<const char*>(*row_ + offset_) + at_;
      const int64_t count = min(bytes, size_ - at_);
      for (const char* end = line + count; line < end; line += 64) __builtin_prefetch(line, 0, 2);
      bytes -= count;
      at_ += count;
      if (at_ == size_) ++row_, at_ = 0;
    }
  }

 private:
  const T* const* row_ = nullptr;
  const T* const* end_ = nullptr;
  int64_t offset_ = 0, size_ = 0, at_ = 0;
};

// How products are taken. Vectors stand for kStep channels of a key or query, or for kTurn keys' values.
template <class T>
struct Products {
  using Query = float;
  using Weight = float;
  static constexpr int kStep = kWidth;
  static constexpr int kTurn = 1;

  static F32 query(const float* q) { return load(q); }
  static F32 key(const T* k) { return load(k); }
  static F32 key_n(const T* k, int n) { return load_n(k, n); }
  static F32 multiply_add(F32 sum, F32 a, F32 b) { return a * b + sum; }

  static F32 weight(const float* p) { return broadcast(*p); }
  template <int kVectors>
  static void values(const T* const* v, int64_t offset, F32 (&x)[kVectors]) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) x[i] = load(v[0] + offset + i * kWidth);
  }
  static void values_n(const T* const* v, int64_t offset, int n, F32 (&x)[1]) {
    x[0] = load_n(v[0] + offset, n);
  }

  static void natural_order(float*, int64_t) {}
};

#if defined(__AVX512BF16__)
// Pairs of channels (q . k) and pairs of keys (p . v) in one instruction. Two keys' values are interleaved
// within 128-bit lanes: accumulators hold 32 channels as 0-3 8-11 16-19 24-27, 4-7 12-15 20-23 28-31.
template <>
struct Products<bf16> {
  using Query = bf16;
  using Weight = bf16;
  static constexpr int kStep = 32;
  static constexpr int kTurn = 2;

  static F32 vector(__m512i x) { return reinterpret_cast<F32>(x); }
  static F32 query(const bf16* q) { return vector(_mm512_loadu_si512(q)); }
  static F32 key(const bf16* k) { return vector(_mm512_loadu_si512(k)); }
  static F32 key_n(const bf16* k, int n) { return vector(_mm512_maskz_loadu_epi16(_bzhi_u32(~0u, n), k)); }
  static F32 multiply_add(F32 sum, F32 a, F32 b) {
    return reinterpret_cast<F32>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }

  static F32 weight(const bf16* p) {
    int pair;
    std::memcpy(&pair, p, 4);
    return vector(_mm512_set1_epi32(pair));
  }
  static void interleave(F32 a, F32 b, F32& low, F32& high) {
    __m512i x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
    low = vector(_mm512_unpacklo_epi16(x, y));
    high = vector(_mm512_unpackhi_epi16(x, y));
  }
  template <int kVectors>
  static void values(const bf16* const* v, int64_t offset, F32 (&x)[kVectors]) {
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i += 2) {
      interleave(key(v[0] + offset + i * kWidth), key(v[1] + offset + i * kWidth), x[i], x[i + 1]);
    }
  }
  static void values_n(const bf16* const* v, int64_t offset, int n, F32 (&x)[2]) {
    interleave(key_n(v[0] + offset, n), key_n(v[1] + offset, n), x[0], x[1]);
  }

  static void natural_order(float* row, int64_t padded) {
    for (int64_t d = 0; d < padded; d += 32) {
      const __m512i low = _mm512_loadu_si512(row + d), high = _mm512_loadu_si512(row + d + 16);
      const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                    last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
      _mm512_storeu_si512(row + d, _mm512_permutex2var_epi64(low, first, high));
      _mm512_storeu_si512(row + d + 16, _mm512_permutex2var_epi64(low, last, high));
    }
  }
};
#endif

// scores [kColumns, kKeys] of kTileKeys keys from key j on.
template <class T>
inline void score_keys(const typename Products<T>::Query* q, int64_t q_stride, const KeyBlock<T>& block,
                       int j, int64_t offset, int64_t D, float* scores) {
  using P = Products<T>;
  F32 sum[kWidth] = {};
  const T* k[kTileKeys];
#pragma GCC unroll 4
  for (int i = 0; i < kTileKeys; ++i) k[i] = block.k[j + i] + offset;
  auto step = [&](int64_t d, auto&& load_key) __attribute__((always_inline)) {
    F32 key[kTileKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kTileKeys; ++i) key[i] = load_key(k[i] + d);
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const F32 query = P::query(q + c * q_stride + d);
#pragma GCC unroll 4
      for (int i = 0; i < kTileKeys; ++i) {
        sum[c * kTileKeys + i] = P::multiply_add(sum[c * kTileKeys + i], query, key[i]);
      }
    }
  };
  int64_t d = 0;
  for (; d + P::kStep <= D; d += P::kStep) step(d, [](const T* p) { return P::key(p); });
  if (d < D) step(d, [&](const T* p) { return P::key_n(p, static_cast<int>(D - d)); });
  const F32 sums = lane_sums<kWidth>(sum);
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    for (int i = 0; i < kTileKeys; ++i) scores[c * kKeys + j + i] = sums[c * kTileKeys + i];
  }
}

// One column's running maximum and sum of e^(s - maximum).
struct RunningSoftmax {
  float maximum, sum;
};

// Keys [from, to) of the block are visible. Turns scores [kKeys] into weights; returns what acc is scaled by.
template <class Weight>
inline float weigh(float* scores, int from, int to, const Softmax& softmax, RunningSoftmax& state,
                   Weight* weights) {
  const float kInfinity = __builtin_inff();
  const int end = static_cast<int>(round_up(to, kWidth));
  F32 maxima = broadcast(state.maximum);
  for (int j = 0; j < end; j += kWidth) {
    F32 s = load(scores + j) * softmax.scale;
    if (softmax.softcap > 0) s = tanh(s * (1.0f / softmax.softcap)) * softmax.softcap;
    if (j < from || j + kWidth > to) {
      I32 lane = {};
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) lane[i] = i;
      s = select((lane + j >= from) & (lane + j < to), s, broadcast(-kInfinity));
    }
    maxima = vmax(s, maxima);
    store(scores + j, s);
  }
  const float maximum = reduce_max(maxima);
  const bool blind = maximum == -kInfinity;  // nothing visible so far
  F32 sum = zero();
  for (int j = 0; j < end; j += kWidth) {
    const F32 p = blind ? zero() : fast_exp(load(scores + j) - maximum);
    sum = sum + p;
    store(weights + j, p);
  }
  for (int j = end; j < kKeys; j += kWidth) store(weights + j, zero());
  const float rescale = blind ? 1.0f : fast_exp(broadcast(state.maximum - maximum))[0];
  state.sum = state.sum * rescale + reduce_add(sum);
  state.maximum = maximum;
  return rescale;
}

// acc [kColumns, kVectors vectors] of the channels from d on. rest: how many of them there are, if that is
// not all.
template <class T, int kVectors, bool kPartial>
inline void add_values(const typename Products<T>::Weight* weights, const KeyBlock<T>& block, int64_t offset,
                       int rest, const float* rescale, float* acc, int64_t acc_stride, Prefetch<T>& next) {
  using P = Products<T>;
  F32 sum[kColumns][kVectors];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sum[c][i] = load(acc + c * acc_stride + i * kWidth) * rescale[c];
  }
  for (int j = 0; j < block.count; j += P::kTurn) {
    next.advance(P::kTurn * kVectors * kWidth * sizeof(T));
    F32 value[kVectors];
    if constexpr (kPartial) {
      P::values_n(block.v + j, offset, rest, value);
    } else {
      P::values(block.v + j, offset, value);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const F32 weight = P::weight(weights + c * kKeys + j);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sum[c][i] = P::multiply_add(sum[c][i], weight, value[i]);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store(acc + c * acc_stride + i * kWidth, sum[c][i]);
  }
}

// Channels that a row of acc has room for.
template <class T>
constexpr int64_t padded_channels(int64_t D) {
  return round_up(D, Products<T>::kStep);
}

// Takes the columns of one tile over a block. q [kColumns, padded D]; acc [kColumns, padded D]; offset: of
// the kv head in the cache's rows; from, to [kColumns]: the visible keys of the block.
template <class T>
inline void attend_tile(const typename Products<T>::Query* q, const KeyBlock<T>& block, int64_t k_offset,
                        int64_t v_offset, int64_t D, const int* from, const int* to, const Softmax& softmax,
                        RunningSoftmax* states, float* acc, Prefetch<T>& next_k, Prefetch<T>& next_v) {
  using P = Products<T>;
  constexpr int kAll = 4, kOne = P::kStep / kWidth;
  alignas(64) float scores[kColumns * kKeys];
  alignas(64) typename P::Weight weights[kColumns * kKeys];
  const int64_t stride = padded_channels<T>(D);
  for (int j = 0; j < block.count; j += kTileKeys) {
    score_keys<T>(q, stride, block, j, k_offset, D, scores);
    next_k.advance(kTileKeys * D * sizeof(T));
  }
  float rescale[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    rescale[c] = weigh(scores + c * kKeys, from[c], to[c], softmax, states[c], weights + c * kKeys);
  }
  int64_t d = 0;
  for (; d + kAll * kWidth <= D; d += kAll * kWidth) {
    add_values<T, kAll, false>(weights, block, v_offset + d, 0, rescale, acc + d, stride, next_v);
  }
  for (; d + P::kStep <= D; d += P::kStep) {
    add_values<T, kOne, false>(weights, block, v_offset + d, 0, rescale, acc + d, stride, next_v);
  }
  if (d < D) {
    add_values<T, kOne, true>(weights, block, v_offset + d, static_cast<int>(D - d), rescale, acc + d, stride,
                              next_v);
  }
}

}  // namespace deltamem::DELTAMEM_ISA
