// Prepares blocks of tokens for the recurrence: any dtype and stride to padded fp32 rows, activations, gates.
#include "cpu/scan.h"

namespace deltamem::DELTAMEM_ISA {
namespace {

const float kOnes[kMaxRank] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                               1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                               1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

template <class T>
void convert_rows(const T* source, int64_t stride, int64_t count, int64_t rank, int width, float* target) {
  if (rank == width && stride == rank) return convert_row(source, target, count * rank);
  if (rank == width) {
    dispatch_rank(width, [&](auto lanes, auto) {
      constexpr int W = decltype(lanes)::value;
      for (int64_t t = 0; t < count; ++t) {
        for (int i = 0; i < width; i += W) {
          store_lanes<W>(target + t * width + i, load_lanes<W>(source + t * stride + i));
        }
      }
    });
    return;
  }
  for (int64_t t = 0; t < count; ++t) {
    for (int i = 0; i < width; ++i)
      target[t * width + i] = i < rank ? to_float(source[t * stride + i]) : 0.0f;
  }
}

// x <- f(x). Runs on to the end of the last vector: scratch is padded for it.
template <class F>
void map(float* x, int64_t count, F&& f) {
  for (int64_t i = 0; i < count; i += kWidth) store(x + i, f(load(x + i)));
}

// y / max(|y|, eps) of every row, W rows at a time.
template <int W>
void normalize_rows(float* y, int64_t count, int width) {
  for (int64_t t = 0; t < count; t += W) {
    int64_t rows = min<int64_t>(W, count - t);
    RowOf<W> squares[W];
    for (int r = 0; r < W; ++r) {
      squares[r] = RowOf<W>{};
      for (int i = 0; r < rows && i < width; i += W) {
        RowOf<W> x = load_lanes<W>(y + (t + r) * width + i);
        squares[r] = x * x + squares[r];
      }
    }
    float norm[W];
    store_lanes<W>(norm, lane_sums<W>(squares));
    for (int r = 0; r < W; ++r) norm[r] = 1.0f / max(__builtin_sqrtf(norm[r]), kL2NormEps);
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < width; i += W) {
        float* row = y + (t + r) * width + i;
        store_lanes<W>(row, load_lanes<W>(row) * norm[r]);
      }
    }
  }
}

// out[p] = a_{2p} . b_{2p+1}, W pairs at a time.
template <int W>
void dot_pairs(const Stream& a, const Stream& b, int64_t pairs, int width, float* out) {
  for (int64_t p = 0; p < pairs; p += W) {
    RowOf<W> products[W];
    for (int r = 0; r < W; ++r) {
      products[r] = RowOf<W>{};
      if (p + r >= pairs) continue;
      const float *x = a.at(2 * (p + r)), *y = b.at(2 * (p + r) + 1);
      for (int i = 0; i < width; i += W)
        products[r] = load_lanes<W>(x + i) * load_lanes<W>(y + i) + products[r];
    }
    store_lanes<W>(out + p, lane_sums<W>(products));
  }
}

}  // namespace

// Six streams of rows at most, the products of pairs, and the gates' scalars where rows share them.
StepsLoader::StepsLoader(const Memory& memory, int64_t tokens)
    : memory_(memory),
      rank_(memory.mem_q.size[3]),
      block_(min(tokens, kBlock)),
      width_(padded_rank(rank_)),
      scratch_(6 * (block_ * width_ + kWidth) + 4 * (block_ + 2 * kWidth)) {}

// Floats of scratch, padded to whole vectors.
float* StepsLoader::take(int64_t count) {
  float* taken = scratch_.data + used_;
  used_ += round_up(count, kWidth);
  return taken;
}

// Rows as fp32, in scratch if `fresh` or if the tensor's own rows cannot serve.
Stream StepsLoader::rows(const Tensor& t, int64_t batch, int64_t first, int64_t count, int64_t head,
                         bool fresh) {
  if (!fresh && t.dtype == DType::f32 && rank_ == width_)
    return {t.at<float>(batch, first, head), t.stride[1]};
  float* target = take(count * width_);
  dispatch_float(t.dtype, [&](auto type) {
    convert_rows(t.at<decltype(type)>(batch, first, head), t.stride[1], count, rank_, width_, target);
  });
  return {target, width_};
}

Stream StepsLoader::activated(const Tensor& t, int64_t batch, int64_t first, int64_t count, int64_t head) {
  Stream x = rows(t, batch, first, count, head, memory_.qk_activation);
  if (memory_.qk_activation) {
    float* y = const_cast<float*>(x.data);
    map(y, count * width_, [](F32 v) { return tanh(v); });
    dispatch_rank(width_,
                  [&](auto lanes, auto) { normalize_rows<decltype(lanes)::value>(y, count, width_); });
  }
  return x;
}

Stream StepsLoader::gate(const Tensor& t, const Tensor& bias, int64_t batch, int64_t first, int64_t count,
                         int64_t head) {
  if (t.size[3] != 1) {
    Stream x = rows(t, batch, first, count, head, memory_.gate);
    if (!memory_.gate) return x;
    float* y = const_cast<float*>(x.data);
    if (bias) {
      const float* b = bias.at<float>(head);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t r = 0; r < rank_; ++r) y[i * width_ + r] += b[r];
      }
    }
    map(y, count * width_, [](F32 v) { return sigmoid(v); });
    return x;
  }
  // One scalar per token, shared by the rows of the state.
  float* scalars = take(count);
  dispatch_float(t.dtype, [&](auto type) {
    const auto* source = t.at<decltype(type)>(batch, first, head);
    for (int64_t i = 0; i < count; ++i) scalars[i] = to_float(source[i * t.stride[1]]);
  });
  if (memory_.gate) {
    float b = bias ? *bias.at<float>(head) : 0.0f;
    map(scalars, count, [b](F32 v) { return sigmoid(v + b); });
  }
  float* target = take(count * width_);
  for (int64_t i = 0; i < count; ++i) {
    for (int r = 0; r < width_; ++r) target[i * width_ + r] = scalars[i];
  }
  return {target, width_};
}

// keep, erase and write as streams: the gates' own rows where the rule takes them unchanged.
void StepsLoader::resolve_gates(Steps& x, int64_t count) {
  UpdateRule rule = memory_.update_rule;
  x.write = x.erase = x.beta;
  x.keep = rule == UpdateRule::no_lambda ? Stream{kOnes, 0} : x.lam;
  bool makes_keep = x.keep.data == nullptr, makes_erase = rule == UpdateRule::lambda_outside;
  if (!makes_keep && !makes_erase) return;
  float* keep = makes_keep ? take(count * width_) : nullptr;
  float* erase = makes_erase ? take(count * width_) : nullptr;
  dispatch_rank(width_, [&](auto lanes, auto) {
    constexpr int W = decltype(lanes)::value;
    for (int64_t t = 0; t < count; ++t) {
      for (int i = 0; i < width_; i += W) {
        RowOf<W> beta = load_lanes<W>(x.beta.at(t) + i);
        RowOf<W> lam = makes_keep ? 1.0f - beta : load_lanes<W>(x.lam.at(t) + i);
        Gates<RowOf<W>> g = gates(rule, beta, lam);
        if (makes_keep) store_lanes<W>(keep + t * width_ + i, g.keep);
        if (makes_erase) store_lanes<W>(erase + t * width_ + i, g.erase);
      }
    }
  });
  if (makes_keep) x.keep = {keep, width_};
  if (makes_erase) x.erase = {erase, width_};
}

void StepsLoader::multiply_pairs(Steps& x, int64_t count) {
  int64_t pairs = count / 2;
  if (pairs == 0) return;
  float *kk = take(pairs + kWidth), *kq = take(pairs + kWidth);
  dispatch_rank(width_, [&](auto lanes, auto) {
    constexpr int W = decltype(lanes)::value;
    dot_pairs<W>(x.k, x.k, pairs, width_, kk);
    dot_pairs<W>(x.k, x.q, pairs, width_, kq);
  });
  x.kk = kk, x.kq = kq;
}

Steps StepsLoader::load(int64_t batch, int64_t first, int64_t count, int64_t head) {
  const Memory& m = memory_;
  used_ = 0;
  Steps x;
  x.width = width_;
  x.q = activated(m.mem_q, batch, first, count, head);
  if (!m.write) return x;
  x.k = activated(m.mem_k, batch, first, count, head);
  x.v = rows(m.mem_v, batch, first, count, head, false);
  x.beta = gate(m.beta, m.beta_bias, batch, first, count, head);
  if (m.lam && m.update_rule != UpdateRule::no_lambda) {
    x.lam = gate(m.lam, m.lam_bias, batch, first, count, head);
  }
  resolve_gates(x, count);
  multiply_pairs(x, count);
  return x;
}

}  // namespace deltamem::DELTAMEM_ISA
