// The words of csrc/cuda/ptx.cuh for a host compiler: kernels run on the CPU, their threads as fibers. Needs
// no CUDA toolkit. What each word means stands in ptx.cuh.
#pragma once

#include <string>
#include <tuple>

#include "engine.h"
#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __shared__ static_assert(false, "shared memory is had through shared_memory.cuh")

#define DELTAMEM_DEVICE inline

namespace deltamem::ptx {

using emulation::Site;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline constexpr bool kEmulated = true;
inline constexpr int kRedZone = emulation::kRedZone;
inline void poison(void* behind_array, int bytes) { emulation::poison(behind_array, bytes); }

// ---- numbers ---------------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return emulation::bf16_value(x.bits); }
inline float to_float(f16 x) { return emulation::f16_value(x.bits); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  return {emulation::bf16_bits(x)};
}
template <>
inline f16 from_float<f16>(float x) {
  return {emulation::f16_bits(x)};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// The device's is approximate (2 units in the last place) and flushes subnormal numbers, too.
inline float exp2(float x) {
  const float y = exp2f(x);
  return y < FLT_MIN ? 0.0f : y;
}

inline float reciprocal(float x) { return 1.0f / x; }

// ---- threads ---------------------------------------------------------------------------------------------

inline int thread() { return emulation::here.thread; }
inline int lane() { return emulation::here.thread % 32; }
inline int warp() { return emulation::here.thread / 32; }
inline int64_t block() { return emulation::here.block; }
inline int64_t num_blocks() { return emulation::here.blocks; }

inline void sync_block(Site site = Site::current()) { emulation::sync_block(site); }
inline void sync_warp(Site site = Site::current()) {
  emulation::Meeting meeting{emulation::Word::sync_warp, site};
  emulation::meet(meeting);
}
inline void sync_named(int id, int threads, Site site = Site::current()) {
  emulation::sync_named(id, threads, site);
}

// Out of the warp, a lane gets its own. Of masks and distances the device takes the five lowest bits.
template <class T>
T shfl_from(T x, int source_lane, Site site) {
  static_assert(sizeof(T) == 4);
  emulation::Meeting meeting{emulation::Word::shfl, site, std::bit_cast<uint32_t>(x), source_lane};
  emulation::meet(meeting);
  return std::bit_cast<T>(meeting.value);
}
template <class T>
T shfl(T x, int source_lane, Site site = Site::current()) {
  return shfl_from(x, source_lane & 31, site);
}
template <class T>
T shfl_xor(T x, int mask, Site site = Site::current()) {
  return shfl_from(x, lane() ^ (mask & 31), site);
}
template <class T>
T shfl_up(T x, int distance, Site site = Site::current()) {
  const int from = lane() - (distance & 31);
  return shfl_from(x, from >= 0 ? from : lane(), site);
}
inline uint32_t ballot(bool condition, Site site = Site::current()) {
  emulation::Meeting meeting{emulation::Word::ballot, site, condition};
  emulation::meet(meeting);
  return meeting.value;
}
inline int first_bit(uint32_t x) { return std::countr_zero(x); }

// ---- memory shared by blocks -----------------------------------------------------------------------------

inline void fence() { emulation::fence(); }
inline int atomic_add(int* counter, int value) {
  emulation::yield();
  return __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}
inline uint32_t atomic_inc(uint32_t* counter, uint32_t last) {
  emulation::yield();
  uint32_t before = __atomic_load_n(counter, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(counter, &before, before >= last ? 0 : before + 1, false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
template <class T>
T load_shared_by_blocks(const T* p) {
  emulation::yield();
  return *p;
}

inline void prefetch(const void*) {}

// ---- asynchronous copies into shared memory --------------------------------------------------------------

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulation::here.shared_memory);
}

// Between issue and arrival the target is NaN. Both ends are touched at issue and at arrival, by this thread
// and in its kernel's code, so that a sanitizer sees both and names the line.
inline void cp_async(void* target, const void* source, bool valid, Site site = Site::current()) {
  emulation::start_copy({target, source, valid}, site);
  if (valid) {
    const uint4 touched = *static_cast<const uint4*>(source);
    asm volatile("" ::"m"(touched));
  }
  *static_cast<uint4*>(target) = {~0u, ~0u, ~0u, ~0u};
}
inline void cp_async_commit() { emulation::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  while (const emulation::Copy* copy = emulation::next_copy(kPending)) {
    *static_cast<uint4*>(copy->target) = copy->valid ? *static_cast<const uint4*>(copy->source) : uint4{};
  }
}

// ---- tensor cores ----------------------------------------------------------------------------------------

inline void load_matrices(emulation::Word word, const char* name, uint32_t (&fragment)[4], const void* row,
                          Site site) {
  emulation::check_shared_row(row, name, site);
  const uint4 own = *static_cast<const uint4*>(row);
  emulation::Meeting meeting{word, site};
  meeting.row = &own.x;
  meeting.fragment = fragment;
  emulation::meet(meeting);
}
inline void ldmatrix(uint32_t (&fragment)[4], const void* row, Site site = Site::current()) {
  load_matrices(emulation::Word::ldmatrix, "ldmatrix", fragment, row, site);
}
inline void ldmatrix_transposed(uint32_t (&fragment)[4], const void* row, Site site = Site::current()) {
  load_matrices(emulation::Word::ldmatrix_transposed, "ldmatrix_transposed", fragment, row, site);
}
inline uint32_t movmatrix(uint32_t x, Site site = Site::current()) {
  emulation::Meeting meeting{emulation::Word::movmatrix, site, x};
  emulation::meet(meeting);
  return meeting.value;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::current()) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  static_assert(kBf16 || std::is_same_v<T, f16>);
  const uint32_t b[2] = {b0, b1};
  emulation::Meeting meeting{kBf16 ? emulation::Word::mma_bf16 : emulation::Word::mma_f16, site};
  meeting.d = d;
  meeting.a = a;
  meeting.b = b;
  emulation::meet(meeting);
}

// ---- dependent launches: a launch begins when the last has ended -----------------------------------------

inline void wait_for_previous_kernel() { emulation::wait_for_previous_kernel(); }
inline void let_next_kernel_start() {}

// ---- dynamic shared memory -------------------------------------------------------------------------------

inline char* dynamic_shared_memory() { return emulation::here.shared_memory; }

// ---- host side: devices and launches ---------------------------------------------------------------------

struct Device {
  int index, multiprocessors, shared_memory_per_block, shared_memory_per_multiprocessor, compute_capability;
};
const char* describe_device(int index, Device* device);

inline const char* switch_device(int device, int* before) {
  *before = 0;
  return device == 0 ? nullptr : "the emulation has one device";
}
inline const char* capture_of(void*, uint64_t* id) {
  *id = 0;
  return nullptr;
}

struct LaunchShape {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  bool overlaps_previous = false;
};

template <class... Parameters>
std::tuple<std::remove_const_t<Parameters>...> parameters_of(void (*)(Parameters...));

template <auto kKernel, class... Args>
const char* launch(const LaunchShape& shape, int device, void*, const Args&... args) {
  using Parameters = decltype(parameters_of(kKernel));
  static_assert(std::is_same_v<Parameters, std::tuple<Args...>>,
                "Args: exactly the kernel's parameter types");
  if (device != 0) return "the emulation has one device";
  const Parameters parameters(args...);
  return emulation::launch(
      {.kernel = __PRETTY_FUNCTION__,
       .run_thread = [](const void* all) { std::apply(kKernel, *static_cast<const Parameters*>(all)); },
       .arguments = &parameters,
       .blocks = shape.blocks,
       .threads = shape.threads,
       .shared_bytes = shape.shared_bytes,
       .overlaps_previous = shape.overlaps_previous});
}

}  // namespace deltamem::ptx
