#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {
void delta_attention_fwd(const DeltaAttentionParams&, int) {}
void delta_attention_with_kvcache(const DeltaAttentionCacheParams&, int) {}
}  // namespace deltamem::DELTAMEM_ISA
