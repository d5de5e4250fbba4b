// All PTX and intrinsics of the CUDA kernels, in two forms with one signature: for nvcc, and for a host
// compiler that runs the kernels on a CPU (every __CUDACC__ of this folder stands here). Kernels use these
// words and plain C++ only; dynamic shared memory is had through shared_memory.cuh.
//
// Words that name a warp are collective: every lane of the warp calls them, from the same line.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DELTAMEM_DEVICE __device__ __forceinline__

namespace deltamem::ptx {

using bf16 = __nv_bfloat16;
using f16 = __half;

inline constexpr bool kEmulated = false;
inline constexpr int kRedZone = 0;  // bytes behind each array in shared memory
__host__ __device__ __forceinline__ void poison(void*, int) {}

// ---- numbers ---------------------------------------------------------------------------------------------

DELTAMEM_DEVICE float to_float(float x) { return x; }
DELTAMEM_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
DELTAMEM_DEVICE float to_float(f16 x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
DELTAMEM_DEVICE T from_float(float x);
template <>
DELTAMEM_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DELTAMEM_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
DELTAMEM_DEVICE f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// Two 16-bit numbers in one register, `low` in the lower half.
template <class T>
DELTAMEM_DEVICE uint32_t pack(float low, float high);
template <>
DELTAMEM_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <>
DELTAMEM_DEVICE uint32_t pack<f16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// 2^x, two units in the last place; 2^-inf = 0.
DELTAMEM_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, one unit in the last place; 1 / inf = 0.
DELTAMEM_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- threads ---------------------------------------------------------------------------------------------

DELTAMEM_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DELTAMEM_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }
DELTAMEM_DEVICE int warp() { return static_cast<int>(threadIdx.x / 32); }
DELTAMEM_DEVICE int64_t block() { return blockIdx.x; }
DELTAMEM_DEVICE int64_t num_blocks() { return gridDim.x; }

DELTAMEM_DEVICE void sync_block() { __syncthreads(); }
DELTAMEM_DEVICE void sync_warp() { __syncwarp(); }
// A barrier among `threads` threads (whole warps), id 1 to 15; 0 is sync_block's.
DELTAMEM_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// T: a type of 4 bytes.
template <class T>
DELTAMEM_DEVICE T shfl(T x, int source_lane) {
  return __shfl_sync(0xffffffffu, x, source_lane);
}
template <class T>
DELTAMEM_DEVICE T shfl_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T>
DELTAMEM_DEVICE T shfl_up(T x, int distance) {
  return __shfl_up_sync(0xffffffffu, x, distance);
}
// The lowest bit that is set in x != 0.
DELTAMEM_DEVICE int first_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
DELTAMEM_DEVICE uint32_t ballot(bool condition) { return __ballot_sync(0xffffffffu, condition); }

// ---- memory shared by blocks -----------------------------------------------------------------------------

DELTAMEM_DEVICE void fence() { __threadfence(); }
DELTAMEM_DEVICE int atomic_add(int* counter, int value) { return atomicAdd(counter, value); }
// counter = counter == last ? 0 : counter + 1; returns what it was.
DELTAMEM_DEVICE uint32_t atomic_inc(uint32_t* counter, uint32_t last) { return atomicInc(counter, last); }
// Loads that see what other blocks stored before their fence: past this multiprocessor's first-level cache.
DELTAMEM_DEVICE float load_shared_by_blocks(const float* p) { return __ldcg(p); }
DELTAMEM_DEVICE float4 load_shared_by_blocks(const float4* p) { return __ldcg(p); }

// Brings the line of 128 bytes that holds *p near, to the second-level cache.
DELTAMEM_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- asynchronous copies into shared memory --------------------------------------------------------------

DELTAMEM_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes, both aligned to 16; zeros instead where not `valid` (source is not touched then).
DELTAMEM_DEVICE void cp_async(void* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
DELTAMEM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
DELTAMEM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores ----------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit numbers from shared memory. Lane i gives the address of row i % 8 of matrix i /
// 8 (16 bytes, aligned) and gets elements [lane / 4][2 * (lane % 4) + {0, 1}] of matrix j in fragment[j].
DELTAMEM_DEVICE void ldmatrix(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices: elements [2 * (lane % 4) + {0, 1}][lane / 4].
DELTAMEM_DEVICE void ldmatrix_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}
// Transposes the 8x8 matrix of 16-bit numbers that a warp holds in one register a lane.
DELTAMEM_DEVICE uint32_t movmatrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// d [16, 8] += a [16, 16] b [16, 8], fp32 sums of 16-bit products. With g = lane / 4, c = 2 * (lane % 4):
//   a[0] [g][c, c+1]   a[1] [g+8][c, c+1]   a[2] [g][c+8, c+9]   a[3] [g+8][c+8, c+9]
//   b[0] [c, c+1][g]   b[1] [c+8, c+9][g]
//   d[0], d[1] [g][c, c+1]   d[2], d[3] [g+8][c, c+1]
template <class T>
DELTAMEM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
DELTAMEM_DEVICE void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DELTAMEM_DEVICE void mma<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- dependent launches (sm_90 and up; nothing below) ----------------------------------------------------

// Returns when the kernels that this one depends on have finished and their stores are visible.
DELTAMEM_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel of the stream start, where it was launched to.
DELTAMEM_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- dynamic shared memory -------------------------------------------------------------------------------

DELTAMEM_DEVICE char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// ---- host side: devices and launches -------------------------------------------------------------------

struct Device {
  int index, multiprocessors, shared_memory_per_block, shared_memory_per_multiprocessor,
      compute_capability;  // 90
};

// Each returns the text of what went wrong, or null.
inline const char* failure(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* describe_device(int index, Device* device) {
  int major = 0, minor = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } wanted[] = {{&device->multiprocessors, cudaDevAttrMultiProcessorCount},
                {&device->shared_memory_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                {&device->shared_memory_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                {&major, cudaDevAttrComputeCapabilityMajor},
                {&minor, cudaDevAttrComputeCapabilityMinor}};
  for (const auto& w : wanted) {
    if (const char* error = failure(cudaDeviceGetAttribute(w.value, w.attribute, index))) return error;
  }
  device->index = index;
  device->compute_capability = 10 * major + minor;
  return nullptr;
}

// Makes `device` current and says which one was.
inline const char* switch_device(int device, int* before) {
  if (const char* error = failure(cudaGetDevice(before))) return error;
  return *before == device ? nullptr : failure(cudaSetDevice(device));
}

// 0: the stream is not being captured into a graph.
inline const char* capture_of(void* stream, uint64_t* id) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  const char* error = failure(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture));
  *id = status == cudaStreamCaptureStatusActive ? capture : 0;
  return error;
}

struct LaunchShape {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  bool overlaps_previous = false;  // starts early, and calls wait_for_previous_kernel
};

// Queues kKernel on the current device. Args: exactly the kernel's parameter types.
template <auto kKernel, class... Args>
const char* launch(const LaunchShape& shape, int device, void* stream, const Args&... args) {
  if (shape.shared_bytes > 48 * 1024) {  // more than every chip grants unasked
    static size_t granted[64] = {};
    if (granted[device % 64] < shape.shared_bytes) {
      if (const char* error = failure(cudaFuncSetAttribute(
              kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)))) {
        return error;
      }
      granted[device % 64] = shape.shared_bytes;
    }
  }
  cudaLaunchAttribute overlap[1];
  overlap[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap[0].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = overlap;
  config.numAttrs = shape.overlaps_previous ? 1 : 0;
  return failure(cudaLaunchKernelEx(&config, kKernel, args...));
}

}  // namespace deltamem::ptx

#else
#include "emulation.h"
#endif

namespace deltamem {
using ptx::bf16;
using ptx::f16;
}  // namespace deltamem
