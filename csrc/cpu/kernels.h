// The CPU kernels of one instruction set, as a table: every source in this folder is compiled once per
// instruction set (DELTAMEM_ISA names it and the namespace), and module.cpp picks a table at run time.
#pragma once

#include "params.h"

namespace deltamem {

// num_threads bounds the OpenMP team of a call.
struct Kernels {
  const char* isa;
  void (*delta_scan_fwd)(const DeltaScanParams&, int num_threads);
  void (*delta_scan_bwd)(const DeltaScanBwdParams&, int num_threads);
  void (*delta_scan_with_state_pool)(const DeltaScanPoolParams&, int num_threads);
  void (*delta_prep_fwd)(const DeltaPrepParams&, int num_threads);
  void (*delta_prep_bwd)(const DeltaPrepBwdParams&, int num_threads);
  void (*delta_prep_with_kvcache)(const DeltaPrepCacheParams&, int num_threads);
  void (*delta_attention_fwd)(const DeltaAttentionParams&, int num_threads);
  void (*delta_attention_bwd)(const DeltaAttentionBwdParams&, int num_threads);
  void (*delta_attention_with_kvcache)(const DeltaAttentionCacheParams&, int num_threads);
  void (*delta_decode)(const DeltaDecodeParams&, int num_threads);
  void (*delta_output_fwd)(const DeltaOutputParams&, int num_threads);
  void (*delta_output_bwd)(const DeltaOutputBwdParams&, int num_threads);
};

}  // namespace deltamem

#ifdef DELTAMEM_ISA
#define DELTAMEM_STRING_(x) #x
#define DELTAMEM_STRING(x) DELTAMEM_STRING_(x)

// Everything a kernel file defines stands in the namespace of its instruction set. Standard-library templates
// stay out of these files: the linker would keep one copy of them, possibly that of the widest instruction
// set.
namespace deltamem::DELTAMEM_ISA {
void delta_scan_fwd(const DeltaScanParams&, int num_threads);
void delta_scan_bwd(const DeltaScanBwdParams&, int num_threads);
void delta_scan_with_state_pool(const DeltaScanPoolParams&, int num_threads);
void delta_prep_fwd(const DeltaPrepParams&, int num_threads);
void delta_prep_bwd(const DeltaPrepBwdParams&, int num_threads);
void delta_prep_with_kvcache(const DeltaPrepCacheParams&, int num_threads);
void delta_attention_fwd(const DeltaAttentionParams&, int num_threads);
void delta_attention_bwd(const DeltaAttentionBwdParams&, int num_threads);
void delta_attention_with_kvcache(const DeltaAttentionCacheParams&, int num_threads);
void delta_decode(const DeltaDecodeParams&, int num_threads);
void delta_output_fwd(const DeltaOutputParams&, int num_threads);
void delta_output_bwd(const DeltaOutputBwdParams&, int num_threads);
}  // namespace deltamem::DELTAMEM_ISA
#endif
