// The Python module deltamem_kernels._cuda: arguments into params, params and the current stream to the ops.
// Built by the host compiler alone, without a CUDA header.
#include "cuda/kernels.h"

#define DELTAMEM_BIND_DEVICE \
  (::deltamem::cuda::is_emulated() ? ::deltamem::dlpack::kCPU : ::deltamem::dlpack::kCUDA)
#include <map>
#include <tuple>
#include <vector>

#include "bind_ops.h"

namespace py = pybind11;

namespace deltamem::cuda {

namespace {

PyObject* torch_attribute(const char* name) {
  return py::object(py::module_::import("torch").attr(name)).release().ptr();
}

// Memory comes from torch's allocator, so that it knows the stream and the graph that a call belongs to.
py::object torch_tensor(PyObject* function, size_t count, PyObject* dtype, int device) {
  static PyObject* make_device = torch_attribute("device");
  const char* type = is_emulated() ? "cpu" : "cuda";
  return py::reinterpret_borrow<py::object>(function)(
      count, py::arg("dtype") = py::handle(dtype),
      py::arg("device") = py::reinterpret_borrow<py::object>(make_device)(type, is_emulated() ? 0 : device));
}

struct Counters {
  py::object tensor;
  size_t count;
};

class TorchCall : public Call {
 public:
  using Call::Call;

  void* allocate(size_t bytes) override {
    static PyObject* empty = torch_attribute("empty");
    static PyObject* float32 = torch_attribute("float32");  // which tests fill with NaN
    kept_.push_back(torch_tensor(empty, (bytes + 3) / 4, float32, device));
    return tensor_from(kept_.back().ptr(), DELTAMEM_BIND_DEVICE).data;
  }

  // One array per device, stream and capture, as long as the process; that of a stream's last capture goes
  // when the next one comes: the graph owns its memory, and zeroes it as its first node.
  uint32_t* counters(size_t count) override {
    static PyObject* zeros = torch_attribute("zeros");
    static PyObject* int32 = torch_attribute("int32");
    static auto* known = new std::map<std::tuple<int, void*, bool>, std::pair<uint64_t, Counters>>();
    const uint64_t capture = capture_of(stream);
    auto& [owner, mine] = (*known)[{device, stream, capture != 0}];
    if (owner != capture || mine.count < count) {
      owner = capture;
      mine.count = count < 4096 ? 4096 : count;
      mine.tensor = torch_tensor(zeros, mine.count, int32, device);
    }
    return static_cast<uint32_t*>(tensor_from(mine.tensor.ptr(), DELTAMEM_BIND_DEVICE).data);
  }

 private:
  std::vector<py::object> kept_;
};

void* current_stream(int device) {
  if (is_emulated()) return nullptr;
  static PyObject* tensor_type = torch_attribute("Tensor");
  void* stream = nullptr;
  if (exchange_api_of(tensor_type)->current_work_stream(dlpack::kCUDA, device, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

template <class Params>
void queue(const char* op, void (*function)(const Params&, Call&), const Params& params, int device) {
  const DeviceProperties& properties = properties_of(device);
  const DeviceScope scope(device);
  TorchCall call(op, device, current_stream(device), properties);
  function(params, call);
}

int device_of(const Tensor& a, const Tensor& b = {}, const Tensor& c = {}) {
  return a ? a.device : b ? b.device : c.device;
}

struct Cuda {
  static void run(const DeltaScanParams& p) {
    queue("delta_scan_fwd", delta_scan_fwd, p, device_of(p.memory.mem_q));
  }
  static void run(const DeltaScanBwdParams& p) {
    queue("delta_scan_bwd", delta_scan_bwd, p, device_of(p.fwd.memory.mem_q));
  }
  static void run(const DeltaScanPoolParams& p) {
    queue("delta_scan_with_state_pool", delta_scan_with_state_pool, p, device_of(p.memory.mem_q));
  }
  static void run(const DeltaPrepParams& p) {
    queue("delta_prep_fwd", delta_prep_fwd, p, device_of(p.q, p.k, p.v));
  }
  static void run(const DeltaPrepBwdParams& p) {
    queue("delta_prep_bwd", delta_prep_bwd, p, device_of(p.fwd.q, p.fwd.k, p.fwd.v));
  }
  static void run(const DeltaPrepCacheParams& p) {
    queue("delta_prep_with_kvcache", delta_prep_with_kvcache, p, device_of(p.prep.k));
  }
  static void run(const DeltaAttentionParams& p) {
    queue("delta_attention_fwd", delta_attention_fwd, p, device_of(p.q));
  }
  static void run(const DeltaAttentionBwdParams& p) {
    queue("delta_attention_bwd", delta_attention_bwd, p, device_of(p.q));
  }
  static void run(const DeltaAttentionCacheParams& p) {
    queue("delta_attention_with_kvcache", delta_attention_with_kvcache, p, device_of(p.attention.q));
  }
  static void run(const DeltaDecodeParams& p) {
    queue("delta_decode", delta_decode, p, device_of(p.attention.attention.q));
  }
  static void run(const DeltaOutputParams& p) {
    queue("delta_output_fwd", delta_output_fwd, p, device_of(p.attn_proj));
  }
  static void run(const DeltaOutputBwdParams& p) {
    queue("delta_output_bwd", delta_output_bwd, p, device_of(p.dy));
  }
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of deltamem_kernels. Called through deltamem_kernels.native, which checks nothing "
      "either.";
  m.attr("emulated") = is_emulated();
  m.attr("architectures") = DELTAMEM_CUDA_ARCHS;
  bind_ops<Cuda>(m);
}

}  // namespace deltamem::cuda
