// Sums over parts, in order.
#include "cuda/correction_bwd.cuh"

namespace deltamem::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* parts, int64_t num_parts, int64_t stride, int64_t count,
                     const __grid_constant__ Tensor out) {
  const int64_t i = ptx::block() * kThreads + ptx::thread();
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t n = 0; n < num_parts; ++n) sum += parts[n * stride + i];
  store_float(out, i, sum);
}

}  // namespace

void sum_parts(Call& call, const float* parts, int64_t num_parts, int64_t stride, int64_t count,
               const Tensor& out) {
  if (!out) return;
  launch<sum_parts_kernel>(call, {ceil_div(count, int64_t{kThreads}), kThreads}, parts, num_parts, stride,
                           count, out);
}

}  // namespace deltamem::cuda
