#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {
void delta_scan_fwd(const DeltaScanParams&, int) {}
void delta_scan_with_state_pool(const DeltaScanPoolParams&, int) {}
}  // namespace deltamem::DELTAMEM_ISA
