#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {
void delta_prep_bwd(const DeltaPrepBwdParams&, int) {}
}  // namespace deltamem::DELTAMEM_ISA
