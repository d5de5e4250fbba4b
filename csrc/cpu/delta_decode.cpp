#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {
void delta_decode(const DeltaDecodeParams&, int) {}
}  // namespace deltamem::DELTAMEM_ISA
