// A few tokens per row through one layer, in one launch: the memory is read and advances, k' and v' are
// appended, q' is prepared, the cache is attended in splits, the last split of an item to arrive merges them.
// csrc/README.md walks through it.
#include "cuda/delta_decode_memory.cuh"
#include "cuda/delta_decode_merge.cuh"
#include "cuda/delta_decode_prologue.cuh"
#include "cuda/launch.cuh"

namespace deltamem::cuda {

namespace decode {

// Tokens of a packed batch that belong to no row.
template <class T>
DELTAMEM_DEVICE void clear_tokens_past_end(const Argument& call) {
  const DeltaAttentionParams& p = call.p.attention.attention;
  if (!p.rows.cu_seqlens) return;
  for (int64_t t = packed_end(p.rows) + ptx::block(); t < p.q.size[1]; t += ptx::num_blocks()) {
    for (int64_t h = 0; h < p.q.size[2]; ++h) {
      for (int d = ptx::thread(); d < call.D; d += kThreads)
        p.out.at<T>(0, t, h)[d] = ptx::from_float<T>(0.0f);
      if (ptx::thread() == 0) *p.lse.at<float>(0, h, t) = -INFINITY;
    }
    if (!call.p.memory.mem_q) continue;
    for (int r = ptx::thread(); r < call.HR; r += kThreads) {
      const int64_t R = p.reads.size[3];
      p.reads.at<float>(0, t, r / R)[r % R] = 0.0f;
    }
  }
}

// Weights do not come from the kernel before: every thread of the grid asks for a line of them.
DELTAMEM_DEVICE void prefetch_weight(const Tensor& weight) {
  if (!weight) return;
  const int64_t element = weight.dtype == DType::f32 ? 4 : 2,
                bytes = weight.size[0] * weight.stride[0] * element;
  const int64_t line = (ptx::block() * kThreads + ptx::thread()) * 128;
  if (line < bytes) ptx::prefetch(static_cast<const char*>(weight.data) + line);
}

template <class T, int kD, int kN>
DELTAMEM_DEVICE void attend(const Argument& call, const Segment& segment, const Shared<T, kD>& shared,
                            SliceLoader<T, kD>& loader, const Merge<T, kD>& merge) {
  Sums<kD, kN> sums;
  Attention<T, kD, kN>(call, segment, shared, sums).run(loader);
  ptx::sync_block();
  merge.put(sums);
}

template <class T, int kD>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    delta_decode_kernel(const __grid_constant__ Argument call) {
  const Shared<T, kD> shared(Carver::of_block(), call);
  prefetch_weight(call.p.attention.attention.on_q.delta);
  prefetch_weight(call.p.on_k.delta);
  prefetch_weight(call.p.on_v.delta);
  ptx::wait_for_previous_kernel();

  clear_tokens_past_end<T>(call);
  BlockState& block = *shared.block;
  Schedule<kD> schedule(call, &block);
  const bool has_memory = static_cast<bool>(call.p.memory.mem_q);
  int reads_of = -1;  // the row whose reads are in shared memory
  schedule.begin();
  while (schedule.advance()) {
    const Row& row = schedule.row();
    const Segment& segment = schedule.segment();
    SliceLoader<T, kD> loader(call, row, segment);
    for (int stage = 0; stage < call.stages; ++stage) {
      loader.copy_keys(shared.stage(call.stages, stage, 0));
      loader.copy_values(shared.stage(call.stages, stage, 1));
    }

    // While they fly, the memory is replayed for its reads, and once more by the block that is last to have
    // read the row's state, which stores the new one. A loop, so that replay's code stands here once.
    bool replays = has_memory && row.number != reads_of;
    reads_of = row.number;
#pragma unroll 1
    for (int stores = 0; stores < 2; ++stores) {
      if (replays) replay(call, row, shared.reads, stores);
      if (stores) break;
      ptx::sync_block();
      bool is_last_reader = false;
      if (has_memory && ptx::thread() == 0) {
        is_last_reader = Merge<T, kD>::arrive(call.row_counters + row.number, segment.listed_tiles,
                                              call.kv_heads * row.column_blocks * row.listed_tiles());
      }
      Prologue<T, kD>(call, row, segment, shared).run();
      if (ptx::thread() == 0) block.is_last_reader = is_last_reader;
      ptx::sync_block();
      replays = block.is_last_reader;
    }

    const Merge<T, kD> merge(call, row, segment, shared);
    if (segment.columns <= 8) {
      attend<T, kD, 1>(call, segment, shared, loader, merge);
    } else {
      attend<T, kD, kMaxColumns<kD> / 8>(call, segment, shared, loader, merge);
    }
    if (segment.is_last) ptx::let_next_kernel_start();
    ptx::sync_block();
    merge.join_warps();
    if (merge.is_last()) {
      if (segment.splits > 1) merge.join_splits();
      merge.clear_masked_tokens();
    }
  }
}

// ---- host ------------------------------------------------------------------------------------------------

bool has_aligned_chunks(const Tensor& cache) {
  bool aligned = reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 && cache.size[3] % 8 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && cache.stride[i] % 8 == 0;
  return aligned;
}

template <class T, int kD>
size_t shared_bytes(Argument& call, int stages) {
  call.stages = stages;
  return Shared<T, kD>(Carver(), call).bytes;
}

// Two blocks to a multiprocessor with two tiles each under way, or else one block; as many tiles as there is
// room for. Returns the number of blocks.
template <class T, int kD>
int choose_stages(Argument& call, const DeviceProperties& device) {
  constexpr size_t kReserved = 1024;  // the system's own, of each block
  for (int blocks = kBlocksPerMultiprocessor; blocks > 0; --blocks) {
    const size_t room = min(device.shared_memory_per_multiprocessor / blocks - kReserved,
                            static_cast<size_t>(device.shared_memory_per_block));
    for (int stages = kMaxStages; stages >= blocks; --stages) {
      if (shared_bytes<T, kD>(call, stages) <= room) return blocks;
    }
  }
  return 0;
}

template <class T, int kD>
void run(const DeltaDecodeParams& p, Call& call) {
  const DeltaAttentionParams& attention = p.attention.attention;
  const Tensor& cache = p.attention.cache.k_cache;
  const Tensor& table = p.attention.cache.block_table;
  Argument argument{};
  argument.p = p;
  argument.rows = static_cast<int>(num_rows(attention.rows, attention.q.size[0]));
  argument.kv_heads = static_cast<int>(cache.size[2]);
  argument.group = static_cast<int>(attention.q.size[2]) / argument.kv_heads;
  argument.D = static_cast<int>(attention.q.size[3]);
  argument.HR = p.memory.mem_q ? static_cast<int>(p.memory.mem_q.size[2] * p.memory.mem_q.size[3]) : 0;
  argument.tokens = static_cast<int>(min(attention.q.size[1], int64_t{kMaxTokens}));
  const int columns = argument.tokens * argument.group;
  argument.columns = min(columns, kMaxColumns<kD>);
  argument.column_blocks = static_cast<int>(ceil_div(int64_t{columns}, int64_t{kMaxColumns<kD>}));
  argument.num_splits = static_cast<int>(min(p.attention.num_splits, int64_t{kMaxSplits}));
  argument.copies_chunks = has_aligned_chunks(cache) && has_aligned_chunks(p.attention.cache.v_cache);

  const int blocks = choose_stages<T, kD>(argument, call.properties);
  if (blocks == 0) {
    throw Failure(std::string("deltamem_kernels: ") + call.op + ": head size, tokens and memory must fit " +
                  std::to_string(call.properties.shared_memory_per_block) + " bytes of shared memory, got " +
                  std::to_string(argument.D) + ", " + std::to_string(argument.tokens) +
                  " and H * R = " + std::to_string(argument.HR));
  }
  // As many blocks as live at once, or as there can be tiles.
  const int64_t items = int64_t{argument.rows} * argument.kv_heads * argument.column_blocks;
  const int64_t slots = table ? table.size[1] * cache.size[1] : cache.size[1];
  const int64_t grid = min(items * ceil_div(max(slots, int64_t{1}), int64_t{kTileSlots}),
                           int64_t{blocks} * call.properties.multiprocessors);
  const int64_t partials = argument.num_splits == 0   ? 2 * grid
                           : argument.num_splits == 1 ? 0
                                                      : items * argument.num_splits;
  argument.sums = call.allocate_array<float>(partials * argument.columns * (kD + 2));
  argument.stats = argument.sums + partials * argument.columns * kD;
  argument.row_counters = reinterpret_cast<int*>(call.counters(argument.rows + items));
  argument.item_counters = argument.row_counters + argument.rows;
  launch<delta_decode_kernel<T, kD>>(
      call, {grid, kThreads, shared_bytes<T, kD>(argument, argument.stages), true}, argument);
}

template <class T>
void run(const DeltaDecodeParams& p, Call& call) {
  const int64_t D = p.attention.attention.q.size[3];
  if (D <= 64) return run<T, 64>(p, call);
  if (D <= 128) return run<T, 128>(p, call);
  run<T, 256>(p, call);
}

}  // namespace decode

void delta_decode(const DeltaDecodeParams& p, Call& call) {
  const Tensor& q = p.attention.attention.q;
  if (q.data == nullptr) return;
  const std::string place = std::string("deltamem_kernels: ") + call.op + ": q must have ";
  if (q.size[3] > 256) throw Failure(place + "a head size of at most 256, got " + std::to_string(q.size[3]));
  if (!p.attention.attention.rows.cu_seqlens && q.size[1] > decode::kMaxTokens) {
    throw Failure(place + "at most 16 new tokens per row, got " + std::to_string(q.size[1]));
  }
  switch (q.dtype) {
    case DType::bf16:
      return decode::run<bf16>(p, call);
    case DType::f16:
      return decode::run<f16>(p, call);
    default:
      throw Failure(place + "dtype bfloat16 or float16, got float32");
  }
}

}  // namespace deltamem::cuda
