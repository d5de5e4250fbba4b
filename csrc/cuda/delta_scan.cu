// reads_t = S_{t-1} q_t and the update of S: the forward scan, and the scan over a pool of states.
//
//     maps_kernel (delta_scan_maps.cuh)      where segments start; none where segments are whole sequences
//     replay_kernel                          every segment from its start: reads, tape, final state
//
// A lane holds kColumns channels of one row of S in registers; a token costs it 4 kColumns FMAs and a few
// wide loads of shared memory, into which producing threads bring the next tokens meanwhile.
#include "cuda/delta_scan_maps.cuh"

namespace deltamem::cuda {
namespace {

template <int kRP>
struct ReplayShape : LaneShape<kRP> {
  static constexpr int kThreads = LaneShape<kRP>::kConsumers + kProducers;
  static constexpr int kChunk = kChunkFloats / LaneShape<kRP>::kPitch;  // tokens
  static constexpr int kBlocks = kRP == 8 ? 4 : kRP == 64 ? 1 : 2;      // of a multiprocessor
};

template <class S>
struct ReplayMemory {
  Segment* segments;
  float* chunks;  // two of 5 arrays
  size_t bytes;

  DELTAMEM_HD explicit ReplayMemory(Carver carver)
      : segments(carver.take<Segment>(S::kUnits)),
        chunks(carver.take<float>(2 * 5 * kChunkFloats)),
        bytes(carver.used()) {}
  DELTAMEM_DEVICE Chunk chunk(int i) const { return Chunk(chunks + i % 2 * 5 * kChunkFloats); }
};

// One lane's part of a row of S, and where it goes.
template <class S>
class ReplayLane {
 public:
  DELTAMEM_DEVICE ReplayLane(const ScanArgs& p, const Segment& segment, int lane)
      : p_(p), x_(segment), row_(lane / S::kLanesOfRow), first_(lane % S::kLanesOfRow * S::kColumns) {
    if constexpr (S::RP <= 16) {
      if (p.plan.mapped && x_.exists) {
        carry_to_segment<S::RP, false>(p, x_, row_, s_);
        return;
      }
    }
    load_start(p, x_, row_, first_, s_);
  }

  // Tokens [begin, begin + count) of the segment, from rows at `place` of the chunk on.
  DELTAMEM_DEVICE void replay(const Chunk& chunk, int begin, int count, int place) {
    const int token = x_.token(begin);
    const int64_t stride = p_.reads.stride[1];
    float* reads = p_.reads.at<float>(x_.batch, token, x_.head) + row_;
    const bool reads_here = first_ == 0 && row_ < p_.plan.rank, write = p_.memory.write;
    const bool per_token = p_.finish_slots && p_.finish_slots.ndim == 2 && !x_.padding;
    int to_tape = p_.tape && !x_.padding ? (x_.begin + begin) % p_.tape_len : -1;
#pragma unroll 2
    for (int t = 0; t < count; ++t, place += S::kPitch, reads += stride) {
      if (to_tape >= 0) {
        if (to_tape == 0) store_tape(x_.begin + begin + t);
        if (++to_tape == p_.tape_len) to_tape = 0;
      }
      float y[S::kColumns];
      load_row(chunk.q + place + first_, y);
      const float read = S::sum_of_row(dot(s_, y));
      if (reads_here) *reads = read;
      if (write) {
        load_row(chunk.k + place + first_, y);
        const int own = place + row_;
        const float u = fmaf(-chunk.erase[own], S::sum_of_row(dot(s_, y)), chunk.put[own]);
        const float keep = chunk.keep[own];
#pragma unroll
        for (int j = 0; j < S::kColumns; ++j) s_[j] = fmaf(u, y[j], keep * s_[j]);
      }
      if (per_token) store_state(*p_.finish_slots.at<int32_t>(x_.batch, token + t));
    }
  }

  DELTAMEM_DEVICE void finish() {
    const Tensor& slots = p_.finish_slots;
    if (!x_.exists || x_.padding || !x_.is_last() || (slots && slots.ndim == 2)) return;
    const int64_t source = p_.start_slots ? *p_.start_slots.at<int32_t>(x_.row) : x_.row;
    const int64_t target = slots ? *slots.at<int32_t>(x_.row) : source;
    const bool in_place = p_.start.data == p_.finish.data && source == target &&
                          (!p_.has_start || *p_.has_start.at<bool>(x_.row));
    if (!p_.memory.write && in_place) return;  // other segments read it
    store_state(target);
  }

 private:
  // slot < 0: nothing is stored.
  DELTAMEM_DEVICE void store_state(int64_t slot) const {
    if (slot < 0 || row_ >= p_.plan.rank) return;
    store_channels(p_.finish.at<float>(slot, x_.head, row_), first_, p_.plan.rank, s_);
  }
  DELTAMEM_DEVICE void store_tape(int token) const {
    if (row_ >= p_.plan.rank) return;
    const int slot =
        p_.plan.first_slot(p_.rows, x_.row, x_.sequence_start, p_.tape_len) + token / p_.tape_len;
    store_channels(p_.tape.at<float>(slot, x_.head, row_), first_, p_.plan.rank, s_);
  }

  const ScanArgs& p_;
  const Segment x_;
  const int row_, first_;
  float s_[S::kColumns];
};

// Block: kUnits segments of heads.
template <int RP>
__global__ void __launch_bounds__(ReplayShape<RP>::kThreads, ReplayShape<RP>::kBlocks)
    replay_kernel(const __grid_constant__ ScanArgs p) {
  using S = ReplayShape<RP>;
  const ReplayMemory<S> shared(Carver::of_block());
  const int thread = ptx::thread();
  const int longest = find_segments<S>(p, shared.segments);
  const int chunks = ceil_div(longest, S::kChunk);

  if (thread >= S::kConsumers) {
    const int producer = thread - S::kConsumers, unit = producer / S::kPieces % S::kUnits;
    const int own = producer / (S::kPieces * S::kUnits);  // token of every chunk
    const TokenLoader<S::kPieces> loader(p.memory, p.rows, shared.segments[unit], producer % S::kPieces);
    for (int c = 0; c < chunks; ++c) {
      stage_token<true>(p.memory, loader, c * S::kChunk + own, shared.chunk(c), producer * kPiece);
      ptx::sync_named(1, S::kThreads);
    }
    ptx::wait_for_previous_kernel();
  } else {
    const int unit = thread / S::kLanes;
    ptx::wait_for_previous_kernel();
    ReplayLane<S> lane(p, shared.segments[unit], thread % S::kLanes);
    const int count = shared.segments[unit].count;
    for (int c = 0; c < chunks; ++c) {
      ptx::sync_named(1, S::kThreads);
      const int left = count - c * S::kChunk;
      lane.replay(shared.chunk(c), c * S::kChunk, left < S::kChunk ? left : S::kChunk, unit * RP);
    }
    lane.finish();
  }
  clear_past_end(p, p.reads, S::kThreads);
}

template <int RP>
void launch_replay(Call& call, const ScanArgs& p) {
  using S = ReplayShape<RP>;
  launch<replay_kernel<RP>>(call,
                            {.blocks = ceil_div(int64_t{p.plan.slots[0]} * p.plan.heads, int64_t{S::kUnits}),
                             .threads = S::kThreads,
                             .shared_bytes = ReplayMemory<S>(Carver()).bytes,
                             .overlaps_previous = p.plan.mapped},
                            p);
}

void scan(Call& call, ScanArgs& p) {
  if (p.plan.slots[0] == 0 || p.plan.heads == 0) return;
  if (p.plan.mapped) launch_maps<false>(call, p);
  switch (padded_rank(p.plan.rank)) {
    case 8:
      return launch_replay<8>(call, p);
    case 16:
      return launch_replay<16>(call, p);
    case 32:
      return launch_replay<32>(call, p);
    default:
      return launch_replay<64>(call, p);
  }
}

}  // namespace

void delta_scan_fwd(const DeltaScanParams& p, Call& call) {
  ScanArgs args{.memory = p.memory, .rows = p.rows};
  args.plan = plan_scan(p.memory, p.rows, p.segment_len, false, false);
  args.start = p.initial_state, args.finish = p.final_state;
  args.reads = p.reads, args.tape = p.tape, args.tape_len = static_cast<int>(p.segment_len);
  scan(call, args);
}

void delta_scan_with_state_pool(const DeltaScanPoolParams& p, Call& call) {
  const StatePool& pool = p.pool;
  const bool per_token = pool.output_state_indices && pool.output_state_indices.ndim == 2;
  ScanArgs args{.memory = p.memory, .rows = p.rows};
  args.plan = plan_scan(p.memory, p.rows, kPoolSegment, per_token, false);
  args.start = pool.state_pool, args.start_slots = pool.state_indices;
  args.has_start = pool.has_initial_state;
  args.finish = pool.state_pool, args.finish_slots = pool.output_state_indices;
  args.reads = p.reads;
  scan(call, args);
}

}  // namespace deltamem::cuda
