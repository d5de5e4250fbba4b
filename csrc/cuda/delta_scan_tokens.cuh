// What the scan's kernels share: where a segment lies, and how its tokens come into shared memory.
//
// A block has consuming warps, whose lanes hold rows of states in registers, and kProducers producing
// threads, which load the next chunk of tokens meanwhile: any dtype and stride, activated, gates opened, as
// fp32 rows that a lane then takes in a few wide loads. A masked token arrives as one that changes and reads
// nothing.
#pragma once

#include "cuda/delta_scan_plan.h"
#include "cuda/load.cuh"
#include "cuda/shared_memory.cuh"

namespace deltamem::cuda {

inline constexpr int kProducers = 128;
inline constexpr int kPiece = 8;                          // channels that a producing thread loads at once
inline constexpr int kChunkFloats = kProducers * kPiece;  // one array of a chunk: one piece per producer

// Every kernel's arguments.
struct ScanArgs {
  Memory memory;
  Rows rows;
  ScanPlan plan;
  Tensor start;                // [N or P, H, R, R] states that sequences start from, optional: 0
  Tensor start_slots;          // [N] int32, optional: row n's is n; < 0 is padding
  Tensor has_start;            // [N] bool, optional: true
  Tensor finish;               // [N or P, H, R, R] where their last states go
  Tensor finish_slots;         // [N] or per token [B, T] int32, optional: start_slots
  Tensor reads, tape, dreads;  // [B, T, H, R], [S, H, R, R], [B, T, H, R]; each optional
  int tape_len = 0;
  float *segment_maps = nullptr, *group_maps = nullptr, *starts = nullptr;  // delta_scan_maps.cuh
  uint32_t* counters = nullptr;
};

// A segment of one state head.
struct Segment {
  bool exists = false;
  bool padding = false;  // of a padding row: reads 0, has no state
  int row = 0, batch = 0, head = 0;
  int sequence_start = 0, sequence_length = 0;
  int index = 0;  // among the sequence's
  int begin = 0;  // its first token, in the sequence
  int count = 0;  // its tokens

  DELTAMEM_DEVICE int token(int t) const { return sequence_start + begin + t; }  // in the batch row
  DELTAMEM_DEVICE bool is_last() const { return begin + count >= sequence_length; }
};

// Item (slot, head) of the slots of segments of `length` tokens. A sequence without tokens has segment 0.
DELTAMEM_DEVICE Segment find_segment(const ScanArgs& p, int item, int length) {
  Segment x;
  const int slot = item / p.plan.heads;
  x.head = item % p.plan.heads;
  if (p.rows.cu_seqlens) {
    const int32_t* cu = p.rows.cu_seqlens.at<int32_t>();
    int low = 0, high = p.plan.rows;  // the last row whose slots begin at most here
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (cu[middle] / length + middle <= slot) {
        low = middle;
      } else {
        high = middle;
      }
    }
    x.row = low;
  } else {
    x.row = slot / p.plan.per_row(length);
  }
  if (x.row >= p.plan.rows) return x;
  const Span span = row_span(p.rows, x.row, p.plan.tokens);
  x.batch = static_cast<int>(span.batch);
  x.sequence_start = static_cast<int>(span.start), x.sequence_length = static_cast<int>(span.length);
  x.index = slot - p.plan.first_slot(p.rows, x.row, x.sequence_start, length);
  x.exists = x.index == 0 || x.index <= (x.sequence_length - 1) / length;
  if (!x.exists) return x;
  x.begin = x.index * length;
  x.count = x.sequence_length - x.begin < length ? x.sequence_length - x.begin : length;
  x.padding = p.start_slots && *p.start_slots.at<int32_t>(x.row) < 0;
  return x;
}

// How a block's consuming lanes hold states.
template <int kRP>
struct LaneShape {
  static constexpr int RP = kRP;
  static constexpr int kColumns = RP < 16 ? RP : 16;            // channels of a lane
  static constexpr int kLanesOfRow = RP / kColumns;             // neighbours
  static constexpr int kLanes = RP * kLanesOfRow;               // of a segment: 8, 16, 64, 256
  static constexpr int kUnits = kLanes < 32 ? 32 / kLanes : 1;  // segments of a block
  static constexpr int kConsumers = kLanes * kUnits;
  static constexpr int kPieces = RP / kPiece;
  static constexpr int kPitch = kUnits * RP;

  DELTAMEM_DEVICE static float sum_of_row(float x) {
#pragma unroll
    for (int distance = 1; distance < kLanesOfRow; distance *= 2) x += ptx::shfl_xor(x, distance);
    return x;
  }
};

// The block's segments, from shared memory's table: tokens of the longest.
template <class S>
DELTAMEM_DEVICE int find_segments(const ScanArgs& p, Segment* segments) {
  const int thread = ptx::thread(), first = static_cast<int>(ptx::block()) * S::kUnits;
  if (thread < S::kUnits) segments[thread] = find_segment(p, first + thread, p.plan.segment_len);
  ptx::sync_block();
  int longest = 0;
#pragma unroll
  for (int i = 0; i < S::kUnits; ++i) longest = longest < segments[i].count ? segments[i].count : longest;
  return longest;
}

// ---- rows of numbers -------------------------------------------------------------------------------------

// x [kCount] = p [kCount], aligned to 16 bytes.
template <int kCount>
DELTAMEM_DEVICE void load_row(const float* p, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 y = *reinterpret_cast<const float4*>(p + i);
    x[i] = y.x, x[i + 1] = y.y, x[i + 2] = y.z, x[i + 3] = y.w;
  }
}
template <int kCount>
DELTAMEM_DEVICE void store_row(float* p, const float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    *reinterpret_cast<float4*>(p + i) = float4{x[i], x[i + 1], x[i + 2], x[i + 3]};
  }
}

// Channels [first, first + kCount) of the row at `offset` of t; 0 from channel `rank` on.
template <int kCount>
DELTAMEM_DEVICE void load_channels(const Tensor& t, int64_t offset, int first, int rank, float (&x)[kCount]) {
  load_floats(t, offset + first, x, rank - first);
}
template <int kCount>
DELTAMEM_DEVICE void store_channels(float* row, int first, int rank, const float (&x)[kCount]) {
  store_vector(row + first, x, rank - first);
}

template <int kCount>
DELTAMEM_DEVICE void clear(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = 0.0f;
}

// Four running sums: a chain of kCount / 4 products and two sums.
template <int kCount>
DELTAMEM_DEVICE float dot(const float (&x)[kCount], const float (&y)[kCount]) {
  float sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = fmaf(x[i], y[i], 0.0f);
#pragma unroll
  for (int i = 4; i < kCount; ++i) sum[i % 4] = fmaf(x[i], y[i], sum[i % 4]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// ---- a producing thread ----------------------------------------------------------------------------------

DELTAMEM_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Loads one piece of the tokens of one segment. kPieces neighbouring lanes have the pieces of a token.
template <int kPieces>
class TokenLoader {
 public:
  DELTAMEM_DEVICE TokenLoader(const Memory& memory, const Rows& rows, const Segment& segment, int piece)
      : memory_(memory),
        rows_(rows),
        segment_(segment),
        first_(piece * kPiece),
        rank_(static_cast<int>(memory.mem_q.size[3])) {
    load_bias(memory.beta_bias, beta_bias_);
    load_bias(memory.lam_bias, lam_bias_);
  }

  // Whether token t of the segment (any t) reads and writes.
  DELTAMEM_DEVICE bool is_live(int t) const {
    return 0 <= t && t < segment_.count && !segment_.padding &&
           !is_masked(rows_, segment_.batch, segment_.token(t));
  }

  DELTAMEM_DEVICE void load(const Tensor& x, int t, bool live, float (&y)[kPiece]) const {
    if (live && x) {
      load_channels(x, x.offset(segment_.batch, segment_.token(t), segment_.head), first_, rank_, y);
    } else {
      clear(y);
    }
  }

  // Of mem_q or mem_k, activated; returns max(|tanh x|, eps). All lanes of a warp together.
  DELTAMEM_DEVICE float load_activated(const Tensor& x, int t, bool live, float (&y)[kPiece]) const {
    load(x, t, live, y);
    if (!memory_.qk_activation) return 1.0f;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      y[i] = tanhf(y[i]);
      squares = fmaf(y[i], y[i], squares);
    }
    const float norm = fmaxf(sqrtf(sum_of_pieces(squares)), kL2NormEps), scale = 1.0f / norm;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) y[i] *= scale;
    return norm;
  }

  // Through z = y / norm, y = tanh(x): dz -> dx. z and norm as load_activated left them.
  DELTAMEM_DEVICE void activation_bwd(const float (&z)[kPiece], float norm, float (&dz)[kPiece]) const {
    if (!memory_.qk_activation) return;
    float along = 0.0f;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) along = fmaf(z[i], dz[i], along);
    along = sum_of_pieces(along);
    if (norm <= kL2NormEps) along = 0.0f;
    const float scale = 1.0f / norm;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) dz[i] = tanh_bwd(fmaf(-along, z[i], dz[i]) * scale, z[i] * norm);
  }

  DELTAMEM_DEVICE static float sum_of_pieces(float x) {
#pragma unroll
    for (int distance = 1; distance < kPieces; distance *= 2) x += ptx::shfl_xor(x, distance);
    return x;
  }

  // beta and the decay in use; of a token that is not live 0 and 1.
  DELTAMEM_DEVICE void load_gates(int t, bool live, float (&beta)[kPiece], float (&lam)[kPiece]) const {
    load_gate(memory_.beta, beta_bias_, t, live, 0.0f, beta);
    if (memory_.lam) {
      load_gate(memory_.lam, lam_bias_, t, live, 1.0f, lam);
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) lam[i] = 1.0f - beta[i];
    }
  }

 private:
  DELTAMEM_DEVICE void load_bias(const Tensor& bias, float (&x)[kPiece]) const {
    clear(x);
    if (bias) spread(bias, bias.offset(segment_.head), x);
  }

  // A row of one number is shared by all channels.
  DELTAMEM_DEVICE void spread(const Tensor& t, int64_t offset, float (&x)[kPiece]) const {
    if (t.size[t.ndim - 1] == 1) {
      const float value = load_float(t, offset);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) x[i] = value;
    } else {
      load_channels(t, offset, first_, rank_, x);
    }
  }

  DELTAMEM_DEVICE void load_gate(const Tensor& gate, const float (&bias)[kPiece], int t, bool live,
                                 float idle, float (&x)[kPiece]) const {
    if (live) {
      spread(gate, gate.offset(segment_.batch, segment_.token(t), segment_.head), x);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) x[i] = memory_.gate ? sigmoid(x[i] + bias[i]) : x[i];
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) x[i] = idle;
    }
  }

  const Memory& memory_;
  const Rows& rows_;
  const Segment segment_;
  const int first_, rank_;
  float beta_bias_[kPiece], lam_bias_[kPiece];
};

// A chunk of tokens as a forward pass takes them: [kChunk, kPitch], kPitch the rows of the block's segments.
struct Chunk {
  float *q, *k, *keep, *erase, *put;

  DELTAMEM_DEVICE explicit Chunk(float* x)
      : q(x),
        k(x + kChunkFloats),
        keep(x + 2 * kChunkFloats),
        erase(x + 3 * kChunkFloats),
        put(x + 4 * kChunkFloats) {}
};

// One producer's share of a chunk, its piece of token t, at `place` in each array. kQ: with q.
template <bool kQ, class Loader>
DELTAMEM_DEVICE void stage_token(const Memory& memory, const Loader& loader, int t, const Chunk& chunk,
                                 int place) {
  const bool live = loader.is_live(t);
  float x[kPiece], beta[kPiece], lam[kPiece];
  if constexpr (kQ) {
    loader.load_activated(memory.mem_q, t, live, x);
    store_row(chunk.q + place, x);
  }
  if (!memory.write) return;
  loader.load_activated(memory.mem_k, t, live, x);
  store_row(chunk.k + place, x);
  loader.load_gates(t, live, beta, lam);
  loader.load(memory.mem_v, t, live, x);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    const Gates<float> g = gates(memory.update_rule, beta[i], lam[i]);
    lam[i] = g.keep, beta[i] = g.erase, x[i] *= g.write;
  }
  store_row(chunk.keep + place, lam);
  store_row(chunk.erase + place, beta);
  store_row(chunk.put + place, x);
}

// d <- 0 for the tokens of a packed batch that belong to no sequence, in turns over all threads.
DELTAMEM_DEVICE void clear_past_end(const ScanArgs& p, const Tensor& d, int threads) {
  if (!p.rows.cu_seqlens || !d) return;
  const int end = static_cast<int>(packed_end(p.rows)), rows = (p.plan.tokens - end) * p.plan.heads;
  const int step = static_cast<int>(ptx::num_blocks()) * threads, channels = static_cast<int>(d.size[3]);
  for (int row = static_cast<int>(ptx::block()) * threads + ptx::thread(); row < rows; row += step) {
    const int64_t offset = d.offset(0, end + row / p.plan.heads, row % p.plan.heads);
    for (int i = 0; i < channels; ++i) store_float(d, offset + i, 0.0f);
  }
}

}  // namespace deltamem::cuda
