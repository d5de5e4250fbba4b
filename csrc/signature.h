// A call's signature: dtype, device, sizes and strides of its tensors as bytes, never identity or values.
// Calls of equal signature and options pass the same checks, so the Python side validates each signature
// once.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bind.h"

namespace deltamem {

inline void append(std::string& key, int64_t value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof value);
}

inline bool is_contiguous(const dlpack::DLTensor& t) {
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

// None when an argument is neither None nor exactly a torch.Tensor or Parameter (a subclass may mean
// anything), or cannot be described by DLPack.
inline pybind11::object signature(const pybind11::tuple& tensors) {
  static PyObject* tensor_type =
      pybind11::object(pybind11::module_::import("torch").attr("Tensor")).release().ptr();
  static PyObject* parameter_type =
      pybind11::object(pybind11::module_::import("torch.nn").attr("Parameter")).release().ptr();
  std::string key;
  key.reserve(1024);
  for (pybind11::handle item : tensors) {
    if (item.is_none()) {
      key.push_back('-');
      continue;
    }
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(item.ptr()));
    if (type != tensor_type && type != parameter_type) return pybind11::none();
    dlpack::DLTensor t;
    if (exchange_api(item.ptr())->dltensor_from_py_object_no_sync(item.ptr(), &t) != 0) {
      PyErr_Clear();
      return pybind11::none();
    }
    bool contiguous = is_contiguous(t);
    const char head[] = {static_cast<char>(t.dtype.code),
                         static_cast<char>(t.dtype.bits),
                         static_cast<char>(t.ndim),
                         static_cast<char>(t.device.device_type),
                         static_cast<char>(t.device.device_id),
                         static_cast<char>(contiguous)};
    key.append(head, sizeof head);
    for (int i = 0; i < t.ndim; ++i) {
      append(key, t.shape[i]);
      if (!contiguous) append(key, t.strides[i]);
    }
  }
  return pybind11::bytes(key);
}

}  // namespace deltamem
