#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {
void delta_attention_bwd(const DeltaAttentionBwdParams&, int) {}
}  // namespace deltamem::DELTAMEM_ISA
