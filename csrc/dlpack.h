// The part of the DLPack 1.3 C ABI that the bindings read: how a framework lends a tensor without a copy
// (https://dmlc.github.io/dlpack). torch >= 2.10 publishes this table on torch.Tensor.
#pragma once

#include <cstdint>

namespace deltamem::dlpack {

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t device_type, device_id;
};
inline constexpr int32_t kCPU = 1, kCUDA = 2;

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
inline constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;

struct DLTensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeAPI {
  Version version;
  ExchangeAPI* prev_api;
  int (*managed_tensor_allocator)(DLTensor*, void**, void*, void (*)(void*, const char*, const char*));
  int (*managed_tensor_from_py_object_no_sync)(void* py_object, void** out);
  int (*managed_tensor_to_py_object_no_sync)(void* managed, void** out_py_object);
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // lent, not owned
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

}  // namespace deltamem::dlpack
