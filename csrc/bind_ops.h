// The ops of a native module: arguments, in the order of the op schemas, into params, params to Backend::run,
// which has an overload for each and is called with the GIL held.
#pragma once

#include "bind.h"

namespace deltamem {

namespace bindings {

using T = Tensor;

inline DeltaPrepParams prep_params(T q, T k, T v, T reads, T delta_q, T delta_k, T delta_v, T q_norm,
                                   T k_norm, float norm_eps, T cos, T sin, bool interleaved, T positions,
                                   T cu_seqlens) {
  return {.q = q,
          .k = k,
          .v = v,
          .reads = reads,
          .on_q = {delta_q, q_norm},
          .on_k = {delta_k, k_norm},
          .on_v = {delta_v, {}},
          .norm_eps = norm_eps,
          .rotary = {cos, sin, interleaved, positions},
          .rows = {{}, cu_seqlens},
          .q_prep = {},
          .k_prep = {},
          .v_prep = {}};
}

inline DeltaAttentionParams attention_params(T q, T k, T v, T reads, T delta_q, T q_norm, float norm_eps,
                                             T cos, T sin, bool interleaved, T positions, T token_mask,
                                             T cu_seqlens, float scale, bool causal, int64_t window_left,
                                             int64_t window_right, float softcap, T out, T lse) {
  return {.q = q,
          .k = k,
          .v = v,
          .reads = reads,
          .on_q = {delta_q, q_norm},
          .norm_eps = norm_eps,
          .rotary = {cos, sin, interleaved, positions},
          .rows = {token_mask, cu_seqlens},
          .softmax = {scale, causal, window_left, window_right, softcap},
          .out = out,
          .lse = lse};
}

}  // namespace bindings

template <class Backend>
void bind_ops(pybind11::module_& m) {
  using namespace bindings;
  m.def("delta_scan_fwd",
        [](T mem_q, T mem_k, T mem_v, T beta, T lam, T initial_state, T token_mask, T cu_seqlens, T beta_bias,
           T lam_bias, UpdateRule rule, bool write, bool qk_activation, bool gate, int64_t segment_len,
           T reads, T final_state, T tape) {
          Backend::run(DeltaScanParams{
              {mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, rule, write, qk_activation, gate},
              {token_mask, cu_seqlens},
              initial_state,
              segment_len,
              reads,
              final_state,
              tape});
        });

  m.def("delta_scan_bwd",
        [](T dreads, T dfinal_state, T mem_q, T mem_k, T mem_v, T beta, T lam, T initial_state, T token_mask,
           T cu_seqlens, T beta_bias, T lam_bias, UpdateRule rule, bool write, bool qk_activation, bool gate,
           int64_t segment_len, T tape, T dmem_q, T dmem_k, T dmem_v, T dbeta, T dlam, T dinitial_state,
           T dbeta_bias, T dlam_bias) {
          Backend::run(DeltaScanBwdParams{
              {{mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, rule, write, qk_activation, gate},
               {token_mask, cu_seqlens},
               initial_state,
               segment_len,
               {},
               {},
               tape},
              dreads,
              dfinal_state,
              dmem_q,
              dmem_k,
              dmem_v,
              dbeta,
              dlam,
              dinitial_state,
              dbeta_bias,
              dlam_bias});
        });

  m.def("delta_scan_with_state_pool",
        [](T mem_q, T mem_k, T mem_v, T beta, T lam, T state_pool, T state_indices, T output_state_indices,
           T has_initial_state, T token_mask, T cu_seqlens, T beta_bias, T lam_bias, UpdateRule rule,
           bool write, bool qk_activation, bool gate, T reads) {
          Backend::run(DeltaScanPoolParams{
              {mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, rule, write, qk_activation, gate},
              {token_mask, cu_seqlens},
              {state_pool, state_indices, output_state_indices, has_initial_state},
              reads});
        });

  m.def("delta_prep_fwd",
        [](T q, T k, T v, T reads, T delta_q, T delta_k, T delta_v, T q_norm, T k_norm, float norm_eps, T cos,
           T sin, bool interleaved, T positions, T cu_seqlens, T q_prep, T k_prep, T v_prep) {
          auto params = prep_params(q, k, v, reads, delta_q, delta_k, delta_v, q_norm, k_norm, norm_eps, cos,
                                    sin, interleaved, positions, cu_seqlens);
          params.q_prep = q_prep, params.k_prep = k_prep, params.v_prep = v_prep;
          Backend::run(params);
        });

  m.def("delta_prep_bwd", [](T dq_prep, T dk_prep, T dv_prep, T q, T k, T v, T reads, T delta_q, T delta_k,
                             T delta_v, T q_norm, T k_norm, float norm_eps, T cos, T sin, bool interleaved,
                             T positions, T cu_seqlens, T dq, T dk, T dv, T dreads, T ddelta_q, T ddelta_k,
                             T ddelta_v, T dq_norm, T dk_norm, T dcos, T dsin) {
    Backend::run(DeltaPrepBwdParams{prep_params(q, k, v, reads, delta_q, delta_k, delta_v, q_norm, k_norm,
                                                norm_eps, cos, sin, interleaved, positions, cu_seqlens),
                                    dq_prep, dk_prep, dv_prep, dq, dk, dv, dreads, ddelta_q, ddelta_k,
                                    ddelta_v, dq_norm, dk_norm, dcos, dsin});
  });

  m.def("delta_prep_with_kvcache",
        [](T k, T v, T k_cache, T v_cache, T reads, T delta_k, T delta_v, T k_norm, float norm_eps, T cos,
           T sin, bool interleaved, T positions, T token_mask, T cu_seqlens, T cache_seqlens, T block_table,
           T state_indices) {
          DeltaPrepCacheParams params{prep_params({}, k, v, reads, {}, delta_k, delta_v, {}, k_norm, norm_eps,
                                                  cos, sin, interleaved, positions, cu_seqlens),
                                      {k_cache, v_cache, cache_seqlens, {}, block_table},
                                      state_indices};
          params.prep.rows.token_mask = token_mask;
          Backend::run(params);
        });

  m.def("delta_attention_fwd",
        [](T q, T k, T v, T reads, T delta_q, T q_norm, float norm_eps, T cos, T sin, bool interleaved,
           T positions, T token_mask, T cu_seqlens, float scale, bool causal, int64_t window_left,
           int64_t window_right, float softcap, T out, T lse) {
          Backend::run(attention_params(q, k, v, reads, delta_q, q_norm, norm_eps, cos, sin, interleaved,
                                        positions, token_mask, cu_seqlens, scale, causal, window_left,
                                        window_right, softcap, out, lse));
        });

  m.def("delta_attention_bwd",
        [](T dout, T q, T k, T v, T out, T lse, T token_mask, T cu_seqlens, float scale, bool causal,
           int64_t window_left, int64_t window_right, float softcap, T dq, T dk, T dv) {
          Backend::run(DeltaAttentionBwdParams{dout,
                                               q,
                                               k,
                                               v,
                                               out,
                                               lse,
                                               {token_mask, cu_seqlens},
                                               {scale, causal, window_left, window_right, softcap},
                                               dq,
                                               dk,
                                               dv});
        });

  m.def("delta_attention_with_kvcache", [](T q, T k_cache, T v_cache, T reads, T delta_q, T q_norm,
                                           float norm_eps, T cos, T sin, bool interleaved, T positions,
                                           T token_mask, T cu_seqlens, T cache_seqlens, T cache_leftpad,
                                           T block_table, T state_indices, bool appended, float scale,
                                           bool causal, int64_t window_left, int64_t window_right,
                                           float softcap, int64_t num_splits, T out, T lse) {
    Backend::run(DeltaAttentionCacheParams{
        attention_params(q, {}, {}, reads, delta_q, q_norm, norm_eps, cos, sin, interleaved, positions,
                         token_mask, cu_seqlens, scale, causal, window_left, window_right, softcap, out, lse),
        {k_cache, v_cache, cache_seqlens, cache_leftpad, block_table},
        state_indices,
        appended,
        num_splits});
  });

  m.def("delta_decode",
        [](T q, T k_cache, T v_cache, T k, T v, T mem_q, T mem_k, T mem_v, T beta, T lam, T state_pool,
           T state_indices, T output_state_indices, T has_initial_state, T beta_bias, T lam_bias,
           UpdateRule rule, bool write, bool qk_activation, bool gate, T delta_q, T delta_k, T delta_v,
           T q_norm, T k_norm, float norm_eps, T cos, T sin, bool interleaved, T positions, T token_mask,
           T cu_seqlens, T cache_seqlens, T cache_leftpad, T block_table, float scale, bool causal,
           int64_t window_left, int64_t window_right, float softcap, int64_t num_splits, T out, T reads,
           T lse) {
          Backend::run(DeltaDecodeParams{
              {attention_params(q, {}, {}, reads, delta_q, q_norm, norm_eps, cos, sin, interleaved, positions,
                                token_mask, cu_seqlens, scale, causal, window_left, window_right, softcap,
                                out, lse),
               {k_cache, v_cache, cache_seqlens, cache_leftpad, block_table},
               state_indices,
               static_cast<bool>(k),
               num_splits},
              {mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, rule, write, qk_activation, gate},
              {state_pool, state_indices, output_state_indices, has_initial_state},
              k,
              v,
              {delta_k, k_norm},
              {delta_v, {}}});
        });

  m.def("delta_output_fwd",
        [](T attn_proj, T reads, T delta_o, T rms_weight, float rms_eps, T residual, T y) {
          Backend::run(DeltaOutputParams{attn_proj, reads, delta_o, rms_weight, rms_eps, residual, y});
        });

  m.def("delta_output_bwd",
        [](T dy, T reads, T delta_o, T rms_weight, float rms_eps, T dreads, T ddelta_o, T drms_weight) {
          Backend::run(
              DeltaOutputBwdParams{dy, reads, delta_o, rms_weight, rms_eps, dreads, ddelta_o, drms_weight});
        });
}

}  // namespace deltamem
