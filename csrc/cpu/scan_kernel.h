// What the forward and the backward kernels of the scan share. A row of the state is a lane, a column a
// vector.
#pragma once

#include "cpu/scan.h"

namespace deltamem::DELTAMEM_ISA {

// y[m] = S x[m] for M vectors x[m], S as columns s[j]. Accumulators are split to shorten the chain of
// additions.
template <int W, int COLS, int M>
inline __attribute__((always_inline)) void multiply(const RowOf<W>* s, int cols, const float* const (&x)[M],
                                                    RowOf<W> (&y)[M]) {
  constexpr int A = COLS ? 4 : 2;
  RowOf<W> sum[M][A];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) sum[m][a] = s[a] * x[m][a];
  }
#pragma GCC unroll 16
  for (int j = A; j < cols; j += A) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) sum[m][a] = s[j + a] * x[m][j + a] + sum[m][a];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
    y[m] = A == 4 ? (sum[m][0] + sum[m][1]) + (sum[m][2] + sum[m][3]) : sum[m][0] + sum[m][1];
}

// What the gates and values of one token do to W rows of the state.
template <int W>
struct Write {
  RowOf<W> keep, erase, write, v;
};
template <UpdateRule RULE, bool COUPLED, int W>
inline __attribute__((always_inline)) Write<W> write_of(const Steps& x, int64_t t, int row) {
  RowOf<W> beta = load_lanes<W>(x.beta.at(t) + row), v = load_lanes<W>(x.v.at(t) + row);
  RowOf<W> lam = COUPLED ? 1.0f - beta : load_lanes<W>(x.lam.at(t) + row);
  auto g = gates(RULE, beta, lam);
  return {g.keep, g.erase, g.write, v};
}

// Calls f with the template arguments of a kernel, as Int: rule, whether its decay is coupled, lanes,
// columns.
template <class F>
inline void dispatch_kernel(UpdateRule rule, const Steps& steps, F&& f) {
  auto with = [&](auto rule, auto coupled) {
    dispatch_rank(steps.width, [&](auto lanes, auto columns) { f(rule, coupled, lanes, columns); });
  };
  using Standard = Int<int(UpdateRule::standard)>;
  using Outside = Int<int(UpdateRule::lambda_outside)>;
  using NoLambda = Int<int(UpdateRule::no_lambda)>;
  const bool coupled = steps.lam.data == nullptr;
  if (rule == UpdateRule::no_lambda) return with(NoLambda{}, Int<true>{});
  if (rule == UpdateRule::standard)
    return coupled ? with(Standard{}, Int<true>{}) : with(Standard{}, Int<false>{});
  coupled ? with(Outside{}, Int<true>{}) : with(Outside{}, Int<false>{});
}

// Threads for `items` independent pieces of work.
inline int team(int num_threads, int64_t items) {
  return static_cast<int>(max<int64_t>(1, min<int64_t>(num_threads, items)));
}

}  // namespace deltamem::DELTAMEM_ISA
