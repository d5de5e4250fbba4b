// Gradients of the scan: segment after segment from the last, each replayed from its start state on the tape.
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

// One thread's pass over one row and head.
class RowReverse {
 public:
  RowReverse(const DeltaScanBwdParams& p, int64_t row, int64_t head, double* dbeta_bias, double* dlam_bias)
      : p_(p),
        m_(p.fwd.memory),
        row_(row),
        head_(head),
        rank_(m_.mem_q.size[3]),
        width_(padded_rank(rank_)),
        span_(row_span(p.fwd.rows, row, m_.mem_q.size[1])),
        segment_(min(p.fwd.segment_len, span_.length)),
        loader_(m_, segment_),
        state_(width_ * width_),
        dstate_(width_ * width_),
        history_(m_.write ? segment_ * width_ * width_ : 0),
        recalled_(segment_ * width_),
        gradients_(5 * segment_ * width_),
        runs_(2 * segment_),
        dbeta_bias_(dbeta_bias),
        dlam_bias_(dlam_bias) {}

  void run() {
    const int64_t L = p_.fwd.segment_len, segments = ceil_div(span_.length, L);
    const int64_t first = p_.fwd.rows.cu_seqlens ? span_.start / L + row_ : row_ * segments;
    load_state(p_.dfinal_state, row_, head_, rank_, dstate_);
    if (!m_.write) load_state(p_.fwd.initial_state, row_, head_, rank_, state_);
    for (int64_t s = segments - 1; s >= 0; --s) {
      if (m_.write) load_state(p_.fwd.tape, first + s, head_, rank_, state_);
      reverse_segment(span_.start + s * L, min(L, span_.length - s * L));
    }
    if (p_.dinitial_state) store_state(p_.dinitial_state, row_, head_, dstate_);
  }

 private:
  // Tokens [first, first + count): every run of unmasked tokens forward, then backward.
  void reverse_segment(int64_t first, int64_t count) {
    int64_t runs = 0, tokens = 0;
    Steps steps;
    for (int64_t t = first; t < first + count;) {
      const int64_t n = run_length(p_.fwd.rows, span_.batch, t, first + count - t);
      if (n == 0) {
        zero_gradients(t++);
        continue;
      }
      steps = loader_.load(span_.batch, t, n, head_);
      if (m_.write) {
        replay(m_.update_rule, state_, steps, n, history_ + tokens * width_ * width_,
               recalled_ + tokens * width_);
      }
      runs_[2 * runs] = t, runs_[2 * runs + 1] = n;
      ++runs, tokens += n, t += n;
    }
    for (int64_t r = runs - 1; r >= 0; --r) {
      const int64_t t = runs_[2 * r], n = runs_[2 * r + 1];
      if (r < runs - 1) steps = loader_.load(span_.batch, t, n, head_);
      tokens -= n;
      reverse_run(steps, t, n, tokens);
    }
  }

  void reverse_run(const Steps& steps, int64_t first, int64_t count, int64_t recorded) {
    Stream dreads{kZeros, 0};
    if (p_.dreads) dreads = loader_.rows(p_.dreads, span_.batch, first, count, head_);
    StepGradients to;
    to.q = target(p_.dmem_q, 0, first, m_.qk_activation);
    if (!m_.write) {
      reverse_read_only(dstate_, steps, count, state_, dreads, to);
      return finish_activated(p_.dmem_q, to.q, steps.q, steps.q_norm, first, count);
    }
    to.k = target(p_.dmem_k, 1, first, m_.qk_activation);
    to.v = target(p_.dmem_v, 2, first, false);
    to.beta = target(p_.dbeta, 3, first, m_.gate);
    if (steps.lam.data) to.lam = target(p_.dlam, 4, first, m_.gate);
    reverse(m_.update_rule, dstate_, steps, count, history_ + recorded * width_ * width_,
            recalled_ + recorded * width_, dreads, to);
    finish_activated(p_.dmem_q, to.q, steps.q, steps.q_norm, first, count);
    finish_activated(p_.dmem_k, to.k, steps.k, steps.k_norm, first, count);
    store_rows(p_.dmem_v, to.v, first, count);
    finish_gate(p_.dbeta, to.beta, steps.beta, dbeta_bias_, first, count);
    if (steps.lam.data) finish_gate(p_.dlam, to.lam, steps.lam, dlam_bias_, first, count);
  }

  // The result's own rows where they can take a gradient as the kernel leaves it, else scratch.
  StepGradients::Target target(const Tensor& d, int slot, int64_t first, bool unfinished) {
    if (!unfinished && d.dtype == DType::f32 && d.size[3] == width_) {
      return {d.at<float>(span_.batch, first, head_), d.stride[1]};
    }
    return {gradients_ + slot * segment_ * width_, width_};
  }

  bool in_place(const Tensor& d, const StepGradients::Target& x, int64_t first) {
    return d.dtype == DType::f32 && x.data == d.at<float>(span_.batch, first, head_);
  }

  void store_rows(const Tensor& d, const StepGradients::Target& x, int64_t first, int64_t count) {
    if (in_place(d, x, first)) return;
    const bool whole =
        d.size[3] == x.stride && d.stride[1] == x.stride;  // one stretch of memory on both sides
    if (whole) return store_row(d, span_.batch, first, head_, x.data, count * x.stride);
    for (int64_t t = 0; t < count; ++t) store_row(d, span_.batch, first + t, head_, x.at(t), d.size[3]);
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
    for (int64_t t = 0; t < count; ++t) {
      float* dx = x.at(t);
      for (int64_t i = 1; entries == 1 && i < rank_; ++i) dx[0] += dx[i];
      for (int64_t i = 0; m_.gate && i < entries; ++i) {
        dx[i] = sigmoid_bwd(dx[i], gate.at(t)[i]);
        dbias[i] += dx[i];
      }
    }
    store_rows(d, x, first, count);
  }

  void zero_gradients(int64_t token) {
    for (const Tensor* d : {&p_.dmem_q, &p_.dmem_k, &p_.dmem_v, &p_.dbeta, &p_.dlam}) {
      if (*d) store_row(*d, span_.batch, token, head_, kZeros, d->size[3]);
    }
  }

  const DeltaScanBwdParams& p_;
  const Memory& m_;
  const int64_t row_, head_, rank_;
  const int width_;
  const Span span_;
  const int64_t segment_;
  StepsLoader loader_;
  Buffer<float> state_, dstate_, history_, recalled_, gradients_;
  Buffer<int64_t> runs_;
  double *dbeta_bias_, *dlam_bias_;
};

void zero_tokens(const Tensor& d, int64_t first) {
  if (!d) return;
  for (int64_t b = 0; b < d.size[0]; ++b) {
    for (int64_t t = first; t < d.size[1]; ++t) {
      for (int64_t h = 0; h < d.size[2]; ++h) store_row(d, b, t, h, kZeros, d.size[3]);
    }
  }
}

// Sums the items' parts [rows, heads, kMaxRank] over the rows, in their order.
void sum_bias(const Tensor& d, const double* parts, int64_t rows) {
  if (!d) return;
  for (int64_t h = 0; h < d.size[0]; ++h) {
    for (int64_t i = 0; i < d.size[1]; ++i) {
      double sum = 0;
      for (int64_t row = 0; row < rows; ++row) sum += parts[(row * d.size[0] + h) * kMaxRank + i];
      d.at<float>(h)[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void delta_scan_bwd(const DeltaScanBwdParams& p, int num_threads) {
  const Memory& m = p.fwd.memory;
  const int64_t rows = num_rows(p.fwd.rows, m.mem_q.size[0]), heads = m.mem_q.size[2], items = rows * heads;
  Buffer<double> dbias(2 * items * kMaxRank);
  std::memset(dbias.data, 0, 2 * items * kMaxRank * sizeof(double));
  double *dbeta_bias = dbias.data, *dlam_bias = dbias.data + items * kMaxRank;
#pragma omp parallel for num_threads(team(num_threads, items)) schedule(dynamic) if (items > 1)
  for (int64_t item = 0; item < items; ++item) {
    RowReverse(p, item / heads, item % heads, dbeta_bias + item * kMaxRank, dlam_bias + item * kMaxRank)
        .run();
  }
  sum_bias(p.dbeta_bias, dbeta_bias, rows);
  sum_bias(p.dlam_bias, dlam_bias, rows);

  // What no run has filled: tokens past the last sequence, inputs that the rule does not take.
  const int64_t end = p.fwd.rows.cu_seqlens ? packed_end(p.fwd.rows) : m.mem_q.size[1];
  zero_tokens(p.dmem_q, end);
  for (const Tensor* d : {&p.dmem_k, &p.dmem_v, &p.dbeta}) zero_tokens(*d, m.write ? end : 0);
  zero_tokens(p.dlam, m.write && m.update_rule != UpdateRule::no_lambda ? end : 0);
}

}  // namespace deltamem::DELTAMEM_ISA
