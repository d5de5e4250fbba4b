// The delta rule's scalar mathematics, shared by every native backend. V is float, or a vector of floats.
#pragma once

#include "params.h"

namespace deltamem {

inline constexpr float kL2NormEps = 1e-6f;
inline constexpr int kMaxRank = 64;

// S_t = diag(keep) S_{t-1} - diag(erase) (S_{t-1} k) k^T + diag(write) v k^T
template <class V>
struct Gates {
  V keep, erase, write;
};

// lam is the decay that the rule applies: of a coupled gate, 1 - beta.
template <class V>
DELTAMEM_HD Gates<V> gates(UpdateRule rule, V beta, V lam) {
  if (rule == UpdateRule::no_lambda) return {V{} + 1.0f, beta, beta};
  return {lam, rule == UpdateRule::lambda_outside ? lam * beta : beta, beta};
}

template <class V>
struct GateGradients {
  V beta, lam;
};

// With a coupled decay, beta is the total derivative and lam has no meaning.
template <class V>
DELTAMEM_HD GateGradients<V> gates_bwd(UpdateRule rule, bool coupled, Gates<V> d, V beta, V lam) {
  if (rule == UpdateRule::no_lambda) return {d.erase + d.write, V{}};
  bool outside = rule == UpdateRule::lambda_outside;
  V dlam = outside ? d.erase * beta + d.keep : d.keep;
  V dbeta = outside ? d.erase * lam + d.write : d.erase + d.write;
  return {coupled ? dbeta - dlam : dbeta, dlam};
}

// Derivatives through y = sigmoid(x) and y = tanh(x), from the results.
template <class V>
DELTAMEM_HD V sigmoid_bwd(V dy, V y) {
  return dy * (y * (1.0f - y));
}
template <class V>
DELTAMEM_HD V tanh_bwd(V dy, V y) {
  return dy * (1.0f - y * y);
}

}  // namespace deltamem
