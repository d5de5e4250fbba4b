// The producing threads of a block that takes segments backward: they load the tokens of the chunk ahead, and
// take the gradients of the chunk behind through activations and gates to memory.
#pragma once

#include "cuda/delta_scan_reverse.cuh"

namespace deltamem::cuda {

// One producing thread: its piece of its token of every chunk.
template <class S>
class ReverseProducer {
 public:
  DELTAMEM_DEVICE ReverseProducer(const ReverseArgs& p, const Segment& segment, int producer)
      : p_(p),
        m_(p.scan.memory),
        x_(segment),
        producer_(producer),
        piece_(producer % S::kPieces),
        own_(producer / (S::kPieces * S::kUnits)),
        loader_(m_, p.scan.rows, segment, piece_) {
    clear(beta_sum_);
    clear(lam_sum_);
  }

  DELTAMEM_DEVICE void stage(const Inputs<S>& in, const Cursor<S>& at) const {
    const int t = at.begin() + own_, place = producer_ * kPiece;
    const bool live = t < at.part_end() && loader_.is_live(t);
    float x[kPiece], y[kPiece];
    if (at.back) {
      in.q_norm[producer_] = loader_.load_activated(m_.mem_q, t, live, x);
      store_row(in.q + place, x);
      loader_.load(p_.scan.dreads, t, live, x);
      store_row(in.dreads + place, x);
    }
    if (!m_.write) return;
    in.k_norm[producer_] = loader_.load_activated(m_.mem_k, t, live, x);
    store_row(in.k + place, x);
    loader_.load(m_.mem_v, t, live, x);
    store_row(in.v + place, x);
    loader_.load_gates(t, live, x, y);
    store_row(in.beta + place, x);
    store_row(in.lam + place, y);
  }

  // The gradients of a chunk, if it has gone backward, to memory.
  DELTAMEM_DEVICE void drain(const Inputs<S>& in, const Outputs<S>& out, const Cursor<S>& at) {
    if (!at.back) return;
    const int t = at.begin() + own_, place = producer_ * kPiece;
    const bool exists = t < at.part_end() && t < x_.count, live = exists && loader_.is_live(t);
    float x[kPiece];
    take_sums(out.q, in.q, in.q_norm, live, x);
    if (exists) store(p_.dmem_q, t, x);
    take_sums(out.k, in.k, in.k_norm, live && m_.write, x);
    if (exists) store(p_.dmem_k, t, x);
    take(out.v, live && m_.write, x);
    if (exists) store(p_.dmem_v, t, x);
    take(out.beta, live && m_.write, x);
    drain_gate(p_.dbeta, in.beta + place, t, exists, x, beta_sum_);
    if (!p_.dlam) return;
    take(out.lam, live && m_.write, x);
    drain_gate(p_.dlam, in.lam + place, t, exists, x, lam_sum_);
  }

  // What the biases receive of the block's segments: the producers' sums, in order of their tokens.
  DELTAMEM_DEVICE void sum_biases(const Inputs<S>& scratch) const {
    if (p_.bias_parts == nullptr) return;
    store_row(scratch.q + producer_ * kPiece, beta_sum_);
    store_row(scratch.k + producer_ * kPiece, lam_sum_);
    ptx::sync_named(2, S::kProducing);
    const int64_t items = int64_t{p_.scan.plan.slots[0]} * p_.scan.plan.heads;
    for (int i = producer_; i < S::kPitch; i += S::kProducing) {
      const int64_t item = ptx::block() * S::kUnits + i / S::RP;
      if (item >= items) continue;
      float beta = 0.0f, lam = 0.0f;
      for (int t = 0; t < S::kChunk; ++t) {
        beta += scratch.q[t * S::kPitch + i];
        lam += scratch.k[t * S::kPitch + i];
      }
      float* part = p_.bias_parts + item * 2 * S::RP + i % S::RP;
      part[0] = beta, part[S::RP] = lam;
    }
  }

 private:
  DELTAMEM_DEVICE void take(const float* d, bool live, float (&x)[kPiece]) const {
    clear(x);
    if (live) load_row(d + producer_ * kPiece, x);
  }

  DELTAMEM_DEVICE void take_sums(const float* d, const float* z, const float* norm, bool live,
                                 float (&x)[kPiece]) const {
    float part[kPiece];
    take(d, live, x);
    for (int warp = 1; warp < S::kWarps; ++warp) {
      take(d + warp * S::kFloats, live, part);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) x[i] += part[i];
    }
    take(z, live, part);
    loader_.activation_bwd(part, live ? norm[producer_] : 1.0f, x);
  }

  DELTAMEM_DEVICE void drain_gate(const Tensor& d, const float* gate, int t, bool exists, float (&x)[kPiece],
                                  float (&sum)[kPiece]) {
    if (!d) return;
    const bool shared = d.size[3] == 1;
    if (shared) {
      float all = 0.0f;
#pragma unroll
      for (int i = 0; i < kPiece; ++i) all += x[i];
      x[0] = TokenLoader<S::kPieces>::sum_of_pieces(all);
    }
    if (!exists) return;
    if (m_.gate) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        x[i] = m_.write ? sigmoid_bwd(x[i], gate[i]) : 0.0f;
        sum[i] += x[i];
      }
    }
    if (!shared) {
      store(d, t, x);
    } else if (piece_ == 0) {
      store_float(d, d.offset(x_.batch, x_.token(t), x_.head), x[0]);
    }
  }

  DELTAMEM_DEVICE void store(const Tensor& d, int t, const float (&x)[kPiece]) const {
    if (!d) return;
    const int64_t offset = d.offset(x_.batch, x_.token(t), x_.head);
    const int first = piece_ * kPiece, rank = p_.scan.plan.rank;
    dispatch_float(d.dtype, [&](auto kind) {
      store_vector(static_cast<decltype(kind)*>(d.data) + offset + first, x, rank - first);
    });
  }

  const ReverseArgs& p_;
  const Memory& m_;
  const Segment x_;
  const int producer_, piece_, own_;
  const TokenLoader<S::kPieces> loader_;
  float beta_sum_[kPiece], lam_sum_[kPiece];
};

}  // namespace deltamem::cuda
