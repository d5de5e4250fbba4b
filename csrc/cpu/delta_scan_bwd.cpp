#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {
void delta_scan_bwd(const DeltaScanBwdParams&, int) {}
}  // namespace deltamem::DELTAMEM_ISA
