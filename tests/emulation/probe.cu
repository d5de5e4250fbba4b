// One small kernel for each word of csrc/cuda/ptx.cuh, on 32-bit words: thread i takes row i of `in` and
// stores row i of `out`. Built for the device and emulated, and held to the same bits by tests/test_ptx.py.
#include <cstring>

#include "cuda/shared_memory.cuh"
#include "probe.h"

namespace deltamem::probe {
namespace {

using cuda::Carver;

constexpr int kMaxThreads = 256;

DELTAMEM_DEVICE float as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
template <class T>
DELTAMEM_DEVICE T as_number(uint32_t x) {
  T y;
  memcpy(&y, &x, sizeof(T));
  return y;
}
template <class T>
DELTAMEM_DEVICE uint32_t as_bits(T x) {
  uint32_t y = 0;
  memcpy(&y, &x, sizeof(T));
  return y;
}

// A kernel's words per thread, words of memory that all blocks share (zeros), and shared memory.
struct Row {
  const uint32_t* in;
  uint32_t* out;
  uint32_t* memory;
};

// ---- numbers ---------------------------------------------------------------------------------------------

template <class T>
struct ToFloat {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) { r.out[0] = as_bits(ptx::to_float(as_number<T>(r.in[0]))); }
};
template <class T>
struct FromFloat {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) {
    r.out[0] = as_bits(ptx::from_float<T>(as_float(r.in[0])));
  }
};
template <class T>
struct Pack {
  static constexpr int kIn = 2, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) {
    r.out[0] = ptx::pack<T>(as_float(r.in[0]), as_float(r.in[1]));
  }
};
struct Exp2 {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) { r.out[0] = as_bits(ptx::exp2(as_float(r.in[0]))); }
};
struct Reciprocal {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) { r.out[0] = as_bits(ptx::reciprocal(as_float(r.in[0]))); }
};
struct FirstBit {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) { r.out[0] = ptx::first_bit(r.in[0]); }
};

// ---- threads ---------------------------------------------------------------------------------------------

struct Place {
  static constexpr int kIn = 0, kOut = 5;
  static DELTAMEM_DEVICE void run(Row r, uint4*) {
    r.out[0] = ptx::thread(), r.out[1] = ptx::lane(), r.out[2] = ptx::warp();
    r.out[3] = static_cast<uint32_t>(ptx::block()), r.out[4] = static_cast<uint32_t>(ptx::num_blocks());
  }
};
// Twice, each thread takes what another of its group has stored.
template <class Sync>
struct Exchange {
  static constexpr int kIn = 2, kOut = 2;
  static DELTAMEM_DEVICE void run(Row r, uint4* shared) {
    const int first = ptx::thread() / Sync::kGroup * Sync::kGroup, own = ptx::thread() - first;
    const int other = first + (own + 5) % Sync::kGroup;
    for (int i = 0; i < 2; ++i) {
      shared[ptx::thread()].x = r.in[i];
      Sync::sync();
      r.out[i] = shared[other].x;
      Sync::sync();
    }
  }
};
struct SyncBlock {
  static constexpr int kGroup = 128;
  static DELTAMEM_DEVICE void sync() { ptx::sync_block(); }
};
struct SyncWarp {
  static constexpr int kGroup = 32;
  static DELTAMEM_DEVICE void sync() { ptx::sync_warp(); }
};
struct SyncNamed {
  static constexpr int kGroup = 64;
  static DELTAMEM_DEVICE void sync() { ptx::sync_named(1 + ptx::thread() / kGroup, kGroup); }
};

struct Shfl {
  static constexpr int kIn = 2, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) { r.out[0] = ptx::shfl(r.in[0], static_cast<int>(r.in[1])); }
};
struct ShflXor {
  static constexpr int kIn = 2, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) {
    r.out[0] = ptx::shfl_xor(r.in[0], static_cast<int>(r.in[1]));
  }
};
struct ShflUp {
  static constexpr int kIn = 2, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) {
    r.out[0] = ptx::shfl_up(r.in[0], static_cast<int>(r.in[1]));
  }
};
struct Ballot {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) { r.out[0] = ptx::ballot(r.in[0] != 0); }
};

// ---- memory ----------------------------------------------------------------------------------------------

struct AtomicAdd {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) {
    r.out[0] = ptx::atomic_add(reinterpret_cast<int*>(r.memory), static_cast<int>(r.in[0]));
  }
};
struct AtomicInc {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) { r.out[0] = ptx::atomic_inc(r.memory, r.in[0]); }
};
// The last block to arrive hands out what all have stored: in[0] of the same thread, summed over blocks.
struct Fence {
  static constexpr int kIn = 1, kOut = 2;
  static DELTAMEM_DEVICE void run(Row r, uint4* shared) {
    auto* parts = reinterpret_cast<float*>(r.memory + 4);
    const int blocks = static_cast<int>(ptx::num_blocks()), thread = ptx::thread();
    parts[ptx::block() * kMaxThreads + thread] = static_cast<float>(r.in[0]);
    ptx::fence();
    ptx::sync_block();
    if (thread == 0) shared->x = ptx::atomic_inc(r.memory, blocks - 1);
    ptx::sync_block();
    r.out[0] = r.out[1] = 0;
    if (shared->x != static_cast<uint32_t>(blocks) - 1) return;
    ptx::fence();
    float sum = 0.0f, fours = 0.0f;
    for (int i = 0; i < blocks; ++i) {
      sum += ptx::load_shared_by_blocks(parts + i * kMaxThreads + thread);
      const float4 x =
          ptx::load_shared_by_blocks(reinterpret_cast<const float4*>(parts + i * kMaxThreads) + thread / 4);
      fours += thread % 4 == 0 ? x.x : thread % 4 == 1 ? x.y : thread % 4 == 2 ? x.z : x.w;
    }
    r.out[0] = static_cast<uint32_t>(sum), r.out[1] = static_cast<uint32_t>(fours);
  }
};
struct Prefetch {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) {
    ptx::prefetch(r.in);
    r.out[0] = r.in[0];
  }
};

// ---- copies, matrices ------------------------------------------------------------------------------------

struct SharedMemory {
  static constexpr int kIn = 0, kOut = 2;
  static DELTAMEM_DEVICE void run(Row r, uint4* shared) {
    r.out[0] = ptx::shared_address(shared + ptx::thread()) - ptx::shared_address(shared);
    r.out[1] = reinterpret_cast<uintptr_t>(ptx::dynamic_shared_memory()) % 1024;
  }
};
// Two groups of one copy; in[8], in[9]: valid. The first is read while the second may be under way.
struct CpAsync {
  static constexpr int kIn = 12, kOut = 8;
  static DELTAMEM_DEVICE void run(Row r, uint4* shared) {
    uint4* target = shared + 2 * ptx::thread();
    ptx::cp_async(target, r.in, r.in[8] != 0);
    ptx::cp_async_commit();
    ptx::cp_async(target + 1, r.in + 4, r.in[9] != 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    memcpy(r.out, target, 16);
    ptx::cp_async_wait<0>();
    memcpy(r.out + 4, target + 1, 16);
  }
};
template <bool kTransposed>
struct Ldmatrix {
  static constexpr int kIn = 4, kOut = 4;
  static DELTAMEM_DEVICE void run(Row r, uint4* shared) {
    uint4* row = shared + ptx::warp() * 32 + (5 * ptx::lane() + 3) % 32;
    *row = {r.in[0], r.in[1], r.in[2], r.in[3]};
    ptx::sync_warp();
    uint32_t fragment[4];
    kTransposed ? ptx::ldmatrix_transposed(fragment, row) : ptx::ldmatrix(fragment, row);
    for (int i = 0; i < 4; ++i) r.out[i] = fragment[i];
  }
};
struct Movmatrix {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) { r.out[0] = ptx::movmatrix(r.in[0]); }
};
template <class T>
struct Mma {
  static constexpr int kIn = 10, kOut = 4;
  static DELTAMEM_DEVICE void run(Row r, uint4*) {
    float d[4];
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) d[i] = as_float(r.in[i]), a[i] = r.in[4 + i];
    ptx::mma<T>(d, a, r.in[8], r.in[9]);
    for (int i = 0; i < 4; ++i) r.out[i] = as_bits(d[i]);
  }
};

// ---- dependent launches: the second kernel takes what the first has stored ------------------------------

struct StoreForNext {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) {
    ptx::let_next_kernel_start();
    r.memory[ptx::block() * kMaxThreads + ptx::thread()] = r.in[0];
  }
};
struct TakeFromPrevious {
  static constexpr int kIn = 1, kOut = 1;
  static DELTAMEM_DEVICE void run(Row r, uint4*) {
    ptx::wait_for_previous_kernel();
    r.out[0] = r.memory[ptx::block() * kMaxThreads + ptx::thread()];
  }
};

// ---- host ------------------------------------------------------------------------------------------------

struct Shared {
  uint4* words;
  size_t bytes;
  DELTAMEM_HD explicit Shared(Carver carver)
      : words(carver.take<uint4>(2 * kMaxThreads)), bytes(carver.used()) {}
};

template <class Probe>
__global__ void __launch_bounds__(kMaxThreads)
    probe(const uint32_t* in, uint32_t* out, uint32_t* memory, int threads) {
  const Shared shared(Carver::of_block());
  const int64_t i = ptx::block() * threads + ptx::thread();
  Probe::run({in + i * Probe::kIn, out + i * Probe::kOut, memory}, shared.words);
}

template <class Probe>
const char* launch(const Arguments& a, bool overlaps_previous) {
  return ptx::launch<probe<Probe>>({.blocks = a.blocks,
                                    .threads = a.threads,
                                    .shared_bytes = Shared(Carver()).bytes,
                                    .overlaps_previous = overlaps_previous},
                                   a.device, a.stream, a.in, a.out, a.memory, a.threads);
}
template <class Probe>
const char* once(const Arguments& a) {
  return launch<Probe>(a, false);
}
const char* dependent(const Arguments& a) {
  ptx::Device device;
  if (const char* error = ptx::describe_device(a.device, &device)) return error;
  if (const char* error = launch<StoreForNext>(a, false)) return error;
  return launch<TakeFromPrevious>(a, ptx::kEmulated || device.compute_capability >= 90);
}

template <class Probe>
constexpr Entry entry(const char* name) {
  return {name, Probe::kIn, Probe::kOut, once<Probe>};
}

}  // namespace

const Entry kEntries[] = {
    entry<ToFloat<bf16>>("to_float<bf16>"),
    entry<ToFloat<f16>>("to_float<f16>"),
    entry<FromFloat<bf16>>("from_float<bf16>"),
    entry<FromFloat<f16>>("from_float<f16>"),
    entry<Pack<bf16>>("pack<bf16>"),
    entry<Pack<f16>>("pack<f16>"),
    entry<Exp2>("exp2"),
    entry<Reciprocal>("reciprocal"),
    entry<FirstBit>("first_bit"),
    entry<Place>("place"),
    entry<Exchange<SyncBlock>>("sync_block"),
    entry<Exchange<SyncWarp>>("sync_warp"),
    entry<Exchange<SyncNamed>>("sync_named"),
    entry<Shfl>("shfl"),
    entry<ShflXor>("shfl_xor"),
    entry<ShflUp>("shfl_up"),
    entry<Ballot>("ballot"),
    entry<AtomicAdd>("atomic_add"),
    entry<AtomicInc>("atomic_inc"),
    entry<Fence>("fence"),
    entry<Prefetch>("prefetch"),
    entry<SharedMemory>("shared_memory"),
    entry<CpAsync>("cp_async"),
    entry<Ldmatrix<false>>("ldmatrix"),
    entry<Ldmatrix<true>>("ldmatrix_transposed"),
    entry<Movmatrix>("movmatrix"),
    entry<Mma<bf16>>("mma<bf16>"),
    entry<Mma<f16>>("mma<f16>"),
    {"dependent_launch", 1, 1, dependent},
    {},
};
const bool kEmulated = ptx::kEmulated;

}  // namespace deltamem::probe
