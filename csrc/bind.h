// Lets a pybind11 function take `Tensor` arguments: a torch tensor, or None for an absent one. The pointer,
// sizes and strides come through the DLPack exchange table, so no torch header is needed and one build serves
// every torch that publishes the table.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "dlpack.h"
#include "params.h"

namespace deltamem {

// The table that a tensor type publishes; all tensors here are of torch's.
inline const dlpack::ExchangeAPI* exchange_api_of(PyObject* type) {
  static const dlpack::ExchangeAPI* api = nullptr;
  if (api == nullptr) {
    auto capsule = pybind11::handle(type).attr("__dlpack_c_exchange_api__");
    api = static_cast<const dlpack::ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw pybind11::error_already_set();
    if (api->version.major != 1) throw std::runtime_error("deltamem_kernels: DLPack major version must be 1");
  }
  return api;
}

inline const dlpack::ExchangeAPI* exchange_api(PyObject* object) {
  return exchange_api_of(reinterpret_cast<PyObject*>(Py_TYPE(object)));
}

inline DType dtype_of(dlpack::DataType t) {
  if (t.code == dlpack::kFloat && t.bits == 32) return DType::f32;
  if (t.code == dlpack::kFloat && t.bits == 16) return DType::f16;
  if (t.code == dlpack::kBfloat && t.bits == 16) return DType::bf16;
  if (t.code == dlpack::kInt && t.bits == 32) return DType::i32;
  if (t.code == dlpack::kBool && t.bits == 8) return DType::boolean;
  throw pybind11::type_error("deltamem_kernels: a tensor's dtype must be fp32, fp16, bf16, int32 or bool");
}

inline Tensor tensor_from(PyObject* object, int32_t device_type) {
  dlpack::DLTensor lent;
  if (exchange_api(object)->dltensor_from_py_object_no_sync(object, &lent) != 0) {
    throw pybind11::error_already_set();
  }
  if (lent.device.device_type != device_type || lent.ndim > 5) {
    throw pybind11::value_error(
        "deltamem_kernels: a tensor must be on the kernel's device and have at most 5 dimensions");
  }
  static char nothing;  // an empty tensor may have no storage, and is not an absent one
  Tensor t;
  t.data = lent.data != nullptr ? static_cast<char*>(lent.data) + lent.byte_offset : &nothing;
  t.dtype = dtype_of(lent.dtype);
  t.device = static_cast<int8_t>(lent.device.device_id);
  t.ndim = lent.ndim;
  for (int i = 0; i < lent.ndim; ++i) {
    t.size[i] = lent.shape[i];
    t.stride[i] = lent.strides[i];
  }
  return t;
}

inline UpdateRule update_rule_from(const std::string& name) {
  if (name == "standard") return UpdateRule::standard;
  if (name == "lambda_outside") return UpdateRule::lambda_outside;
  if (name == "no_lambda") return UpdateRule::no_lambda;
  throw pybind11::value_error("deltamem_kernels: unknown update_rule '" + name + "'");
}

}  // namespace deltamem

#ifndef DELTAMEM_BIND_DEVICE
#error "define DELTAMEM_BIND_DEVICE as the DLPack device type of the module before including bind.h"
#endif

namespace pybind11::detail {

template <>
struct type_caster<deltamem::Tensor> {
  PYBIND11_TYPE_CASTER(deltamem::Tensor, const_name("torch.Tensor | None"));

  bool load(handle source, bool /*convert*/) {
    if (!source.is_none()) value = deltamem::tensor_from(source.ptr(), DELTAMEM_BIND_DEVICE);
    return true;
  }
};

template <>
struct type_caster<deltamem::UpdateRule> {
  PYBIND11_TYPE_CASTER(deltamem::UpdateRule, const_name("str"));

  bool load(handle source, bool /*convert*/) {
    value = deltamem::update_rule_from(source.cast<std::string>());
    return true;
  }
};

}  // namespace pybind11::detail
