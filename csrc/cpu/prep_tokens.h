// What the passes of delta_prep share: its projections, and its tokens in blocks.
#pragma once

#include "cpu/correction.h"
#include "rows.h"

namespace deltamem::DELTAMEM_ISA {

// Tokens that a thread takes at a time while the heads go by: each is one stream through memory, and a head's
// weights are loaded once for all. Measured with 40 heads of 128: 4 to 8 are best, 16 and more half as fast
// (rows of one head lie pages apart), 1 a third slower (the weights come from the second-level cache each
// time).
inline constexpr int kTokenBlock = 4;

// One of q, k, v; heads is 0 if it is absent.
struct Projection {
  Tensor x;
  bool rotated;
  int64_t heads;
  CorrectionWeights weights;

  Projection(const Tensor& x, const Correction& correction, bool rotated, const DeltaPrepParams& p,
             bool convert_all, int num_threads)
      : x(x),
        rotated(rotated),
        heads(x ? x.size[2] : 0),
        weights(x ? correction : Correction{}, heads, x.size[3],
                p.reads ? p.reads.size[2] * p.reads.size[3] : 0, p.norm_eps, convert_all, num_threads) {}
};

struct Projections {
  Projection q, k, v;

  Projections(const DeltaPrepParams& p, bool convert_all, int num_threads)
      : q(p.q, p.on_q, true, p, convert_all, num_threads),
        k(p.k, p.on_k, true, p, convert_all, num_threads),
        v(p.v, p.on_v, false, p, convert_all, num_threads) {}

  int64_t heads() const { return q.heads + k.heads + v.heads; }
  int64_t scratch_size() const {
    return max(q.weights.scratch_size(), max(k.weights.scratch_size(), v.weights.scratch_size()));
  }
};

inline const Tensor& any_input(const DeltaPrepParams& p) { return p.q ? p.q : p.k ? p.k : p.v; }

inline int64_t largest_head_size(const DeltaPrepParams& p) {
  return max(p.q.size[3], max(p.k.size[3], p.v.size[3]));
}

struct Token {
  int64_t batch = 0, t = 0;
  int64_t row = 0;    // its sequence
  int64_t index = 0;  // in the row
  bool live = false;  // dead: past the last packed sequence, and whatever its pass leaves out
  TokenInputs inputs;
};

// The tokens of a call in blocks, numbered through the batch.
class TokenBlocks {
 public:
  // first_position: [rows] int32, a row's position of token 0; absent: 0.
  TokenBlocks(const DeltaPrepParams& p, const Tensor& first_position, const Tensor& state_indices)
      : p_(p),
        first_position_(first_position),
        state_indices_(state_indices),
        T_(any_input(p).size[1]),
        tokens_(any_input(p).size[0] * T_),
        scratch_size_(token_scratch_size(p.reads, p.rotary)) {}

  int64_t tokens() const { return tokens_; }
  int64_t count() const { return ceil_div(tokens_, kTokenBlock); }
  int64_t scratch_size() const { return kTokenBlock * scratch_size_; }

  // Fills block; returns its length.
  int fill(int64_t number, Token* block, float* scratch) const {
    const int64_t first = number * kTokenBlock;
    const int length = static_cast<int>(min<int64_t>(kTokenBlock, tokens_ - first));
    for (int i = 0; i < length; ++i) block[i] = token(first + i, scratch + i * scratch_size_);
    return length;
  }

 private:
  Token token(int64_t number, float* scratch) const {
    Token token;
    token.batch = number / T_, token.t = number % T_;
    token.row = row_of(p_.rows, token.batch, token.t);
    token.live =
        token.row >= 0 && !is_masked(p_.rows, token.batch, token.t) && !is_padding(state_indices_, token.row);
    if (!token.live) return token;
    token.index = token.t - row_span(p_.rows, token.row, T_).start;
    const int64_t position = token.index + (first_position_ ? *first_position_.at<int32_t>(token.row) : 0);
    token.inputs = token_inputs(p_.reads, p_.rotary, token.batch, token.t, position, scratch);
    return token;
  }

  const DeltaPrepParams& p_;
  Tensor first_position_, state_indices_;
  int64_t T_, tokens_, scratch_size_;
};

}  // namespace deltamem::DELTAMEM_ISA
