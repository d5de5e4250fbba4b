// Prepares blocks of tokens for the recurrence: any dtype and stride to padded fp32 rows, activations, gates.
#include "cpu/scan.h"

namespace deltamem::DELTAMEM_ISA {
namespace {

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

// y / max(|y|, eps) of every row, W rows at a time. Keeps the divisors.
template <int W>
void normalize_rows(float* y, int64_t count, int width, float* norms) {
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
    float* norm = norms + t;
    float scale[W];
    store_lanes<W>(norm, lane_sums<W>(squares));
    for (int r = 0; r < W; ++r) {
      norm[r] = max(__builtin_sqrtf(norm[r]), kL2NormEps);
      scale[r] = 1.0f / norm[r];
    }
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < width; i += W) {
        float* row = y + (t + r) * width + i;
        store_lanes<W>(row, load_lanes<W>(row) * scale[r]);
      }
    }
  }
}

}  // namespace

// Room for five streams of rows and one of the backward pass, and for five of scalars.
StepsLoader::StepsLoader(const Memory& memory, int64_t block)
    : memory_(memory),
      rank_(memory.mem_q.size[3]),
      width_(padded_rank(rank_)),
      scratch_(6 * (block * width_ + kWidth) + 5 * (block + 3 * kWidth)) {}

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

Stream StepsLoader::activated(const Tensor& t, int64_t batch, int64_t first, int64_t count, int64_t head,
                              const float** norm) {
  Stream x = rows(t, batch, first, count, head, memory_.qk_activation);
  if (memory_.qk_activation) {
    float *y = const_cast<float*>(x.data), *norms = take(count + kWidth);
    map(y, count * width_, [](F32 v) { return tanh(v); });
    dispatch_rank(width_,
                  [&](auto lanes, auto) { normalize_rows<decltype(lanes)::value>(y, count, width_, norms); });
    *norm = norms;
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

// The products of pairs among W tokens from t on, of which `count` exist (all W if FULL).
template <int W, int COLS, bool FULL>
inline RowOf<W> dot_pairs(const Steps& x, int64_t t, int64_t count) {
  RowOf<W> products[W];
#pragma GCC unroll 8
  for (int r = 0; r < W; r += 2) {
    products[r] = products[r + 1] = RowOf<W>{};
    if (!FULL && r + 1 >= count) continue;
    const float *k = x.k.at(t + r), *next_k = x.k.at(t + r + 1), *next_q = x.q.at(t + r + 1);
    for (int i = 0; i < (COLS ? COLS : x.width); i += W) {
      products[r] += load_lanes<W>(k + i) * load_lanes<W>(next_k + i);
      products[r + 1] += load_lanes<W>(k + i) * load_lanes<W>(next_q + i);
    }
  }
  return lane_sums<W>(products);
}

void StepsLoader::multiply_pairs(Steps& x, int64_t count) {
  float* pairs = take(count + kWidth);
  dispatch_rank(width_, [&](auto lanes, auto columns) {
    constexpr int W = decltype(lanes)::value, COLS = decltype(columns)::value;
    int64_t t = 0;
    for (; t + W <= count; t += W) store_lanes<W>(pairs + t, dot_pairs<W, COLS, true>(x, t, W));
    if (t + 1 < count) store_lanes<W>(pairs + t, dot_pairs<W, COLS, false>(x, t, count - t));
  });
  x.pairs = pairs;
}

Steps StepsLoader::load(int64_t batch, int64_t first, int64_t count, int64_t head) {
  const Memory& m = memory_;
  used_ = 0;
  Steps x;
  x.width = width_;
  x.q = activated(m.mem_q, batch, first, count, head, &x.q_norm);
  if (!m.write) return x;
  x.k = activated(m.mem_k, batch, first, count, head, &x.k_norm);
  x.v = rows(m.mem_v, batch, first, count, head);
  x.beta = gate(m.beta, m.beta_bias, batch, first, count, head);
  if (m.lam && m.update_rule != UpdateRule::no_lambda) {
    x.lam = gate(m.lam, m.lam_bias, batch, first, count, head);
  }
  multiply_pairs(x, count);
  return x;
}

}  // namespace deltamem::DELTAMEM_ISA
