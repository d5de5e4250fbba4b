// Numbers of any dtype as fp32, in the widest accesses that count and address allow.
#pragma once

#include <cstring>

#include "cuda/ptx.cuh"
#include "params.h"

namespace deltamem::cuda {

DELTAMEM_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DELTAMEM_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
// The widest word that `kBytes` are whole multiples of.
template <int kBytes>
using WordOf = typename Word<kBytes % 16 == 0  ? 16
                             : kBytes % 8 == 0 ? 8
                             : kBytes % 4 == 0 ? 4
                                               : 2>::type;

DELTAMEM_DEVICE bool is_aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// x [kCount] = p [kCount]; 0 from element `count` on.
template <class T, int kCount>
DELTAMEM_DEVICE void load_vector(const T* p, float (&x)[kCount], int count = kCount) {
  using W = WordOf<kCount* static_cast<int>(sizeof(T))>;
  constexpr int kWords = kCount * sizeof(T) / sizeof(W), kPer = sizeof(W) / sizeof(T);
  if (kPer > 1 && count >= kCount && is_aligned(p, sizeof(W))) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const W word = reinterpret_cast<const W*>(p)[w];
      T parts[kPer];
      memcpy(parts, &word, sizeof(W));
#pragma unroll
      for (int i = 0; i < kPer; ++i) x[w * kPer + i] = ptx::to_float(parts[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = i < count ? ptx::to_float(p[i]) : 0.0f;
  }
}

// p [kCount] = x [kCount], rounded; nothing from element `count` on.
template <class T, int kCount>
DELTAMEM_DEVICE void store_vector(T* p, const float (&x)[kCount], int count = kCount) {
  using W = WordOf<kCount* static_cast<int>(sizeof(T))>;
  constexpr int kWords = kCount * sizeof(T) / sizeof(W), kPer = sizeof(W) / sizeof(T);
  if (kPer > 1 && count >= kCount && is_aligned(p, sizeof(W))) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      T parts[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) parts[i] = ptx::from_float<T>(x[w * kPer + i]);
      W word;
      memcpy(&word, parts, sizeof(W));
      reinterpret_cast<W*>(p)[w] = word;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) p[i] = ptx::from_float<T>(x[i]);
    }
  }
}

// Calls f(T{}) with the type that a floating dtype names; every thread of a grid takes the same branch.
template <class F>
DELTAMEM_HD auto dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(bf16());
    case DType::f16:
      return f(f16());
    default:
      return f(float());
  }
}

// Element `offset` of t, and kCount elements from it on, as load_vector has them.
DELTAMEM_DEVICE float load_float(const Tensor& t, int64_t offset) {
  switch (t.dtype) {
    case DType::bf16:
      return ptx::to_float(static_cast<const bf16*>(t.data)[offset]);
    case DType::f16:
      return ptx::to_float(static_cast<const f16*>(t.data)[offset]);
    default:
      return static_cast<const float*>(t.data)[offset];
  }
}
template <int kCount>
DELTAMEM_DEVICE void load_floats(const Tensor& t, int64_t offset, float (&x)[kCount], int count = kCount) {
  dispatch_float(t.dtype, [&](auto type) {
    load_vector(static_cast<const decltype(type)*>(t.data) + offset, x, count);
  });
}
DELTAMEM_DEVICE void store_float(const Tensor& t, int64_t offset, float x) {
  switch (t.dtype) {
    case DType::bf16:
      static_cast<bf16*>(t.data)[offset] = ptx::from_float<bf16>(x);
      return;
    case DType::f16:
      static_cast<f16*>(t.data)[offset] = ptx::from_float<f16>(x);
      return;
    default:
      static_cast<float*>(t.data)[offset] = x;
  }
}

// Sums in a fixed order: every lane gets the same bits.
DELTAMEM_DEVICE float sum_of_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += ptx::shfl_xor(x, distance);
  return x;
}

}  // namespace deltamem::cuda
