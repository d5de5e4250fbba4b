// Vectors as long as the rows of a state: RowOf<W>, W = 4, 8 or 16 fp32 lanes whatever the instruction set
// has.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace deltamem::DELTAMEM_ISA {

template <int W>
struct RowTypes {
  typedef float F __attribute__((vector_size(4 * W), aligned(4), may_alias));
  typedef uint32_t U __attribute__((vector_size(4 * W), aligned(4), may_alias));
  typedef uint16_t H __attribute__((vector_size(2 * W), aligned(2), may_alias));
};
template <int W>
using RowOf = typename RowTypes<W>::F;

template <int W>
inline RowOf<W> load_lanes(const float* p) {
  return *reinterpret_cast<const RowOf<W>*>(p);
}
template <int W>
inline RowOf<W> load_lanes(const bf16* p) {
  using L = RowTypes<W>;
  typename L::U wide = __builtin_convertvector(*reinterpret_cast<const typename L::H*>(p), typename L::U)
                       << 16;
  RowOf<W> x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}
template <int W>
inline RowOf<W> load_lanes(const f16* p) {
  RowOf<W> x;
#if defined(__F16C__)
  if constexpr (W == 8) {
    x = reinterpret_cast<RowOf<W>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    return x;
  } else if constexpr (W == 4) {
    x = reinterpret_cast<RowOf<W>>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    return x;
  }
#endif
  if constexpr (W == kWidth) return load(p);
  for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
  return x;
}
template <int W>
inline void store_lanes(float* p, RowOf<W> x) {
  *reinterpret_cast<RowOf<W>*>(p) = x;
}

template <int W>
inline RowOf<W> broadcast_lanes(float x) {
  return x - RowOf<W>{};  // not 0 + x, which is no copy where x = -0
}

// a * b + c in one rounding where there is an instruction: where the chain of latencies matters, the
// compiler's own choice of the product to contract is not left to it.
template <int W>
inline RowOf<W> fma(RowOf<W> a, RowOf<W> b, RowOf<W> c) {
#if defined(__AVX512F__)
  if constexpr (W == 16) return _mm512_fmadd_ps(a, b, c);
#endif
#if defined(__FMA__)
  if constexpr (W == 8) return _mm256_fmadd_ps(a, b, c);
  if constexpr (W == 4) return _mm_fmadd_ps(a, b, c);
#endif
  return a * b + c;
}

// In every block of 2 H lanes: the sums of a's two halves, then those of b's. One operand of the addition is
// a blend, cheaper than a second shuffle.
template <int W, int H, int... L>
inline RowOf<W> add_halves(RowOf<W> a, RowOf<W> b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (L / H % 2 == 0 ? L : W + L)...) +
         __builtin_shufflevector(a, b, (L / H % 2 == 0 ? L + H : W + L - H)...);
}

// Lane i of the result is the sum over the lanes of p[i]. Overwrites p.
template <int W, int H = W / 2>
inline RowOf<W> lane_sums(RowOf<W>* p) {
  if constexpr (H == 0) {
    return p[0];
  } else {
    constexpr auto all = std::make_integer_sequence<int, W>();
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) p[i] = add_halves<W, H>(p[i], p[i + H], all);
    return lane_sums<W, H / 2>(p);
  }
}

// In every block of 2 H lanes: a's upper half changes places with b's lower one.
template <int W, int H, int... L>
inline void swap_halves(RowOf<W>& a, RowOf<W>& b, std::integer_sequence<int, L...>) {
  const RowOf<W> lower = __builtin_shufflevector(a, b, (L / H % 2 == 0 ? L : W + L - H)...);
  b = __builtin_shufflevector(a, b, (L / H % 2 == 0 ? L + H : W + L)...);
  a = lower;
}

// W rows become W columns.
template <int W, int H = W / 2>
inline void transpose(RowOf<W>* x) {
  constexpr auto all = std::make_integer_sequence<int, W>();
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i / H % 2 == 0) swap_halves<W, H>(x[i], x[i + H], all);
  }
  if constexpr (H > 1) transpose<W, H / 2>(x);
}

// Rows of R floats are held padded: R <= 4 to 4, R <= 8 to 8, then to whole vectors.
constexpr int padded_rank(int64_t R) { return R <= 4 ? 4 : R <= 8 ? 8 : R <= 16 ? 16 : round_up(R, kWidth); }

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls f with Int<lanes of one vector> and Int<columns, 0 if known at run time only> of a padded rank.
template <class F>
inline void dispatch_rank(int padded, F&& f) {
  switch (padded) {
    case 4:
      return f(Int<4>{}, Int<4>{});
    case 8:
      return f(Int<8>{}, Int<8>{});
    case 16:
      return f(Int<kWidth>{}, Int<16>{});
    default:
      return f(Int<kWidth>{}, Int<0>{});
  }
}

}  // namespace deltamem::DELTAMEM_ISA
