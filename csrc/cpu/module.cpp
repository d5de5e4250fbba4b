// The Python module deltamem_kernels._cpu: arguments into params, params into the table of the widest
// instruction set that this processor and operating system offer.
#define DELTAMEM_BIND_DEVICE ::deltamem::dlpack::kCPU
#include "bind_ops.h"
#include "cpu/kernels.h"
#include "signature.h"

namespace py = pybind11;

namespace deltamem {

namespace portable {
extern const Kernels kernels;
}
#ifdef DELTAMEM_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif

namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

// Narrowest first.
const Choice* choices(int* count) {
  static const Choice all[] = {
      {&portable::kernels, true},
#ifdef DELTAMEM_X86
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&avx512::kernels, __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512dq")},
      {&avx512bf16::kernels, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl")},
#endif
  };
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

const Kernels* widest() {
  int count;
  const Choice* all = choices(&count);
  const Kernels* best = nullptr;
  for (int i = 0; i < count; ++i) {
    if (all[i].supported) best = all[i].kernels;
  }
  return best;
}

const Kernels* active = widest();

py::list supported_isas() {
  int count;
  const Choice* all = choices(&count);
  py::list names;
  for (int i = 0; i < count; ++i) {
    if (all[i].supported) names.append(all[i].kernels->isa);
  }
  return names;
}

void set_isa(const std::string& name) {
  int count;
  const Choice* all = choices(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].supported && name == all[i].kernels->isa) {
      active = all[i].kernels;
      return;
    }
  }
  throw py::value_error("set_isa: isa must be one that this processor supports, got '" + name + "'");
}

// Kernels use as many threads as torch does.
template <class Params>
void launch(void (*kernel)(const Params&, int), const Params& params) {
  static PyObject* get_num_threads =
      py::object(py::module_::import("torch").attr("get_num_threads")).release().ptr();
  const int num_threads = py::reinterpret_borrow<py::object>(get_num_threads)().cast<int>();
  py::gil_scoped_release nogil;
  kernel(params, num_threads);
}

struct Cpu {
  static void run(const DeltaScanParams& p) { launch(active->delta_scan_fwd, p); }
  static void run(const DeltaScanBwdParams& p) { launch(active->delta_scan_bwd, p); }
  static void run(const DeltaScanPoolParams& p) { launch(active->delta_scan_with_state_pool, p); }
  static void run(const DeltaPrepParams& p) { launch(active->delta_prep_fwd, p); }
  static void run(const DeltaPrepBwdParams& p) { launch(active->delta_prep_bwd, p); }
  static void run(const DeltaPrepCacheParams& p) { launch(active->delta_prep_with_kvcache, p); }
  static void run(const DeltaAttentionParams& p) { launch(active->delta_attention_fwd, p); }
  static void run(const DeltaAttentionBwdParams& p) { launch(active->delta_attention_bwd, p); }
  static void run(const DeltaAttentionCacheParams& p) { launch(active->delta_attention_with_kvcache, p); }
  static void run(const DeltaDecodeParams& p) { launch(active->delta_decode, p); }
  static void run(const DeltaOutputParams& p) { launch(active->delta_output_fwd, p); }
  static void run(const DeltaOutputBwdParams& p) { launch(active->delta_output_bwd, p); }
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() =
      "CPU kernels of deltamem_kernels. Called through deltamem_kernels.native, which checks nothing either.";
  m.def("isa", [] { return active->isa; });
  m.def("supported_isas", supported_isas);
  m.def("set_isa", set_isa);
  m.def("signature", signature);

  bind_ops<Cpu>(m);
}

}  // namespace deltamem
