// The CUDA ops as the bindings see them: plain C++ without a CUDA header. An op takes what it was given as
// params and the call it stands in, queues its kernels on the call's stream and returns; it throws Failure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "params.h"

namespace deltamem::cuda {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceProperties {
  int multiprocessors;
  int shared_memory_per_block;           // bytes that a kernel may ask for
  int shared_memory_per_multiprocessor;  // bytes
  int compute_capability;                // 90: 9.0
};

// Where one call of an op runs, and the memory it has beside its arguments.
class Call {
 public:
  Call(const char* op, int device, void* stream, const DeviceProperties& properties)
      : op(op), device(device), stream(stream), properties(properties) {}
  virtual ~Call() = default;

  // Bytes with unknown contents, aligned to 256, until the stream has passed this call.
  virtual void* allocate(size_t bytes) = 0;
  // Zeros of this device and stream (of this capture, in a graph); kernels leave zeros.
  virtual uint32_t* counters(size_t count) = 0;

  template <class T>
  T* allocate_array(int64_t count) {
    return static_cast<T*>(allocate(count * sizeof(T)));
  }

  const char* const op;
  const int device;
  void* const stream;
  const DeviceProperties& properties;
};

// Makes a device current while it lives.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int device_, before_;
};

const DeviceProperties& properties_of(int device);
// Of the graph that the stream is being captured into; 0: it runs.
uint64_t capture_of(void* stream);
bool is_emulated();  // kernels run on the CPU, over tensors there

void delta_scan_fwd(const DeltaScanParams&, Call&);
void delta_scan_bwd(const DeltaScanBwdParams&, Call&);
void delta_scan_with_state_pool(const DeltaScanPoolParams&, Call&);
void delta_prep_fwd(const DeltaPrepParams&, Call&);
void delta_prep_bwd(const DeltaPrepBwdParams&, Call&);
void delta_prep_with_kvcache(const DeltaPrepCacheParams&, Call&);
void delta_attention_fwd(const DeltaAttentionParams&, Call&);
void delta_attention_bwd(const DeltaAttentionBwdParams&, Call&);
void delta_attention_with_kvcache(const DeltaAttentionCacheParams&, Call&);
void delta_decode(const DeltaDecodeParams&, Call&);
void delta_output_fwd(const DeltaOutputParams&, Call&);
void delta_output_bwd(const DeltaOutputBwdParams&, Call&);

}  // namespace deltamem::cuda
