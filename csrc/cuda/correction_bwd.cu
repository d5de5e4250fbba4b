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
  // Eight sums, then their tree: eight loads under way, and an eighth of the roundings in a row.
  float sum[8] = {};
  for (int64_t n = 0; n < num_parts; n += 8) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += n + j < num_parts ? parts[(n + j) * stride + i] : 0.0f;
  }
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  store_float(out, i, sum[0]);
}

}  // namespace

void sum_parts(Call& call, const float* parts, int64_t num_parts, int64_t stride, int64_t count,
               const Tensor& out) {
  if (!out) return;
  launch<sum_parts_kernel>(call, {ceil_div(count, int64_t{kThreads}), kThreads}, parts, num_parts, stride,
                           count, out);
}

}  // namespace deltamem::cuda
