// The table of one instruction set.
#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    DELTAMEM_STRING(DELTAMEM_ISA),
    delta_scan_fwd,
    delta_scan_bwd,
    delta_scan_with_state_pool,
    delta_prep_fwd,
    delta_prep_bwd,
    delta_prep_with_kvcache,
    delta_attention_fwd,
    delta_attention_bwd,
    delta_attention_with_kvcache,
    delta_decode,
    delta_output_fwd,
    delta_output_bwd,
};

}  // namespace deltamem::DELTAMEM_ISA
