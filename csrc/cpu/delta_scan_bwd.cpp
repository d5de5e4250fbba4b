// Gradients of the scan: segment after segment from the last, each replayed from its start state on the tape.
// A thread takes a row and head. Where these are fewer than the threads, each is shared: a thread carries
// only the state's gradient down to its own part, which is cheap, and no thread waits for another. Same bits.
#include "cpu/kernels.h"
#include "cpu/scan_kernel.h"

namespace deltamem::DELTAMEM_ISA {
namespace {

const float kZeros[kMaxRank] = {};

// dz -> dx through z = y / max(|y|, eps), y = tanh(x); norm holds the divisors. W rows at a time.
template <int W>
void activation_bwd(const StepGradients::Target& d, const Stream& z, const float* norm, int64_t count,
                    int width) {
  for (int64_t t = 0; t < count; t += W) {
    const int64_t rows = min<int64_t>(W, count - t);
    RowOf<W> products[W];
    for (int r = 0; r < W; ++r) {
      products[r] = RowOf<W>{};
      for (int i = 0; r < rows && i < width; i += W) {
        products[r] += load_lanes<W>(d.at(t + r) + i) * load_lanes<W>(z.at(t + r) + i);
      }
    }
    float along[W];
    store_lanes<W>(along, lane_sums<W>(products));
    for (int64_t r = 0; r < rows; ++r) {
      const float divisor = norm[t + r], share = divisor > kL2NormEps ? along[r] : 0.0f;
      for (int i = 0; i < width; i += W) {
        RowOf<W> dz = load_lanes<W>(d.at(t + r) + i), row = load_lanes<W>(z.at(t + r) + i);
        store_lanes<W>(d.at(t + r) + i, tanh_bwd((dz - row * share) / divisor, row * divisor));
      }
    }
  }
}

// One row and head. Its segments are `first` and on among those of all rows, as on the tape.
struct Sequence {
  int64_t row, head;
  Span span;
  int64_t first, segments;
};

Sequence sequence_of(const DeltaScanBwdParams& p, int64_t item) {
  const Tensor& q = p.fwd.memory.mem_q;
  const int64_t heads = q.size[2], row = item / heads, L = p.fwd.segment_len;
  const Span span = row_span(p.fwd.rows, row, q.size[1]);
  const int64_t segments = ceil_div(span.length, L);
  return {row, item % heads, span, p.fwd.rows.cu_seqlens ? span.start / L + row : row * segments, segments};
}

// How a call is cut: every row and head into `parts` runs of segments, so long that all take the same time.
struct Work {
  int64_t items, heads, slots = 0;  // slots: segments of all rows
  int64_t parts;

  Work(const DeltaScanBwdParams& p, int num_threads)
      : items(num_rows(p.fwd.rows, p.fwd.memory.mem_q.size[0]) * p.fwd.memory.mem_q.size[2]),
        heads(p.fwd.memory.mem_q.size[2]),
        parts(max<int64_t>(1, num_threads / max<int64_t>(1, items))) {
    for (int64_t i = 0; i < items; i += heads) {
      const Sequence x = sequence_of(p, i);
      slots = x.first + x.segments;
    }
  }

  // Where part i begins, in segments from the end of the row. A carried segment costs 1 - kReversed of a
  // reversed one: parts take the same time where (1 - kReversed^i) / (1 - kReversed^parts) of the row is
  // carried.
  int64_t begin(const Sequence& x, int64_t i) const {
    if (x.segments < kShared) return i == 0 ? 0 : x.segments;
    double left = 1, least = 1;
    for (int64_t n = 0; n < parts; ++n) left *= n < i ? kReversed : 1, least *= kReversed;
    return static_cast<int64_t>(x.segments * (1 - left) / (1 - least) + 0.5);
  }

 private:
  static constexpr double kReversed = 0.6;
  static constexpr int64_t kShared = 8;  // fewer segments are not worth another thread
};

// What gate biases receive of every segment: [segments, heads, 2 (beta, lam), kMaxRank].
struct BiasParts {
  BiasParts(const DeltaScanBwdParams& p, const Work& work)
      : heads_(work.heads),
        parts_(p.dbeta_bias || p.dlam_bias ? work.slots * work.heads * 2 * kMaxRank : 0) {}
  double* at(const Sequence& x, int64_t segment) {
    return parts_ + ((x.first + segment) * heads_ + x.head) * 2 * kMaxRank;
  }

 private:
  int64_t heads_;
  Buffer<double> parts_;
};

// One thread's passes over segments.
class SegmentReverse {
 public:
  SegmentReverse(const DeltaScanBwdParams& p, BiasParts& bias)
      : p_(p),
        m_(p.fwd.memory),
        bias_(bias),
        rank_(m_.mem_q.size[3]),
        width_(padded_rank(rank_)),
        state_size_(width_ * width_),
        segment_(min(p.fwd.segment_len, m_.mem_q.size[1])),
        loader_(m_, segment_),
        state_(state_size_),
        dstate_(state_size_),
        history_(m_.write ? segment_ * state_size_ : 0),
        recalled_(segment_ * width_),
        gradients_(5 * segment_ * width_),
        runs_(segment_) {}

  // Segments [begin, end) of a row and head, counted from its end.
  void reverse_part(const Sequence& x, int64_t begin, int64_t end) {
    x_ = x;
    const int64_t first = x.segments - end;
    int64_t s = x.segments - 1;
    load_state(p_.dfinal_state, x.row, x.head, rank_, dstate_);
    for (; s >= x.segments - begin; --s) carry_segment(s);
    for (; s >= first; --s) reverse_segment(s);
    if (first == 0 && p_.dinitial_state) store_state(p_.dinitial_state, x.row, x.head, dstate_);
  }

 private:
  struct Run {
    int64_t first, count;
  };

  int64_t begin_of(int64_t segment) { return x_.span.start + segment * p_.fwd.segment_len; }
  int64_t end_of(int64_t segment) { return min(begin_of(segment + 1), x_.span.start + x_.span.length); }

  // The runs of unmasked tokens of a segment, to runs_.
  int64_t find_runs(int64_t segment) {
    int64_t runs = 0;
    for (int64_t t = begin_of(segment), end = end_of(segment); t < end;) {
      const int64_t n = run_length(p_.fwd.rows, x_.span.batch, t, end - t);
      if (n > 0) runs_[runs++] = {t, n};
      t += n > 0 ? n : 1;
    }
    return runs;
  }

  Steps load(const Run& run) { return loader_.load(x_.span.batch, run.first, run.count, x_.head); }
  Stream dreads_of(const Run& run) {
    if (!p_.dreads) return {kZeros, 0};
    return loader_.rows(p_.dreads, x_.span.batch, run.first, run.count, x_.head);
  }

  void carry_segment(int64_t segment) {
    for (int64_t r = find_runs(segment) - 1; r >= 0; --r) {
      const Steps steps = load(runs_[r]);
      if (m_.write) {
        carry(m_.update_rule, dstate_, steps, runs_[r].count, dreads_of(runs_[r]));
      } else {
        carry_read_only(dstate_, steps, runs_[r].count, dreads_of(runs_[r]));
      }
    }
  }

  // Every run forward from the state on the tape, then backward.
  void reverse_segment(int64_t segment) {
    load_state(m_.write ? p_.fwd.tape : p_.fwd.initial_state, m_.write ? x_.first + segment : x_.row, x_.head,
               rank_, state_);
    dbias_ = bias_.at(x_, segment);
    if (p_.dbeta_bias || p_.dlam_bias) std::memset(dbias_, 0, 2 * kMaxRank * sizeof(double));
    const int64_t runs = find_runs(segment);
    int64_t tokens = 0, t = begin_of(segment);
    Steps steps;
    for (int64_t r = 0; r < runs; ++r) {
      for (; t < runs_[r].first; ++t) zero_gradients(t);
      steps = load(runs_[r]);
      if (m_.write) {
        replay(m_.update_rule, state_, steps, runs_[r].count, history_ + tokens * state_size_,
               recalled_ + tokens * width_);
      }
      tokens += runs_[r].count, t += runs_[r].count;
    }
    for (; t < end_of(segment); ++t) zero_gradients(t);
    for (int64_t r = runs - 1; r >= 0; --r) {
      if (r < runs - 1) steps = load(runs_[r]);
      tokens -= runs_[r].count;
      reverse_run(steps, runs_[r], tokens);
    }
  }

  void reverse_run(const Steps& steps, const Run& run, int64_t recorded) {
    const int64_t first = run.first, count = run.count;
    const Stream dreads = dreads_of(run);
    StepGradients to;
    to.q = target(p_.dmem_q, 0, first, m_.qk_activation);
    if (!m_.write) {
      carry_read_only(dstate_, steps, count, dreads);
      reverse_read_only(steps, count, state_, dreads, to);
      return finish_activated(p_.dmem_q, to.q, steps.q, steps.q_norm, first, count);
    }
    to.k = target(p_.dmem_k, 1, first, m_.qk_activation);
    to.v = target(p_.dmem_v, 2, first, false);
    to.beta = target(p_.dbeta, 3, first, m_.gate);
    if (steps.lam.data) to.lam = target(p_.dlam, 4, first, m_.gate);
    reverse(m_.update_rule, dstate_, steps, count, history_ + recorded * state_size_,
            recalled_ + recorded * width_, dreads, to);
    finish_activated(p_.dmem_q, to.q, steps.q, steps.q_norm, first, count);
    finish_activated(p_.dmem_k, to.k, steps.k, steps.k_norm, first, count);
    store_rows(p_.dmem_v, to.v, first, count);
    finish_gate(p_.dbeta, to.beta, steps.beta, p_.dbeta_bias ? dbias_ : nullptr, first, count);
    if (!steps.lam.data) return;
    finish_gate(p_.dlam, to.lam, steps.lam, p_.dlam_bias ? dbias_ + kMaxRank : nullptr, first, count);
  }

  // The result's own rows where they can take a gradient as the kernel leaves it, else scratch.
  StepGradients::Target target(const Tensor& d, int slot, int64_t first, bool unfinished) {
    if (!unfinished && d.dtype == DType::f32 && d.size[3] == width_) {
      return {d.at<float>(x_.span.batch, first, x_.head), d.stride[1]};
    }
    return {gradients_ + slot * segment_ * width_, width_};
  }

  bool in_place(const Tensor& d, const StepGradients::Target& x, int64_t first) {
    return d.dtype == DType::f32 && x.data == d.at<float>(x_.span.batch, first, x_.head);
  }

  void store_rows(const Tensor& d, const StepGradients::Target& x, int64_t first, int64_t count) {
    if (in_place(d, x, first)) return;
    const bool whole =
        d.size[3] == x.stride && d.stride[1] == x.stride;  // one stretch of memory on both sides
    if (whole) return store_row(d, x_.span.batch, first, x_.head, x.data, count * x.stride);
    for (int64_t t = 0; t < count; ++t) store_row(d, x_.span.batch, first + t, x_.head, x.at(t), d.size[3]);
  }

  // Through z = y / max(|y|, eps), y = tanh(x), where the caller left it to the scan.
  void finish_activated(const Tensor& d, const StepGradients::Target& x, const Stream& z, const float* norm,
                        int64_t first, int64_t count) {
    if (norm != nullptr) {
      dispatch_rank(width_,
                    [&](auto lanes, auto) { activation_bwd<lanes.value>(x, z, norm, count, width_); });
    }
    store_rows(d, x, first, count);
  }

  // Sums over rows that share the gate, then goes through the sigmoid where the caller left it to the scan.
  void finish_gate(const Tensor& d, const StepGradients::Target& x, const Stream& gate, double* dbias,
                   int64_t first, int64_t count) {
    const int64_t entries = d.size[3];
    for (int64_t t = 0; t < count && (entries < rank_ || m_.gate); ++t) {
      float* dx = x.at(t);
      for (int64_t i = 1; entries == 1 && i < rank_; ++i) dx[0] += dx[i];
      for (int64_t i = 0; m_.gate && i < entries; ++i) {
        dx[i] = sigmoid_bwd(dx[i], gate.at(t)[i]);
        if (dbias != nullptr) dbias[i] += dx[i];
      }
    }
    store_rows(d, x, first, count);
  }

  void zero_gradients(int64_t token) {
    for (const Tensor* d : {&p_.dmem_q, &p_.dmem_k, &p_.dmem_v, &p_.dbeta, &p_.dlam}) {
      if (*d) store_row(*d, x_.span.batch, token, x_.head, kZeros, d->size[3]);
    }
  }

  const DeltaScanBwdParams& p_;
  const Memory& m_;
  BiasParts& bias_;
  const int64_t rank_;
  const int width_;
  const int64_t state_size_, segment_;
  StepsLoader loader_;
  Buffer<float> state_, dstate_, history_, recalled_, gradients_;
  Buffer<Run> runs_;
  Sequence x_{};
  double* dbias_ = nullptr;  // of the segment in hand
};

void zero_tokens(const Tensor& d, int64_t first) {
  if (!d) return;
  for (int64_t b = 0; b < d.size[0]; ++b) {
    for (int64_t t = first; t < d.size[1]; ++t) {
      for (int64_t h = 0; h < d.size[2]; ++h) store_row(d, b, t, h, kZeros, d.size[3]);
    }
  }
}

// Sums the segments' parts (from `offset` in each on) in the order of rows and segments.
void sum_bias(const Tensor& d, const DeltaScanBwdParams& p, BiasParts& parts, int64_t items, int offset) {
  if (!d) return;
  for (int64_t h = 0; h < d.size[0]; ++h) {
    double sums[kMaxRank] = {};
    for (int64_t item = h; item < items; item += d.size[0]) {
      const Sequence x = sequence_of(p, item);
      for (int64_t s = 0; s < x.segments; ++s) {
        for (int64_t i = 0; i < d.size[1]; ++i) sums[i] += parts.at(x, s)[offset + i];
      }
    }
    for (int64_t i = 0; i < d.size[1]; ++i) d.at<float>(h)[i] = static_cast<float>(sums[i]);
  }
}

}  // namespace

void delta_scan_bwd(const DeltaScanBwdParams& p, int num_threads) {
  const Memory& m = p.fwd.memory;
  const Work work(p, num_threads);
  BiasParts bias(p, work);
  const int64_t parts = work.items * work.parts, threads = team(num_threads, parts);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    SegmentReverse thread(p, bias);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < parts; ++i) {
      const Sequence x = sequence_of(p, i % work.items);
      const int64_t begin = work.begin(x, i / work.items), end = work.begin(x, i / work.items + 1);
      if (begin < end || (x.segments == 0 && i < work.items)) thread.reverse_part(x, begin, end);
    }
  }
  sum_bias(p.dbeta_bias, p, bias, work.items, 0);
  sum_bias(p.dlam_bias, p, bias, work.items, kMaxRank);

  // What no run has filled: tokens past the last sequence, inputs that the rule does not take.
  const int64_t end = p.fwd.rows.cu_seqlens ? packed_end(p.fwd.rows) : m.mem_q.size[1];
  zero_tokens(p.dmem_q, end);
  for (const Tensor* d : {&p.dmem_k, &p.dmem_v, &p.dbeta}) zero_tokens(*d, m.write ? end : 0);
  zero_tokens(p.dlam, m.write && m.update_rule != UpdateRule::no_lambda ? end : 0);
}

}  // namespace deltamem::DELTAMEM_ISA
