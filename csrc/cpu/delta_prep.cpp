#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {
void delta_prep_fwd(const DeltaPrepParams&, int) {}
void delta_prep_with_kvcache(const DeltaPrepCacheParams&, int) {}
}  // namespace deltamem::DELTAMEM_ISA
