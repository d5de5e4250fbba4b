// The Python module _probe: run(name, in, out, memory, threads) over int32 tensors, on the default stream.
#include "probe.h"

#define DELTAMEM_BIND_DEVICE \
  (::deltamem::probe::kEmulated ? ::deltamem::dlpack::kCPU : ::deltamem::dlpack::kCUDA)
#include "bind.h"

namespace py = pybind11;

namespace deltamem::probe {
namespace {

const Entry& find(const std::string& name) {
  for (const Entry* entry = kEntries; entry->name != nullptr; ++entry) {
    if (name == entry->name) return *entry;
  }
  throw py::key_error(name);
}

void run(const std::string& name, const Tensor& in, const Tensor& out, const Tensor& memory, int threads) {
  const Entry& entry = find(name);
  if (in.size[0] % threads != 0 || in.size[1] != entry.in || out.size[0] != in.size[0] ||
      out.size[1] != entry.out) {
    throw py::value_error("_probe.run: rows must be those of whole blocks and have the probe's words");
  }
  const char* error = entry.run({.in = static_cast<const uint32_t*>(in.data),
                                 .out = static_cast<uint32_t*>(out.data),
                                 .memory = static_cast<uint32_t*>(memory.data),
                                 .blocks = in.size[0] / threads,
                                 .threads = threads,
                                 .device = in.device,
                                 .stream = nullptr});
  if (error != nullptr) throw std::runtime_error(error);
}

}  // namespace

PYBIND11_MODULE(_probe, m) {
  m.attr("emulated") = kEmulated;
  m.def("words", [] {
    py::dict words;
    for (const Entry* entry = kEntries; entry->name != nullptr; ++entry) {
      words[entry->name] = py::make_tuple(entry->in, entry->out);
    }
    return words;
  });
  m.def("run", run);
}

}  // namespace deltamem::probe
