// The Python module deltamem_kernels._cpu: arguments into params, params into the table of the widest
// instruction set that this processor and operating system offer.
#define DELTAMEM_BIND_DEVICE ::deltamem::dlpack::kCPU
#include "bind.h"
#include "cpu/kernels.h"
#include "signature.h"

namespace py = pybind11;

namespace deltamem {

namespace portable {
extern const Kernels kernels;
}
#ifdef DELTAMEM_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif

namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

// Narrowest first.
const Choice* choices(int* count) {
  static const Choice all[] = {
      {&portable::kernels, true},
#ifdef DELTAMEM_X86
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&avx512::kernels, __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512dq")},
      {&avx512bf16::kernels, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl")},
#endif
  };
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

const Kernels* widest() {
  int count;
  const Choice* all = choices(&count);
  const Kernels* best = nullptr;
  for (int i = 0; i < count; ++i) {
    if (all[i].supported) best = all[i].kernels;
  }
  return best;
}

const Kernels* active = widest();

py::list supported_isas() {
  int count;
  const Choice* all = choices(&count);
  py::list names;
  for (int i = 0; i < count; ++i) {
    if (all[i].supported) names.append(all[i].kernels->isa);
  }
  return names;
}

void set_isa(const std::string& name) {
  int count;
  const Choice* all = choices(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].supported && name == all[i].kernels->isa) {
      active = all[i].kernels;
      return;
    }
  }
  throw py::value_error("set_isa: isa must be one that this processor supports, got '" + name + "'");
}

template <class Params>
void launch(void (*kernel)(const Params&, int), const Params& params, int num_threads) {
  py::gil_scoped_release nogil;
  kernel(params, num_threads < 1 ? 1 : num_threads);
}

using T = Tensor;

DeltaPrepParams prep_params(T q, T k, T v, T reads, T delta_q, T delta_k, T delta_v, T q_norm, T k_norm,
                            float norm_eps, T cos, T sin, bool interleaved, T positions, T cu_seqlens) {
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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() =
      "CPU kernels of deltamem_kernels. Called through deltamem_kernels.native, which checks nothing either.";
  m.def("isa", [] { return active->isa; });
  m.def("supported_isas", supported_isas);
  m.def("set_isa", set_isa);
  m.def("signature", signature);

  m.def("delta_scan_fwd",
        [](T mem_q, T mem_k, T mem_v, T beta, T lam, T initial_state, T token_mask, T cu_seqlens, T beta_bias,
           T lam_bias, UpdateRule rule, bool write, bool qk_activation, bool gate, int64_t segment_len,
           T reads, T final_state, T tape, int num_threads) {
          launch(active->delta_scan_fwd,
                 DeltaScanParams{
                     {mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, rule, write, qk_activation, gate},
                     {token_mask, cu_seqlens},
                     initial_state,
                     segment_len,
                     reads,
                     final_state,
                     tape},
                 num_threads);
        });

  m.def("delta_scan_bwd",
        [](T dreads, T dfinal_state, T mem_q, T mem_k, T mem_v, T beta, T lam, T initial_state, T token_mask,
           T cu_seqlens, T beta_bias, T lam_bias, UpdateRule rule, bool write, bool qk_activation, bool gate,
           int64_t segment_len, T tape, T dmem_q, T dmem_k, T dmem_v, T dbeta, T dlam, T dinitial_state,
           T dbeta_bias, T dlam_bias, int num_threads) {
          launch(active->delta_scan_bwd,
                 DeltaScanBwdParams{
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
                     dlam_bias},
                 num_threads);
        });

  m.def("delta_scan_with_state_pool",
        [](T mem_q, T mem_k, T mem_v, T beta, T lam, T state_pool, T state_indices, T output_state_indices,
           T has_initial_state, T token_mask, T cu_seqlens, T beta_bias, T lam_bias, UpdateRule rule,
           bool write, bool qk_activation, bool gate, T reads, int num_threads) {
          launch(active->delta_scan_with_state_pool,
                 DeltaScanPoolParams{
                     {mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, rule, write, qk_activation, gate},
                     {token_mask, cu_seqlens},
                     {state_pool, state_indices, output_state_indices, has_initial_state},
                     reads},
                 num_threads);
        });

  m.def("delta_prep_fwd", [](T q, T k, T v, T reads, T delta_q, T delta_k, T delta_v, T q_norm, T k_norm,
                             float norm_eps, T cos, T sin, bool interleaved, T positions, T cu_seqlens,
                             T q_prep, T k_prep, T v_prep, int num_threads) {
    auto params = prep_params(q, k, v, reads, delta_q, delta_k, delta_v, q_norm, k_norm, norm_eps, cos, sin,
                              interleaved, positions, cu_seqlens);
    params.q_prep = q_prep, params.k_prep = k_prep, params.v_prep = v_prep;
    launch(active->delta_prep_fwd, params, num_threads);
  });

  m.def("delta_prep_bwd", [](T dq_prep, T dk_prep, T dv_prep, T q, T k, T v, T reads, T delta_q, T delta_k,
                             T delta_v, T q_norm, T k_norm, float norm_eps, T cos, T sin, bool interleaved,
                             T positions, T cu_seqlens, T dq, T dk, T dv, T dreads, T ddelta_q, T ddelta_k,
                             T ddelta_v, T dq_norm, T dk_norm, T dcos, T dsin, int num_threads) {
    launch(active->delta_prep_bwd,
           DeltaPrepBwdParams{prep_params(q, k, v, reads, delta_q, delta_k, delta_v, q_norm, k_norm, norm_eps,
                                          cos, sin, interleaved, positions, cu_seqlens),
                              dq_prep, dk_prep, dv_prep, dq, dk, dv, dreads, ddelta_q, ddelta_k, ddelta_v,
                              dq_norm, dk_norm, dcos, dsin},
           num_threads);
  });

  m.def("delta_prep_with_kvcache",
        [](T k, T v, T k_cache, T v_cache, T reads, T delta_k, T delta_v, T k_norm, float norm_eps, T cos,
           T sin, bool interleaved, T positions, T token_mask, T cu_seqlens, T cache_seqlens, T block_table,
           T state_indices, int num_threads) {
          DeltaPrepCacheParams params{prep_params({}, k, v, reads, {}, delta_k, delta_v, {}, k_norm, norm_eps,
                                                  cos, sin, interleaved, positions, cu_seqlens),
                                      {k_cache, v_cache, cache_seqlens, {}, block_table},
                                      state_indices};
          params.prep.rows.token_mask = token_mask;
          launch(active->delta_prep_with_kvcache, params, num_threads);
        });

  m.def("delta_attention_fwd",
        [](T q, T k, T v, T reads, T delta_q, T q_norm, float norm_eps, T cos, T sin, bool interleaved,
           T positions, T token_mask, T cu_seqlens, float scale, bool causal, int64_t window_left,
           int64_t window_right, float softcap, T out, T lse, int num_threads) {
          launch(active->delta_attention_fwd,
                 DeltaAttentionParams{q,
                                      k,
                                      v,
                                      reads,
                                      {delta_q, q_norm},
                                      norm_eps,
                                      {cos, sin, interleaved, positions},
                                      {token_mask, cu_seqlens},
                                      {scale, causal, window_left, window_right, softcap},
                                      out,
                                      lse},
                 num_threads);
        });

  m.def("delta_attention_bwd",
        [](T dout, T q, T k, T v, T out, T lse, T token_mask, T cu_seqlens, float scale, bool causal,
           int64_t window_left, int64_t window_right, float softcap, T dq, T dk, T dv, int num_threads) {
          launch(active->delta_attention_bwd,
                 DeltaAttentionBwdParams{dout,
                                         q,
                                         k,
                                         v,
                                         out,
                                         lse,
                                         {token_mask, cu_seqlens},
                                         {scale, causal, window_left, window_right, softcap},
                                         dq,
                                         dk,
                                         dv},
                 num_threads);
        });

  m.def("delta_attention_with_kvcache",
        [](T q, T k_cache, T v_cache, T reads, T delta_q, T q_norm, float norm_eps, T cos, T sin,
           bool interleaved, T positions, T token_mask, T cu_seqlens, T cache_seqlens, T cache_leftpad,
           T block_table, T state_indices, bool appended, float scale, bool causal, int64_t window_left,
           int64_t window_right, float softcap, int64_t num_splits, T out, T lse, int num_threads) {
          launch(active->delta_attention_with_kvcache,
                 DeltaAttentionCacheParams{{q,
                                            {},
                                            {},
                                            reads,
                                            {delta_q, q_norm},
                                            norm_eps,
                                            {cos, sin, interleaved, positions},
                                            {token_mask, cu_seqlens},
                                            {scale, causal, window_left, window_right, softcap},
                                            out,
                                            lse},
                                           {k_cache, v_cache, cache_seqlens, cache_leftpad, block_table},
                                           state_indices,
                                           appended,
                                           num_splits},
                 num_threads);
        });

  m.def("delta_decode",
        [](T q, T k_cache, T v_cache, T k, T v, T mem_q, T mem_k, T mem_v, T beta, T lam, T state_pool,
           T state_indices, T output_state_indices, T has_initial_state, T beta_bias, T lam_bias,
           UpdateRule rule, bool write, bool qk_activation, bool gate, T delta_q, T delta_k, T delta_v,
           T q_norm, T k_norm, float norm_eps, T cos, T sin, bool interleaved, T positions, T token_mask,
           T cu_seqlens, T cache_seqlens, T cache_leftpad, T block_table, float scale, bool causal,
           int64_t window_left, int64_t window_right, float softcap, int64_t num_splits, T out, T reads,
           T lse, int num_threads) {
          launch(active->delta_decode,
                 DeltaDecodeParams{
                     {{q,
                       {},
                       {},
                       reads,
                       {delta_q, q_norm},
                       norm_eps,
                       {cos, sin, interleaved, positions},
                       {token_mask, cu_seqlens},
                       {scale, causal, window_left, window_right, softcap},
                       out,
                       lse},
                      {k_cache, v_cache, cache_seqlens, cache_leftpad, block_table},
                      state_indices,
                      static_cast<bool>(k),
                      num_splits},
                     {mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, rule, write, qk_activation, gate},
                     {state_pool, state_indices, output_state_indices, has_initial_state},
                     k,
                     v,
                     {delta_k, k_norm},
                     {delta_v, {}}},
                 num_threads);
        });

  m.def("delta_output_fwd",
        [](T attn_proj, T reads, T delta_o, T rms_weight, float rms_eps, T residual, T y, int num_threads) {
          launch(active->delta_output_fwd,
                 DeltaOutputParams{attn_proj, reads, delta_o, rms_weight, rms_eps, residual, y}, num_threads);
        });

  m.def("delta_output_bwd", [](T dy, T reads, T delta_o, T rms_weight, float rms_eps, T dreads, T ddelta_o,
                               T drms_weight, int num_threads) {
    launch(active->delta_output_bwd,
           DeltaOutputBwdParams{dy, reads, delta_o, rms_weight, rms_eps, dreads, ddelta_o, drms_weight},
           num_threads);
  });
}

}  // namespace deltamem
