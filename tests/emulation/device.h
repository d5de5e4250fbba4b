// The device that the engine is: settable by DELTAMEM_EMULATION_MULTIPROCESSORS and
// DELTAMEM_EMULATION_SHARED_MEMORY (bytes a block may have), else small, so that small shapes fill it.
#pragma once

namespace deltamem::emulation {

inline constexpr int kThreadsPerMultiprocessor = 1536;
inline constexpr int kThreadsPerBlock = 1024;

int multiprocessors();
int shared_memory_per_block();
int shared_memory_per_multiprocessor();

}  // namespace deltamem::emulation
