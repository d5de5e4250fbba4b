// How an op queues its kernels.
#pragma once

#include <string>

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"

namespace deltamem::cuda {

inline constexpr int kWarp = 32;

inline void check(const Call& call, const char* error, const char* what) {
  if (error == nullptr) return;
  throw Failure(std::string("deltamem_kernels: ") + call.op + ": " + what +
                " must succeed, got CUDA error '" + error + "'");
}

// Queues kKernel(args...) on the call's stream; a grid without blocks is nothing to do.
template <auto kKernel, class... Args>
void launch(Call& call, ptx::LaunchShape shape, const Args&... args) {
  if (shape.blocks == 0) return;
  shape.overlaps_previous &= call.properties.compute_capability >= 90 || ptx::kEmulated;
  check(call, ptx::launch<kKernel>(shape, call.device, call.stream, args...), "its launch");
}

}  // namespace deltamem::cuda
