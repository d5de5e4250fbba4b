// The view every kernel takes: a raw pointer, sizes and strides. Knows neither Python nor torch.
#pragma once

#include <cstdint>

namespace deltamem {

enum class DType : int8_t { f32, f16, bf16, i32, boolean };

#if defined(__CUDACC__)
#define DELTAMEM_HD __host__ __device__ __forceinline__
#else
// Always inline: sources compiled for several instruction sets share these functions, and a copy that the
// linker kept for all of them could be that of the widest set.
#define DELTAMEM_HD inline __attribute__((always_inline))
#endif

struct Tensor {
  void* data = nullptr;  // nullptr: the optional argument is absent
  DType dtype = DType::f32;
  int8_t device = 0;  // its index
  int ndim = 0;
  int64_t size[5] = {};
  int64_t stride[5] = {};  // in elements; the last dimension is contiguous

  DELTAMEM_HD explicit operator bool() const { return data != nullptr; }

  // Element offset of row (i0, i1, i2), each along a leading dimension.
  DELTAMEM_HD int64_t offset(int64_t i0, int64_t i1 = 0, int64_t i2 = 0) const {
    return i0 * stride[0] + (i1 != 0 ? i1 * stride[1] : 0) + (i2 != 0 ? i2 * stride[2] : 0);
  }

  template <class T>
  DELTAMEM_HD T* at(int64_t i0 = 0, int64_t i1 = 0, int64_t i2 = 0) const {
    return static_cast<T*>(data) + offset(i0, i1, i2);
  }
};

}  // namespace deltamem
