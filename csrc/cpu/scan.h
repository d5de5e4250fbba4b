// The parts of the delta-rule scan: what a token brings (Steps), what a row and head carry (a state), and the
// kernels that take one over the other. delta_decode advances rows of a pool through scan_pool_row.
#pragma once

#include "cpu/row_vectors.h"
#include "cpu/rows.h"
#include "delta_rule.h"

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

// Up to kBlock unmasked tokens of one row and head, activated, with the update rule resolved. Rows are padded
// with zeros to `width` floats.
struct Steps {
  int width = 0;
  Stream q, k, v, keep, erase, write;
  Stream beta, lam;                          // what keep and erase were made from; lam unset when coupled
  const float *kk = nullptr, *kq = nullptr;  // k_t . k_{t+1} and k_t . q_{t+1} of tokens t = 0, 2, 4, ...
};

// Scratch of one thread: the rows that Steps point to where the caller's tensors cannot serve as they are.
class StepsLoader {
 public:
  StepsLoader(const Memory& memory, int64_t tokens);

  // Prepares tokens [first, first + count) of batch row `batch`, count <= min(tokens, kBlock); valid until
  // the next.
  Steps load(int64_t batch, int64_t first, int64_t count, int64_t head);

 private:
  float* take(int64_t count);
  Stream rows(const Tensor& t, int64_t batch, int64_t first, int64_t count, int64_t head, bool fresh);
  Stream activated(const Tensor& t, int64_t batch, int64_t first, int64_t count, int64_t head);
  Stream gate(const Tensor& t, const Tensor& bias, int64_t batch, int64_t first, int64_t count, int64_t head);
  void resolve_gates(Steps& steps, int64_t count);
  void multiply_pairs(Steps& steps, int64_t count);

  const Memory& memory_;
  int64_t rank_, block_;
  int width_;
  Buffer<float> scratch_;
  int64_t used_ = 0;
};

// A state during a scan: column j (key channel) stands at state + j * width, padded with zeros to [width,
// width].
void load_state(const Tensor& source, int64_t i0, int64_t i1, int64_t rank,
                float* state);  // source absent: zeros
void store_state(const Tensor& target, int64_t i0, int64_t i1, const float* state);

// state <- state after `count` tokens; reads[t * stride ...] <- what token t reads (width floats each).
void advance(float* state, const Steps& steps, int64_t count, float* reads, int64_t stride);
// reads only: every token reads `state`.
void read_only(const float* state, const Steps& steps, int64_t count, float* reads, int64_t stride);

// What one thread needs to scan rows of up to `tokens` tokens.
struct ScanScratch {
  StepsLoader loader;
  Buffer<float> state, reads;
  ScanScratch(const Memory& memory, int64_t tokens);
};

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
