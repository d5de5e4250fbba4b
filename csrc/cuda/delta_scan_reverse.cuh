// A block that takes segments backward: its order of chunks, and the lanes that hold rows of S and of its
// gradient. delta_scan_gradients.cuh has the producing threads, delta_scan_bwd.cu the equations and the
// kernel.
#pragma once

#include "cuda/delta_scan_maps.cuh"

namespace deltamem::cuda {

struct ReverseArgs {
  ScanArgs scan;         // start: dfinal_state; tape, dreads; no reads, no finish
  Tensor initial_state;  // what read-only tokens read
  Tensor dmem_q, dmem_k, dmem_v, dbeta, dlam, dinitial_state;
  float* checkpoints = nullptr;  // [blocks, tape_len / kBlock, kColumns / 4, kConsumers, 4]
  float* bias_parts = nullptr;   // [slots, H, 2 (beta, lam), RP], optional
  float* state_parts = nullptr;  // [slots, H, RP, RP] of read-only segments
  int steps = 0;                 // checkpoints of a part
};

template <int kRP>
struct ReverseShape : LaneShape<kRP> {
  using Lanes = LaneShape<kRP>;
  static constexpr int kWarps = Lanes::kLanes < 32 ? 1 : Lanes::kLanes / 32;  // that hold a segment's rows
  static constexpr int kRowsOfWarp = kRP < 32 / Lanes::kLanesOfRow ? kRP : 32 / Lanes::kLanesOfRow;
  static constexpr int kProducing =
      kRP == 64 ? 32 : 64;  // threads; chunks small enough for two blocks or more
  static constexpr int kThreads = Lanes::kConsumers + kProducing;
  static constexpr int kFloats = kProducing * kPiece;                // an array of a chunk
  static constexpr int kChunk = kFloats / Lanes::kPitch;             // tokens: 16, 16, 16, 4
  static constexpr int kBlocks = kRP == 64 ? 1 : kRP == 16 ? 2 : 3;  // of a multiprocessor; more would spill
  static constexpr int kBlock = kRP == 8 ? 4 : 2;                    // tokens whose states are in registers
  static constexpr int kSums = Lanes::kColumns / kRowsOfWarp;  // columns of dq and dk that a lane ends with
};

// A chunk of tokens [kChunk, kPitch], and what its producers keep for themselves.
template <class S>
struct Inputs {
  static constexpr int kFloats = 6 * S::kFloats + 2 * S::kProducing;
  float *q, *k, *beta, *lam, *v, *dreads, *q_norm, *k_norm;

  DELTAMEM_DEVICE explicit Inputs(float* x)
      : q(x),
        k(q + S::kFloats),
        beta(k + S::kFloats),
        lam(beta + S::kFloats),
        v(lam + S::kFloats),
        dreads(v + S::kFloats),
        q_norm(dreads + S::kFloats),
        k_norm(q_norm + S::kProducing) {}
};
// Its gradients; q and k [kWarps, kChunk, kPitch]: each warp's sum over its rows.
template <class S>
struct Outputs {
  static constexpr int kFloats = (2 * S::kWarps + 3) * S::kFloats;
  float *q, *k, *v, *beta, *lam;

  DELTAMEM_DEVICE explicit Outputs(float* x)
      : q(x),
        k(q + S::kWarps * S::kFloats),
        v(k + S::kWarps * S::kFloats),
        beta(v + S::kFloats),
        lam(beta + S::kFloats) {}
};

template <class S>
struct ReverseMemory {
  Segment* segments;
  float *inputs, *outputs;  // two of each
  size_t bytes;

  DELTAMEM_HD explicit ReverseMemory(Carver carver)
      : segments(carver.take<Segment>(S::kUnits)),
        inputs(carver.take<float>(2 * Inputs<S>::kFloats)),
        outputs(carver.take<float>(2 * Outputs<S>::kFloats)),
        bytes(carver.used()) {}
  DELTAMEM_DEVICE Inputs<S> in(int i) const { return Inputs<S>(inputs + i % 2 * Inputs<S>::kFloats); }
  DELTAMEM_DEVICE Outputs<S> out(int i) const { return Outputs<S>(outputs + i % 2 * Outputs<S>::kFloats); }
};

// The order in which a block takes chunks: parts of the tape from the last, each forward and then backward
// (read-only tokens: backward alone).
template <class S>
struct Cursor {
  int longest, tape_len;
  bool write, back;
  int part, chunk;

  DELTAMEM_DEVICE Cursor(const ScanArgs& p, int longest)
      : longest(longest),
        tape_len(p.tape_len),
        write(p.memory.write),
        back(false),
        part(ceil_div(longest, tape_len)),
        chunk(0) {
    next_part();
  }
  DELTAMEM_DEVICE bool done() const { return part < 0; }
  DELTAMEM_DEVICE int part_begin() const { return part * tape_len; }
  DELTAMEM_DEVICE int part_end() const {
    return longest - part_begin() < tape_len ? longest : part_begin() + tape_len;
  }
  DELTAMEM_DEVICE int chunks() const { return ceil_div(part_end() - part_begin(), S::kChunk); }
  DELTAMEM_DEVICE int begin() const { return part_begin() + chunk * S::kChunk; }  // token
  // Tokens to take, whole blocks.
  DELTAMEM_DEVICE int count() const {
    const int left = ceil_div(part_end() - begin(), S::kBlock) * S::kBlock;
    return left < S::kChunk ? left : S::kChunk;
  }

  DELTAMEM_DEVICE void advance() {
    if (!back) {
      if (++chunk < chunks()) return;
      back = true;
    }
    if (--chunk < 0) next_part();
  }

 private:
  DELTAMEM_DEVICE void next_part() {
    --part;
    back = !write;
    chunk = back && part >= 0 ? chunks() - 1 : 0;
  }
};

// x [kColumns] of every lane -> sums over the rows that a warp holds; a lane ends with kSums of them in x,
// of columns kSums * (its row within the warp) on.
template <class S>
DELTAMEM_DEVICE void sum_rows(float (&x)[S::kColumns]) {
  int held = S::kColumns;
#pragma unroll
  for (int rows = S::kRowsOfWarp; rows > 1; rows /= 2) {
    const int distance = rows / 2 * S::kLanesOfRow;
    const bool upper = (ptx::lane() & distance) != 0;
    held /= 2;
#pragma unroll
    for (int i = 0; i < S::kColumns / 2; ++i) {
      if (i >= held) break;
      const float given = upper ? x[i] : x[i + held], kept = upper ? x[i + held] : x[i];
      x[i] = kept + ptx::shfl_xor(given, distance);
    }
  }
}

// One lane's part of a row of S and of its gradient.
template <class S>
class ReverseLane {
 public:
  DELTAMEM_DEVICE ReverseLane(const ReverseArgs& p, const Segment& segment, int thread)
      : p_(p),
        x_(segment),
        row_(thread % S::kLanes / S::kLanesOfRow),
        first_(thread % S::kLanesOfRow * S::kColumns),
        place_(thread / S::kLanes * S::RP),
        thread_(thread) {
    clear(g_);
    clear(s_);
    if (!p.scan.memory.write) {
      if (p.initial_state && x_.exists && row_ < p.scan.plan.rank) {
        load_channels(p.initial_state, p.initial_state.offset(x_.row, x_.head, row_), first_,
                      p.scan.plan.rank, s_);
      }
      return;
    }
    if constexpr (S::RP <= 16) {
      if (p.scan.plan.mapped && x_.exists) {
        carry_to_segment<S::RP, true>(p.scan, x_, row_, g_);
        return;
      }
    }
    if (x_.exists) load_start(p.scan, x_, row_, first_, g_);
  }

  // The state at the start of a part of the tape.
  DELTAMEM_DEVICE void begin_part(int token) {
    clear(s_);
    if (token >= x_.count || row_ >= p_.scan.plan.rank) return;
    const ScanArgs& scan = p_.scan;
    const int slot = scan.plan.first_slot(scan.rows, x_.row, x_.sequence_start, scan.tape_len) +
                     (x_.begin + token) / scan.tape_len;
    load_channels(scan.tape, scan.tape.offset(slot, x_.head, row_), first_, scan.plan.rank, s_);
  }

  DELTAMEM_DEVICE void take(const Inputs<S>& in, const Outputs<S>& out, const Cursor<S>& at) {
    if (!at.back) {
      forward(in, at.chunk * S::kChunk, at.count());
    } else if (p_.scan.memory.write) {
      backward(in, out, at.chunk * S::kChunk, at.count());
    } else {
      backward_reads(in, out, at.count());
    }
  }

  // Forward through `count` tokens of a chunk, the part's from `offset` on.
  DELTAMEM_DEVICE void forward(const Inputs<S>& in, int offset, int count) {
#pragma unroll 1
    for (int t = 0; t < count; t += S::kBlock) {
      float* to = checkpoint((offset + t) / S::kBlock);
#pragma unroll
      for (int i = 0; i < S::kColumns; i += 4) {
        *reinterpret_cast<float4*>(to + i * S::kConsumers) = float4{s_[i], s_[i + 1], s_[i + 2], s_[i + 3]};
      }
#pragma unroll
      for (int i = 0; i < S::kBlock; ++i) {
        float k[S::kColumns];
        load_row(in.k + place_ + (t + i) * S::kPitch + first_, k);
        pass(token(in, t + i), S::sum_of_row(dot(s_, k)), k, s_);
      }
    }
  }

  // Backward through them.
  DELTAMEM_DEVICE void backward(const Inputs<S>& in, const Outputs<S>& out, int offset, int count) {
#pragma unroll 1
    for (int t = count - S::kBlock; t >= 0; t -= S::kBlock) {
      float s[S::kBlock][S::kColumns], a[S::kBlock];
      const float* from = checkpoint((offset + t) / S::kBlock);
#pragma unroll
      for (int i = 0; i < S::kColumns; i += 4) {
        const float4 y = *reinterpret_cast<const float4*>(from + i * S::kConsumers);
        s[0][i] = y.x, s[0][i + 1] = y.y, s[0][i + 2] = y.z, s[0][i + 3] = y.w;
      }
#pragma unroll
      for (int i = 0; i < S::kBlock; ++i) {
        float k[S::kColumns];
        load_row(in.k + place_ + (t + i) * S::kPitch + first_, k);
        a[i] = S::sum_of_row(dot(s[i], k));
        if (i + 1 == S::kBlock) break;
#pragma unroll
        for (int j = 0; j < S::kColumns; ++j) s[i + 1][j] = s[i][j];
        pass(token(in, t + i), a[i], k, s[i + 1]);
      }
#pragma unroll
      for (int i = S::kBlock - 1; i >= 0; --i) token_back(in, out, t + i, s[i], a[i]);
    }
  }

  // Read-only tokens: reads = S q with one S.
  DELTAMEM_DEVICE void backward_reads(const Inputs<S>& in, const Outputs<S>& out, int count) {
    for (int t = count - 1; t >= 0; --t) {
      float q[S::kColumns], x[S::kColumns];
      const int at = place_ + t * S::kPitch;
      const float dr = in.dreads[at + row_];
      load_row(in.q + at + first_, q);
#pragma unroll
      for (int j = 0; j < S::kColumns; ++j) {
        x[j] = dr * s_[j];
        g_[j] = fmaf(dr, q[j], g_[j]);
      }
      sum_rows<S>(x);
      store_sums(out.q, t, x);
    }
  }

  DELTAMEM_DEVICE void finish() const {
    if (!x_.exists) return;
    const ScanArgs& scan = p_.scan;
    if (!scan.memory.write) {
      const int slot =
          scan.plan.first_slot(scan.rows, x_.row, x_.sequence_start, scan.plan.segment_len) + x_.index;
      float* to = p_.state_parts + Tree::place(scan, slot, x_.head, S::RP * S::RP) + row_ * S::RP + first_;
      store_row(to, g_);
    } else if (p_.dinitial_state && x_.index == 0 && row_ < scan.plan.rank) {
      store_channels(p_.dinitial_state.at<float>(x_.row, x_.head, row_), first_, scan.plan.rank, g_);
    }
  }

 private:
  struct Token {
    float beta, lam, v;
    Gates<float> gates;
  };

  DELTAMEM_DEVICE Token token(const Inputs<S>& in, int t) const {
    const int at = place_ + t * S::kPitch + row_;
    const float beta = in.beta[at], lam = in.lam[at];
    return {beta, lam, in.v[at], gates(p_.scan.memory.update_rule, beta, lam)};
  }

  // s = S_{t-1} -> S_t; a = s.k.
  DELTAMEM_DEVICE static void pass(const Token& x, float a, const float (&k)[S::kColumns],
                                   float (&s)[S::kColumns]) {
    const float u = fmaf(-x.gates.erase, a, x.gates.write * x.v);
#pragma unroll
    for (int j = 0; j < S::kColumns; ++j) s[j] = fmaf(u, k[j], x.gates.keep * s[j]);
  }

  DELTAMEM_DEVICE void token_back(const Inputs<S>& in, const Outputs<S>& out, int t,
                                  const float (&s)[S::kColumns], float a) {
    const int at = place_ + t * S::kPitch, own = at + row_;
    const Token x = token(in, t);
    float k[S::kColumns], y[S::kColumns];
    load_row(in.k + at + first_, k);
    const float h = S::sum_of_row(dot(g_, k)), dkeep = S::sum_of_row(dot(g_, s)), dr = in.dreads[own];
    const float put = fmaf(-x.gates.erase, a, x.gates.write * x.v), away = x.gates.erase * h;
#pragma unroll
    for (int j = 0; j < S::kColumns; ++j) y[j] = dr * s[j];
    sum_rows<S>(y);
    store_sums(out.q, t, y);
#pragma unroll
    for (int j = 0; j < S::kColumns; ++j) y[j] = fmaf(put, g_[j], -(away * s[j]));
    sum_rows<S>(y);
    store_sums(out.k, t, y);
    if (first_ == 0) {
      const Memory& memory = p_.scan.memory;
      const auto d =
          gates_bwd(memory.update_rule, !memory.lam, Gates<float>{dkeep, -a * h, x.v * h}, x.beta, x.lam);
      out.v[own] = x.gates.write * h;
      out.beta[own] = d.beta;
      out.lam[own] = d.lam;
    }
    load_row(in.q + at + first_, y);
#pragma unroll
    for (int j = 0; j < S::kColumns; ++j) g_[j] = fmaf(dr, y[j], fmaf(-away, k[j], x.gates.keep * g_[j]));
  }

  DELTAMEM_DEVICE void store_sums(float* sums, int t, const float (&x)[S::kColumns]) const {
    const int warp = S::kWarps == 1 ? 0 : thread_ / 32, row = row_ % S::kRowsOfWarp;
    float* to = sums + warp * S::kFloats + place_ + t * S::kPitch + first_ + row * S::kSums;
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) to[i] = x[i];
  }

  DELTAMEM_DEVICE float* checkpoint(int step) const {
    const int64_t at = ptx::block() * p_.steps + step;
    return p_.checkpoints + (at * S::kColumns * S::kConsumers + thread_ * 4);
  }

  const ReverseArgs& p_;
  const Segment x_;
  const int row_, first_, place_, thread_;
  float s_[S::kColumns], g_[S::kColumns];
};

}  // namespace deltamem::cuda
