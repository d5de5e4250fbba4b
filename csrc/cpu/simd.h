// Vectors of one instruction set: F32 (kWidth fp32 lanes) built on compiler vector extensions, so arithmetic
// is written with operators and `a * b + c` contracts to an FMA (-ffp-contract=fast). Intrinsics stand only
// where the extensions have no word: half-precision conversion, bf16 dot products, gathers across lanes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "tensor.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace deltamem::DELTAMEM_ISA {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#else
inline constexpr int kWidth = 8;  // portable: the compiler splits it into what the target has
#endif

typedef float F32 __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t I32 __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t U32 __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint16_t U16 __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
constexpr T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A cache-line aligned scratch array that lives as long as its scope.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, round_up(max<int64_t>(count, 1) * sizeof(T), 64)))) {
    if (data == nullptr) std::abort();  // inside a parallel region there is nobody to throw to
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data; }
};

// ---- scalars ---------------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, 2);
  return static_cast<float>(h);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
// Round to nearest even; NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits = float_to_bits(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  _Float16 h = static_cast<_Float16>(x);
  f16 out;
  std::memcpy(&out.bits, &h, 2);
  return out;
}

// ---- vectors ---------------------------------------------------------------------------------------------

inline F32 broadcast(float x) { return x - F32{}; }
inline F32 zero() { return F32{}; }

inline F32 load(const float* p) { return *reinterpret_cast<const F32*>(p); }
inline F32 load(const bf16* p) {
  U32 wide = __builtin_convertvector(*reinterpret_cast<const U16*>(p), U32) << 16;
  return reinterpret_cast<F32&>(wide);
}
inline F32 load(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<F32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  F32 x;
  for (int i = 0; i < kWidth; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

inline void store(float* p, F32 x) { *reinterpret_cast<F32*>(p) = x; }
inline void store(bf16* p, F32 x) {
#if defined(__AVX512BF16__)
  __m256bh packed = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
  std::memcpy(p, &packed, 2 * kWidth);
#else
  U32 bits = reinterpret_cast<U32&>(x);
  U32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  U32 is_nan = reinterpret_cast<U32>(x != x);
  U32 chosen = (is_nan & (bits | 0x400000)) | (~is_nan & rounded);
  U16 packed = __builtin_convertvector(chosen >> 16, U16);
  std::memcpy(p, &packed, 2 * kWidth);
#endif
}
inline void store(f16* p, F32 x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<f16>(x[i]);
#endif
}

// The first n < kWidth lanes; the rest load as 0 and are not stored.
template <class T>
inline F32 load_n(const T* p, int n) {
  T lanes[kWidth] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store_n(T* p, F32 x, int n) {
  T lanes[kWidth];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}

inline F32 select(I32 mask, F32 a, F32 b) {
  I32 x = (mask & reinterpret_cast<I32&>(a)) | (~mask & reinterpret_cast<I32&>(b));
  return reinterpret_cast<F32&>(x);
}
// b where either is NaN.
#if defined(__AVX512F__)
inline F32 vmax(F32 a, F32 b) {
  return reinterpret_cast<F32>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
inline F32 vmin(F32 a, F32 b) {
  return reinterpret_cast<F32>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#elif defined(__AVX2__)
inline F32 vmax(F32 a, F32 b) {
  return reinterpret_cast<F32>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
inline F32 vmin(F32 a, F32 b) {
  return reinterpret_cast<F32>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
#else
inline F32 vmax(F32 a, F32 b) { return select(a > b, a, b); }
inline F32 vmin(F32 a, F32 b) { return select(a < b, a, b); }
#endif

// Lanes of two vectors by parity, evens a0 a2 .. b0 b2 .. and odds a1 a3 .. b1 b3 .., and back: a0 b0 a1 b1
// .. of their lower and of their upper halves.
template <int... lane>
struct Lanes {
  static F32 evens(F32 a, F32 b) { return __builtin_shufflevector(a, b, (2 * lane)...); }
  static F32 odds(F32 a, F32 b) { return __builtin_shufflevector(a, b, (2 * lane + 1)...); }
  static F32 interleave_low(F32 a, F32 b) {
    return __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * kWidth)...);
  }
  static F32 interleave_high(F32 a, F32 b) {
    return __builtin_shufflevector(a, b, ((lane + kWidth) / 2 + lane % 2 * kWidth)...);
  }
};
#if defined(__AVX512F__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#else
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#endif
inline F32 evens(F32 a, F32 b) { return AllLanes::evens(a, b); }
inline F32 odds(F32 a, F32 b) { return AllLanes::odds(a, b); }
inline F32 interleave_low(F32 a, F32 b) { return AllLanes::interleave_low(a, b); }
inline F32 interleave_high(F32 a, F32 b) { return AllLanes::interleave_high(a, b); }

// kWidth rows of kCols values become kCols vectors of kWidth: with (row, col) as the bits of a linear index,
// a round of parity splits rotates the index right by one bit.
template <int kCols>
inline void transpose_lanes(F32 (&v)[kCols]) {
  for (int round = 1; round < kCols; round *= 2) {
    F32 split[kCols];
#pragma GCC unroll 16
    for (int i = 0; i < kCols / 2; ++i) {
      split[i] = evens(v[2 * i], v[2 * i + 1]);
      split[i + kCols / 2] = odds(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCols; ++i) v[i] = split[i];
  }
}

inline float reduce_add(F32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  float sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += x[i];
  return sum;
#endif
}
inline float reduce_max(F32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x));
#else
  float m = x[0];
  for (int i = 1; i < kWidth; ++i) m = max(m, x[i]);
  return m;
#endif
}

// e^x to about 2 ulp: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2]. exp(-inf) = 0; x > 88.7 saturates;
// NaN stays.
inline F32 exp(F32 x) {
  const float kLog2e = 1.44269504088896341f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  F32 clamped = vmax(vmin(x, broadcast(88.7f)), broadcast(-104.0f));
  F32 magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  F32 n = (clamped * kLog2e + magic) - magic;
  F32 r = clamped - n * kLn2Hi;
  r = r - n * kLn2Lo;
  F32 p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, so that results below the normal range still round to 0 and not to garbage
  I32 exponent = __builtin_convertvector(n, I32);
  I32 half = exponent >> 1;
  I32 low = (half + 127) << 23, high = (exponent - half + 127) << 23;
  F32 y = p * reinterpret_cast<F32&>(low) * reinterpret_cast<F32&>(high);
  y = select(x < -104.0f, zero(), y);
  return select(x != x, x, y);
}

inline F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }
// x P(x^2) / Q(x^2), a relative minimax fit with P(0) = Q(0) = 1, as far as fp32 tells tanh from 1: at
// most 2.7e-7 off, 7e-8 in the mean square. NaN stays.
inline F32 tanh(F32 x) {
  const F32 end = broadcast(7.9f);
  F32 c = vmax(-end, vmin(end, x)), s = c * c;
  F32 p = s * 1.54896754e-08f + 2.20669698e-05f;
  p = p * s + 3.58164487e-03f;
  p = p * s + 1.34528600e-01f;
  p = p * s + 1.0f;
  F32 q = s * 8.62373504e-07f + 3.42798688e-04f;
  q = q * s + 2.62023446e-02f;
  q = q * s + 4.67861898e-01f;
  q = q * s + 1.0f;
  return c * p / q;
}

// ---- rows of any dtype
// -------------------------------------------------------------------------------------

template <class T>
inline void convert_row(const T* source, float* target, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(target + i, load(source + i));
  for (; i < n; ++i) target[i] = to_float(source[i]);
}
template <class T>
inline void round_row(const float* source, T* target, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(target + i, load(source + i));
  for (; i < n; ++i) target[i] = from_float<T>(source[i]);
}

// Calls f with a value of the C++ type behind a floating dtype.
template <class F>
inline void dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      std::abort();  // validated by the caller
  }
}

// Row (i0, i1, i2) of a floating tensor as fp32.
inline void load_row(const Tensor& t, int64_t i0, int64_t i1, int64_t i2, float* target, int64_t n) {
  dispatch_float(t.dtype, [&](auto type) { convert_row(t.at<decltype(type)>(i0, i1, i2), target, n); });
}
inline void store_row(const Tensor& t, int64_t i0, int64_t i1, int64_t i2, const float* source, int64_t n) {
  dispatch_float(t.dtype, [&](auto type) { round_row(source, t.at<decltype(type)>(i0, i1, i2), n); });
}

}  // namespace deltamem::DELTAMEM_ISA
