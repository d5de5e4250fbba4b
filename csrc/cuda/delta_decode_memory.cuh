// The state over a row's few tokens. A row of S is a recurrence of its own: a few lanes hold it, many rows go
// by at once, and every block that attends the row replays it, so that none waits for another. Which of them
// stores the new state, delta_decode.cu says.
#pragma once

#include "cuda/delta_decode_schedule.cuh"
#include "delta_rule.h"

namespace deltamem::cuda::decode {

inline constexpr int kRowLanes = 8;                // of a row of S
inline constexpr int kPer = kMaxRank / kRowLanes;  // columns of a lane, at most

DELTAMEM_DEVICE float sum_of_row(float x) {
#pragma unroll
  for (int distance = 1; distance < kRowLanes; distance *= 2) x += ptx::shfl_xor(x, distance);
  return x;
}

DELTAMEM_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Row i of state head h of one token's operands, as they lie in memory; the lane's columns of q and k.
struct Step {
  float q[kPer], k[kPer], v, beta, lam;
};

class StepLoader {
 public:
  DELTAMEM_DEVICE StepLoader(const Memory& memory, int h, int i, int R)
      : m_(memory), h_(h), i_(i), R_(R), lane_(ptx::lane() % kRowLanes) {}

  // Column of the lane's element n; past R, it is 0.
  DELTAMEM_DEVICE int column(int n) const { return lane_ + kRowLanes * n; }

  DELTAMEM_DEVICE Step load(int64_t batch, int64_t t) const {
    Step x = {};
    load_columns(m_.mem_q, batch, t, x.q);
    if (!m_.write) return x;
    load_columns(m_.mem_k, batch, t, x.k);
    x.v = load_float(m_.mem_v, m_.mem_v.offset(batch, t, h_) + i_);
    x.beta = load_gate(m_.beta, batch, t);
    if (has_lam()) x.lam = load_gate(m_.lam, batch, t);
    return x;
  }

  // What token x reads from s, the lane's part of S, which then is that after the token.
  DELTAMEM_DEVICE float step(Step& x, float (&s)[kPer]) const {
    activate(x);
    const float read = dot(s, x.q);
    if (!m_.write) return read;
    const Gates<float> g = gates(m_.update_rule, x.beta, x.lam);
    const float change = g.write * x.v - g.erase * dot(s, x.k);
#pragma unroll
    for (int n = 0; n < kPer; ++n) s[n] = g.keep * s[n] + change * x.k[n];
    return read;
  }

 private:
  DELTAMEM_DEVICE static float dot(const float (&s)[kPer], const float (&x)[kPer]) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kPer; ++n) sum += s[n] * x[n];
    return sum_of_row(sum);
  }

  DELTAMEM_DEVICE void activate(Step& x) const {
    if (m_.qk_activation) {
      activate_columns(x.q);
      if (m_.write) activate_columns(x.k);
    }
    if (m_.gate && m_.write) {
      x.beta = sigmoid(x.beta + load_bias(m_.beta_bias));
      if (has_lam()) x.lam = sigmoid(x.lam + load_bias(m_.lam_bias));
    }
    if (!has_lam()) x.lam = 1.0f - x.beta;
  }

  DELTAMEM_DEVICE bool has_lam() const { return m_.lam && m_.update_rule != UpdateRule::no_lambda; }

  DELTAMEM_DEVICE void load_columns(const Tensor& x, int64_t batch, int64_t t, float (&y)[kPer]) const {
    const int64_t offset = x.offset(batch, t, h_);
#pragma unroll
    for (int n = 0; n < kPer; ++n) y[n] = column(n) < R_ ? load_float(x, offset + column(n)) : 0.0f;
  }
  // Of the row, or shared by the rows.
  DELTAMEM_DEVICE float load_gate(const Tensor& x, int64_t batch, int64_t t) const {
    return load_float(x, x.offset(batch, t, h_) + (x.size[3] > 1 ? i_ : 0));
  }
  DELTAMEM_DEVICE float load_bias(const Tensor& bias) const {
    return bias ? bias.at<float>(h_)[bias.size[1] > 1 ? i_ : 0] : 0.0f;
  }
  // l2norm(tanh(x))
  DELTAMEM_DEVICE void activate_columns(float (&x)[kPer]) const {
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < kPer; ++n) x[n] = tanhf(x[n]), squares += x[n] * x[n];
    const float scale = 1.0f / max(sqrtf(sum_of_row(squares)), kL2NormEps);
#pragma unroll
    for (int n = 0; n < kPer; ++n) x[n] *= scale;
  }

  const Memory& m_;
  const int h_, i_, R_, lane_;
};

// Where the states after the tokens go.
struct StateTargets {
  const StatePool& pool;
  const Row& row;

  DELTAMEM_DEVICE int64_t source() const {
    return pool.state_indices ? *pool.state_indices.at<int32_t>(row.number) : row.number;
  }
  DELTAMEM_DEVICE bool is_loaded() const {
    return source() >= 0 && (!pool.has_initial_state || *pool.has_initial_state.at<bool>(row.number));
  }
  DELTAMEM_DEVICE bool each_token() const {
    return pool.output_state_indices && pool.output_state_indices.ndim == 2;
  }
  // Slot of the state after token t, or after the last one; negative: it is not stored.
  DELTAMEM_DEVICE int64_t target(int t) const {
    if (source() < 0 || !pool.output_state_indices) return source();
    return each_token() ? *pool.output_state_indices.at<int32_t>(row.batch, row.start + t)
                        : *pool.output_state_indices.at<int32_t>(row.number);
  }
};

// reads [tokens, HR], in shared memory, of the row's tokens. Or it stores: the tokens' reads and states go
// into the caller's tensors instead, zeros for masked tokens' reads; no other block may then read the state.
DELTAMEM_DEVICE void replay(const Argument& call, const Row& row, float* reads, bool stores) {
  const Memory& memory = call.p.memory;
  const int R = static_cast<int>(memory.mem_q.size[3]), tokens = row.tokens,
            length = stores ? row.length : tokens;
  const StateTargets targets{call.p.pool, row};
  for (int first = 0; first < call.HR; first += kThreads / kRowLanes) {
    const int r = first + ptx::thread() / kRowLanes, h = min(r, call.HR - 1) / R, i = min(r, call.HR - 1) % R;
    const bool is_row = r < call.HR, speaks = is_row && ptx::lane() % kRowLanes == 0;
    const StepLoader loader(memory, h, i, R);
    float s[kPer] = {};
    if (is_row && targets.is_loaded()) {  // idle lanes stay away from rows that others store
      const float* source = call.p.pool.state_pool.at<float>(targets.source(), h, i);
#pragma unroll
      for (int n = 0; n < kPer; ++n) {
        if (loader.column(n) < R) s[n] = source[loader.column(n)];
      }
    }
    Step next = {};
    for (int t = -1; t < length; ++t) {  // a token's operands come while the one before is worked on
      Step x = next;
      if (t + 1 < tokens) next = loader.load(row.batch, row.start + t + 1);
      float read = 0.0f;
      if (t >= 0 && t < tokens) read = loader.step(x, s);
      if (!stores && t >= 0 && speaks) reads[t * call.HR + r] = read;
      if (!stores || !is_row) continue;
      if (t >= 0 && speaks) call.p.attention.attention.reads.at<float>(row.batch, row.start + t, h)[i] = read;
      if (targets.each_token() ? t < 0 : t < length - 1) continue;
      const int64_t slot = targets.target(t);
      if (slot < 0) continue;
      float* target = call.p.pool.state_pool.at<float>(slot, h, i);
#pragma unroll
      for (int n = 0; n < kPer; ++n) {
        if (loader.column(n) < R) target[loader.column(n)] = s[n];
      }
    }
  }
}

}  // namespace deltamem::cuda::decode
