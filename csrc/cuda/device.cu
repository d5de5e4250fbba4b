// Devices and streams, as the bindings ask for them.
#include <mutex>

#include "cuda/launch.cuh"

namespace deltamem::cuda {

namespace {

constexpr int kMaxDevices = 64;

void require(const char* error, const char* what) {
  if (error != nullptr)
    throw Failure(std::string("deltamem_kernels: ") + what + " must succeed, got CUDA error '" + error + "'");
}

}  // namespace

bool is_emulated() { return ptx::kEmulated; }

const DeviceProperties& properties_of(int device) {
  static DeviceProperties known[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  if (device < 0 || device >= kMaxDevices)
    throw Failure("deltamem_kernels: a CUDA device's index must be below 64");
  std::call_once(asked[device], [device] {
    ptx::Device found;
    require(ptx::describe_device(device, &found), "asking for a device's properties");
    known[device] = {found.multiprocessors, found.shared_memory_per_block,
                     found.shared_memory_per_multiprocessor, found.compute_capability};
  });
  return known[device];
}

uint64_t capture_of(void* stream) {
  uint64_t id = 0;
  require(ptx::capture_of(stream, &id), "asking for a stream's capture");
  return id;
}

DeviceScope::DeviceScope(int device) : device_(device), before_(device) {
  require(ptx::switch_device(device, &before_), "making a device current");
}

DeviceScope::~DeviceScope() {
  int ignored;
  if (before_ != device_) ptx::switch_device(before_, &ignored);
}

}  // namespace deltamem::cuda
