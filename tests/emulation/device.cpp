#include "device.h"

#include <cstdlib>

#include "cuda/ptx.cuh"

namespace deltamem::emulation {

namespace {

int setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text != nullptr && atoi(text) > 0 ? atoi(text) : otherwise;
}

}  // namespace

int multiprocessors() { return setting("DELTAMEM_EMULATION_MULTIPROCESSORS", 4); }
int shared_memory_per_block() { return setting("DELTAMEM_EMULATION_SHARED_MEMORY", 99 * 1024); }
int shared_memory_per_multiprocessor() { return shared_memory_per_block() + 1024; }

}  // namespace deltamem::emulation

namespace deltamem::ptx {

const char* describe_device(int index, Device* device) {
  if (index != 0) return "the emulation has one device";
  *device = {.index = 0,
             .multiprocessors = emulation::multiprocessors(),
             .shared_memory_per_block = emulation::shared_memory_per_block(),
             .shared_memory_per_multiprocessor = emulation::shared_memory_per_multiprocessor(),
             .compute_capability = 89};
  return nullptr;
}

}  // namespace deltamem::ptx
