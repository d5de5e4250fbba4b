// The parts of the delta-rule scan: what a token brings (Steps), what a row and head carry (a state), and the
// kernels that take one over the other. delta_decode advances rows of a pool through scan_pool_row.
#pragma once

#include "cpu/row_vectors.h"
#include "delta_rule.h"
#include "rows.h"

namespace deltamem::DELTAMEM_ISA {

// Tokens whose inputs are prepared at once: they stay in the first-level cache until the recurrence takes
// them.
inline constexpr int64_t kBlock = 64;

// One fp32 row of `width` floats per token.
struct Stream {
  const float* data = nullptr;
  int64_t stride = 0;
  const float* at(int64_t t) const { return data + t * stride; }
};

// A run of unmasked tokens of one row and head, activated. Rows are padded with zeros to `width` floats.
struct Steps {
  int width = 0;
  Stream q, k, v, beta, lam;     // lam unset when coupled, and with no_lambda
  const float* pairs = nullptr;  // for tokens t = 0, 2, 4 ..: k_t . k_{t+1} at t, k_t . q_{t+1} at t + 1
  // max(|tanh x|, eps) of each token's q and k; unset when they came activated
  const float *q_norm = nullptr, *k_norm = nullptr;
};

// Scratch of one thread: the rows that Steps point to where the caller's tensors cannot serve as they are.
class StepsLoader {
 public:
  // For runs of at most `block` tokens.
  StepsLoader(const Memory& memory, int64_t block);

  // Prepares tokens [first, first + count) of batch row `batch`; valid until the next call.
  Steps load(int64_t batch, int64_t first, int64_t count, int64_t head);

  // Rows of one more tensor of the same tokens, valid as long as the Steps loaded before.
  Stream rows(const Tensor& t, int64_t batch, int64_t first, int64_t count, int64_t head, bool fresh = false);

 private:
  float* take(int64_t count);
  Stream activated(const Tensor& t, int64_t batch, int64_t first, int64_t count, int64_t head,
                   const float** norm);
  Stream gate(const Tensor& t, const Tensor& bias, int64_t batch, int64_t first, int64_t count, int64_t head);
  void multiply_pairs(Steps& steps, int64_t count);

  const Memory& memory_;
  int64_t rank_;
  int width_;
  Buffer<float> scratch_;
  int64_t used_ = 0;
};

// A state during a scan: column j (key channel) at state + j * width, zeros up to [width, width]. An absent
// source is zeros.
void load_state(const Tensor& source, int64_t i0, int64_t i1, int64_t rank, float* state);
void store_state(const Tensor& target, int64_t i0, int64_t i1, const float* state);

// state <- state after `count` tokens; reads[t * stride ...] <- what token t reads (width floats each).
void advance(UpdateRule rule, float* state, const Steps& steps, int64_t count, float* reads, int64_t stride);
// reads only: every token reads `state`.
void read_only(const float* state, const Steps& steps, int64_t count, float* reads, int64_t stride);

// As advance, for the backward pass: history[t] <- the state before token t, recalled[t * width ...] <-
// S_{t-1} k_t.
void replay(UpdateRule rule, float* state, const Steps& steps, int64_t count, float* history,
            float* recalled);

// Where the gradients of a run go: rows of `width` floats. lam unset when coupled, and with no_lambda.
struct StepGradients {
  struct Target {
    float* data = nullptr;
    int64_t stride = 0;
    float* at(int64_t t) const { return data + t * stride; }
  };
  Target q, k, v, beta, lam;
};

// dstate, of the state after the run -> of the state before it. beta and lam gradients are of the gates
// themselves; a coupled beta's is total. Fetches the `count` tokens before into the cache.
void reverse(UpdateRule rule, float* dstate, const Steps& steps, int64_t count, const float* history,
             const float* recalled, const Stream& dreads, const StepGradients& out);
// The gradient of the state alone, the same to the bit.
void carry(UpdateRule rule, float* dstate, const Steps& steps, int64_t count, const Stream& dreads);
// Of reads = S q with one S: dq, and what the run adds to dstate.
void reverse_read_only(const Steps& steps, int64_t count, const float* state, const Stream& dreads,
                       const StepGradients& out);
void carry_read_only(float* dstate, const Steps& steps, int64_t count, const Stream& dreads);

// What one thread needs to scan rows of up to `tokens` tokens.
struct ScanScratch {
  StepsLoader loader;
  Buffer<float> state, reads;
  ScanScratch(const Memory& memory, int64_t tokens);
};

// Unmasked tokens from `first` on, at most `count`.
int64_t run_length(const Rows& rows, int64_t batch, int64_t first, int64_t count);

// Takes scratch.state over tokens [first, first + count) of batch row `batch` and fills their rows of
// `reads`. Masked tokens read 0 and touch nothing.
void scan_tokens(const Memory& memory, const Rows& rows, int64_t batch, int64_t first, int64_t count,
                 int64_t head, const Tensor& reads, ScanScratch& scratch);

// Advances all heads of one row (dense or packed) over its pool slot and fills the row's reads, serially.
// A padding row (state index < 0) reads 0 and stores nothing. No other thread may use the row's slots
// meanwhile.
void scan_pool_row(const Memory& memory, const Rows& rows, const StatePool& pool, const Tensor& reads,
                   int64_t row);

// reads <- 0 for the tokens of a packed batch that belong to no sequence.
void zero_reads_past_end(const Rows& rows, const Tensor& reads);

}  // namespace deltamem::DELTAMEM_ISA
