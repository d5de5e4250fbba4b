// Stands in for ops that are on their way; goes when the last one is there.
#include "cuda/launch.cuh"

namespace deltamem::cuda {

#define DELTAMEM_ON_ITS_WAY(op, Params)                        \
  __attribute__((weak)) void op(const Params&, Call&) {        \
    throw Failure("deltamem_kernels: " #op ": is on its way"); \
  }

DELTAMEM_ON_ITS_WAY(delta_scan_fwd, DeltaScanParams)
DELTAMEM_ON_ITS_WAY(delta_scan_bwd, DeltaScanBwdParams)
DELTAMEM_ON_ITS_WAY(delta_scan_with_state_pool, DeltaScanPoolParams)
DELTAMEM_ON_ITS_WAY(delta_prep_fwd, DeltaPrepParams)
DELTAMEM_ON_ITS_WAY(delta_prep_bwd, DeltaPrepBwdParams)
DELTAMEM_ON_ITS_WAY(delta_prep_with_kvcache, DeltaPrepCacheParams)
DELTAMEM_ON_ITS_WAY(delta_attention_fwd, DeltaAttentionParams)
DELTAMEM_ON_ITS_WAY(delta_attention_bwd, DeltaAttentionBwdParams)
DELTAMEM_ON_ITS_WAY(delta_attention_with_kvcache, DeltaAttentionCacheParams)
DELTAMEM_ON_ITS_WAY(delta_decode, DeltaDecodeParams)
DELTAMEM_ON_ITS_WAY(delta_output_fwd, DeltaOutputParams)
DELTAMEM_ON_ITS_WAY(delta_output_bwd, DeltaOutputBwdParams)

}  // namespace deltamem::cuda
