// Between the probes and their Python module, which needs no CUDA header.
#pragma once

#include <cstdint>

namespace deltamem::probe {

struct Arguments {
  const uint32_t* in;  // [blocks * threads, Entry::in]
  uint32_t* out;       // [blocks * threads, Entry::out]
  uint32_t* memory;    // zeros
  int64_t blocks;
  int threads;
  int device;
  void* stream;
};

struct Entry {
  const char* name;  // null: behind the last
  int in, out;       // words per thread
  const char* (*run)(const Arguments&);
};
extern const Entry kEntries[];
extern const bool kEmulated;

}  // namespace deltamem::probe
