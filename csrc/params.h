// What crosses from the bindings to a kernel, one struct per op family. Letters as in the Python API:
// B batch, T tokens, N packed sequences, P pool slots, HQ / HKV heads, D head size, H state heads, R rank.
// Strides are in elements. "Optional" tensors have data == nullptr when absent.
#pragma once

#include "tensor.h"

namespace deltamem {

enum class UpdateRule : int8_t { standard, lambda_outside, no_lambda };

// Rows of a call: dense [B, T] rows, or packed sequences (B == 1) cut by cu_seqlens.
struct Rows {
  Tensor token_mask;  // [B, T] bool, optional
  Tensor cu_seqlens;  // [N + 1] int32, optional
};

struct Memory {
  Tensor mem_q;                // [B, T, H, R]
  Tensor mem_k, mem_v;         // [B, T, H, R], optional when nothing is written
  Tensor beta, lam;            // [B, T, H, R] or [B, T, H, 1]; lam optional: 1 - beta
  Tensor beta_bias, lam_bias;  // [H, R or 1] fp32, optional
  UpdateRule update_rule = UpdateRule::standard;
  bool write = true;
  bool qk_activation = false;  // mem_q, mem_k are raw: l2norm(tanh(x)) here
  bool gate = false;           // beta, lam are logits: sigmoid(x + bias) here
};

struct StatePool {
  Tensor state_pool;            // [P, H, R, R] fp32
  Tensor state_indices;         // [B or N] int32, optional: row b uses slot b; < 0 is padding
  Tensor output_state_indices;  // [B or N] or [B, T] int32, optional: state_indices
  Tensor has_initial_state;     // [B or N] bool, optional: true
};

struct Rotary {
  Tensor cos, sin;  // [S, rotary_dim/2] by position or [B, T, rotary_dim/2] gathered, optional
  bool interleaved = false;
  Tensor positions;  // [B, T] int32, optional
};

// q' = RoPE(RMSNorm(q + delta reads))
struct Correction {
  Tensor delta;  // [heads * D, H * R], optional
  Tensor norm;   // [D], optional
};

struct Cache {
  Tensor k_cache, v_cache;  // [B, S, HKV, D] or [pages, page_size, HKV, D]
  Tensor cache_seqlens;     // [B or N] int32
  Tensor cache_leftpad;     // [B or N] int32, optional
  Tensor block_table;       // [B or N, max_pages] int32, optional
};

struct Softmax {
  float scale = 1.0f;
  bool causal = true;
  int64_t window_left = -1;   // -1: unbounded
  int64_t window_right = -1;  // -1: unbounded
  float softcap = 0.0f;       // 0: off
};

struct DeltaScanParams {
  Memory memory;
  Rows rows;
  Tensor initial_state;  // [B or N, H, R, R] fp32, optional: 0
  int64_t segment_len = 0;
  Tensor reads;        // [B, T, H, R] fp32
  Tensor final_state;  // [B or N, H, R, R] fp32
  Tensor tape;         // [S, H, R, R] fp32 start states of the segments, optional
};

struct DeltaScanPoolParams {
  Memory memory;
  Rows rows;
  StatePool pool;
  Tensor reads;  // [B, T, H, R] fp32
};

struct DeltaScanBwdParams {
  DeltaScanParams fwd;          // reads and final_state unset; tape as saved by the forward pass
  Tensor dreads, dfinal_state;  // optional: 0
  Tensor dmem_q, dmem_k, dmem_v, dbeta, dlam;  // as their inputs
  Tensor dinitial_state;                       // [B or N, H, R, R] fp32
  Tensor dbeta_bias, dlam_bias;                // [H, R or 1] fp32
};

struct DeltaPrepParams {
  Tensor q, k, v;               // [B, T, heads, D], each optional
  Tensor reads;                 // [B, T, H, R] fp32, optional
  Correction on_q, on_k, on_v;  // on_v.norm is never set
  float norm_eps = 1e-6f;
  Rotary rotary;
  Rows rows;
  Tensor q_prep, k_prep, v_prep;
};

struct DeltaPrepBwdParams {
  DeltaPrepParams fwd;               // the *_prep outputs unset
  Tensor dq_prep, dk_prep, dv_prep;  // each optional: 0
  Tensor dq, dk, dv;
  Tensor dreads;  // [B, T, H, R] fp32
  Tensor ddelta_q, ddelta_k, ddelta_v, dq_norm, dk_norm;
  Tensor drotary_cos, drotary_sin;  // [B, T, rotary_dim/2] fp32, optional
};

struct DeltaPrepCacheParams {
  DeltaPrepParams prep;  // k and v given; the *_prep outputs unset
  Cache cache;
  Tensor state_indices;  // [B or N] int32, optional: < 0 is padding
};

struct DeltaAttentionParams {
  Tensor q;     // [B, T, HQ, D]
  Tensor k, v;  // [B, T, HKV, D]
  Tensor reads;
  Correction on_q;
  float norm_eps = 1e-6f;
  Rotary rotary;
  Rows rows;
  Softmax softmax;
  Tensor out;  // [B, T, HQ, D]
  Tensor lse;  // [B, HQ, T] fp32
};

struct DeltaAttentionCacheParams {
  DeltaAttentionParams attention;  // k and v unset
  Cache cache;
  Tensor state_indices;   // [B or N] int32, optional: < 0 is padding
  bool appended = false;  // this call's keys stand at cache_seqlens + i
  int64_t num_splits = 0;
};

struct DeltaAttentionBwdParams {
  Tensor dout, q, k, v, out, lse;  // q, k, v prepared
  Rows rows;
  Softmax softmax;
  Tensor dq, dk, dv;
};

struct DeltaDecodeParams {
  DeltaAttentionCacheParams attention;
  Memory memory;  // mem_q absent: no memory
  StatePool pool;
  Tensor k, v;  // [B, T, HKV, D], optional: nothing is appended
  Correction on_k, on_v;
};

struct DeltaOutputParams {
  Tensor attn_proj;   // [B, T, hidden]
  Tensor reads;       // [B, T, H, R] fp32
  Tensor delta_o;     // [hidden, H * R]
  Tensor rms_weight;  // [hidden], optional
  float rms_eps = 1e-6f;
  Tensor residual;  // [B, T, hidden], optional
  Tensor y;         // [B, T, hidden]; may be attn_proj or residual
};

struct DeltaOutputBwdParams {
  Tensor dy, reads, delta_o, rms_weight;
  float rms_eps = 1e-6f;
  Tensor dreads, ddelta_o, drms_weight;
};

}  // namespace deltamem
