// The scan's backward kernels. Per row i of S, with s = s_{t-1,i}, g = dS_t,i, a = s.k_t, h = g.k_t:
//   dkeep = g.s    derase = -a h    dwrite = v h    dv = write h    dq = sum_i dr_i s
//   dk = sum_i (write v - erase a) g - erase h s    g_{t-1} = keep g - erase h k_t + dr q_t
// Two tokens a turn, t and t-1: g_{t-1}.k' = keep (g.k') - erase h (k_t.k') + dr (q_t.k'), so what runs from
// g to g is passed once for both.
#include "cpu/scan_kernel.h"

namespace deltamem::DELTAMEM_ISA {
namespace {

// W rows of the state, from row `row` on; two tokens a turn, as the forward pass.
template <UpdateRule RULE, bool COUPLED, int W, int COLS>
void replay_rows(float* state, const Steps& steps, int row, int64_t count, float* history, float* recalled) {
  using V = RowOf<W>;
  const Steps x = steps;
  const int cols = COLS ? COLS : x.width, width = cols;
  V s[COLS ? COLS : kMaxRank];
#pragma GCC unroll 16
  for (int j = 0; j < cols; ++j) s[j] = load_lanes<W>(state + j * width + row);
  history += row, recalled += row;

  // s <- s after a token that writes u, once the state before it is stored
  auto step = [&](int64_t t, V u, V keep) {
    const float* k = x.k.at(t);
    float* before = history + t * width * width;
#pragma GCC unroll 16
    for (int j = 0; j < cols; ++j) {
      store_lanes<W>(before + j * width, s[j]);
      s[j] = u * k[j] + keep * s[j];
    }
  };
  int64_t t = 0;
  for (; t + 2 <= count; t += 2) {
    V a[2];
    multiply<W, COLS, 2>(s, cols, {x.k.at(t), x.k.at(t + 1)}, a);
    auto w0 = write_of<RULE, COUPLED, W>(x, t, row), w1 = write_of<RULE, COUPLED, W>(x, t + 1, row);
    V u0 = fma<W>(-w0.erase, a[0], w0.write * w0.v);
    V a1 = fma<W>(u0, broadcast_lanes<W>(x.pairs[t]), w0.keep * a[1]);
    V u1 = fma<W>(-w1.erase, a1, w1.write * w1.v);
    store_lanes<W>(recalled + t * width, a[0]);
    store_lanes<W>(recalled + (t + 1) * width, a1);
    step(t, u0, w0.keep);
    step(t + 1, u1, w1.keep);
  }
  if (t < count) {
    V a[1];
    multiply<W, COLS, 1>(s, cols, {x.k.at(t)}, a);
    auto w = write_of<RULE, COUPLED, W>(x, t, row);
    store_lanes<W>(recalled + t * width, a[0]);
    step(t, fma<W>(-w.erase, a[0], w.write * w.v), w.keep);
  }
#pragma GCC unroll 16
  for (int j = 0; j < cols; ++j) store_lanes<W>(state + j * width + row, s[j]);
}

// What runs from token to token. Both kernels that carry g round it the same way, so that a segment may start
// from either's.
template <int W>
struct Carry {
  RowOf<W> keep, taken, dr;  // taken = erase h
  const float *k, *q;

  // Column j of g_{t-1}.
  inline __attribute__((always_inline)) RowOf<W> column(RowOf<W> g, int j) const {
    return fma<W>(-taken, broadcast_lanes<W>(k[j]), fma<W>(dr, broadcast_lanes<W>(q[j]), keep * g));
  }
  // h of the token before, from g.k' of its k' = k_{t-1}; kk = k_t.k', kq = q_t.k'.
  inline __attribute__((always_inline)) RowOf<W> before(RowOf<W> gk, float kk, float kq) const {
    return fma<W>(-taken, broadcast_lanes<W>(kk), fma<W>(dr, broadcast_lanes<W>(kq), keep * gk));
  }
};

// W rows of the state's gradient alone.
template <UpdateRule RULE, bool COUPLED, int W, int COLS>
void carry_rows(float* dstate, const Steps& steps, int row, int64_t count, const Stream& dreads) {
  using V = RowOf<W>;
  const Steps x = steps;
  const Stream reads = dreads;
  const int cols = COLS ? COLS : x.width;
  V g[COLS ? COLS : kMaxRank];
#pragma GCC unroll 16
  for (int j = 0; j < cols; ++j) g[j] = load_lanes<W>(dstate + j * cols + row);
  auto carry_of = [&](int64_t t, V h) __attribute__((always_inline)) {
    auto w = write_of<RULE, COUPLED, W>(x, t, row);
    return Carry<W>{w.keep, w.erase * h, load_lanes<W>(reads.at(t) + row), x.k.at(t), x.q.at(t)};
  };
  int64_t t = count - 1;
  if (count % 2 == 1) {
    V h[1];
    multiply<W, COLS, 1>(g, cols, {x.k.at(t)}, h);
    Carry<W> c = carry_of(t--, h[0]);
#pragma GCC unroll 16
    for (int j = 0; j < cols; ++j) g[j] = c.column(g[j], j);
  }
  for (; t > 0; t -= 2) {
    V h[2];
    multiply<W, COLS, 2>(g, cols, {x.k.at(t), x.k.at(t - 1)}, h);
    Carry<W> c = carry_of(t, h[0]);
    Carry<W> next = carry_of(t - 1, c.before(h[1], x.pairs[t - 1], x.pairs[t]));
    // the segment before, from the thread that ran the forward pass
    for (const Stream* a : {&x.q, &x.k, &x.beta, &reads}) __builtin_prefetch(a->at(t - count), 0);
#pragma GCC unroll 16
    for (int j = 0; j < cols; ++j) g[j] = next.column(c.column(g[j], j), j);
  }
#pragma GCC unroll 16
  for (int j = 0; j < cols; ++j) store_lanes<W>(dstate + j * cols + row, g[j]);
}

// The same where nothing is written: what the reads add.
template <int W, int COLS>
void carry_reads(float* dstate, const Steps& x, int row, int64_t count, const Stream& dreads) {
  using V = RowOf<W>;
  const int cols = COLS ? COLS : x.width;
  V g[COLS ? COLS : kMaxRank];
#pragma GCC unroll 16
  for (int j = 0; j < cols; ++j) g[j] = load_lanes<W>(dstate + j * cols + row);
  for (int64_t t = count - 1; t >= 0; --t) {
    const float* q = x.q.at(t);
    V dr = load_lanes<W>(dreads.at(t) + row);
#pragma GCC unroll 16
    for (int j = 0; j < cols; ++j) g[j] = fma<W>(dr, broadcast_lanes<W>(q[j]), g[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < cols; ++j) store_lanes<W>(dstate + j * cols + row, g[j]);
}

// All rows: dq and dk are sums over them.
template <UpdateRule RULE, bool COUPLED, int W, int COLS>
void reverse_rows(float* dstate, const Steps& steps, int64_t count, const float* history,
                  const float* recalled, const Stream& dreads, const StepGradients& out) {
  using V = RowOf<W>;
  constexpr int kGroups = COLS ? COLS / W : kMaxRank / W;
  const Steps x = steps;
  const int cols = COLS ? COLS : x.width, groups = cols / W, width = cols;
  V g[kGroups][COLS ? COLS : kMaxRank];
#pragma GCC unroll 2
  for (int i = 0; i < groups; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < cols; ++j) g[i][j] = load_lanes<W>(dstate + j * width + i * W);
  }
  // One token, from its h.
  auto step = [&](int64_t t, const V* h, Carry<W>* carry) __attribute__((always_inline)) {
    const float* s = history + t * width * width;
    V u[kGroups];
#pragma GCC unroll 2
    for (int i = 0; i < groups; ++i) {
      const int row = i * W;
      V a = load_lanes<W>(recalled + t * width + row);
      auto w = write_of<RULE, COUPLED, W>(x, t, row);
      carry[i] = {w.keep, w.erase * h[i], load_lanes<W>(dreads.at(t) + row), x.k.at(t), x.q.at(t)};
      u[i] = w.write * w.v - w.erase * a;
      V dkeep = V{}, odd = V{};
#pragma GCC unroll 16
      for (int j = 0; j < cols; j += 2) {
        dkeep = g[i][j] * load_lanes<W>(s + j * width + row) + dkeep;
        odd = g[i][j + 1] * load_lanes<W>(s + (j + 1) * width + row) + odd;
      }
      dkeep += odd;
      store_lanes<W>(out.v.at(t) + row, w.write * h[i]);
      V lam = COUPLED ? w.keep : load_lanes<W>(x.lam.at(t) + row);
      auto d = gates_bwd(RULE, COUPLED, Gates<V>{dkeep, -a * h[i], w.v * h[i]}, w.write, lam);
      store_lanes<W>(out.beta.at(t) + row, d.beta);
      if (!COUPLED) store_lanes<W>(out.lam.at(t) + row, d.lam);
    }
#pragma GCC unroll 2
    for (int block = 0; block < groups; ++block) {
      const int column = block * W;
      V sums[W];
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c) {
        sums[c] = carry[0].dr * load_lanes<W>(s + (column + c) * width);
#pragma GCC unroll 2
        for (int i = 1; i < groups; ++i) {
          sums[c] = carry[i].dr * load_lanes<W>(s + (column + c) * width + i * W) + sums[c];
        }
      }
      store_lanes<W>(out.q.at(t) + column, lane_sums<W>(sums));
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c) {
        sums[c] = u[0] * g[0][column + c] - carry[0].taken * load_lanes<W>(s + (column + c) * width);
#pragma GCC unroll 2
        for (int i = 1; i < groups; ++i) {
          sums[c] = u[i] * g[i][column + c] + sums[c];
          sums[c] = sums[c] - carry[i].taken * load_lanes<W>(s + (column + c) * width + i * W);
        }
      }
      store_lanes<W>(out.k.at(t) + column, lane_sums<W>(sums));
    }
#pragma GCC unroll 2
    for (int i = 0; i < groups; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < cols; ++j) g[i][j] = carry[i].column(g[i][j], j);
    }
  };
  // The segment before, into cache: of two tokens once, which is a cache line of narrow rows.
  auto fetch = [&](int64_t t) __attribute__((always_inline)) {
    for (const Stream* a : {&x.q, &x.k, &x.v, &x.beta, &dreads}) __builtin_prefetch(a->at(t), 0);
    for (const auto* a : {&out.q, &out.k, &out.v, &out.beta}) __builtin_prefetch(a->at(t), 1);
  };
  Carry<W> carry[kGroups];
  V h[kGroups], before[kGroups];
  int64_t t = count - 1;
  if (count % 2 == 1) {
#pragma GCC unroll 2
    for (int i = 0; i < groups; ++i) {
      V gk[1];
      multiply<W, COLS, 1>(g[i], cols, {x.k.at(t)}, gk);
      h[i] = gk[0];
    }
    step(t--, h, carry);
  }
  for (; t > 0; t -= 2) {
#pragma GCC unroll 2
    for (int i = 0; i < groups; ++i) {
      V gk[2];
      multiply<W, COLS, 2>(g[i], cols, {x.k.at(t), x.k.at(t - 1)}, gk);
      h[i] = gk[0], before[i] = gk[1];
    }
    step(t, h, carry);
    fetch(t - count);
#pragma GCC unroll 2
    for (int i = 0; i < groups; ++i) h[i] = carry[i].before(before[i], x.pairs[t - 1], x.pairs[t]);
    step(t - 1, h, carry);
  }
#pragma GCC unroll 2
  for (int i = 0; i < groups; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < cols; ++j) store_lanes<W>(dstate + j * width + i * W, g[i][j]);
  }
}

template <int W>
void reverse_reads(const Steps& x, int64_t count, const float* state, const Stream& dreads,
                   const StepGradients& out) {
  const int width = x.width;
  for (int64_t t = 0; t < count; ++t) {
    const float* dr = dreads.at(t);
    for (int block = 0; block < width; block += W) {
      RowOf<W> dq[W] = {};
      for (int c = 0; c < W; ++c) {
        for (int row = 0; row < width; row += W) {
          dq[c] = load_lanes<W>(dr + row) * load_lanes<W>(state + (block + c) * width + row) + dq[c];
        }
      }
      store_lanes<W>(out.q.at(t) + block, lane_sums<W>(dq));
    }
  }
}

}  // namespace

void replay(UpdateRule rule, float* state, const Steps& steps, int64_t count, float* history,
            float* recalled) {
  dispatch_kernel(rule, steps, [&](auto rule, auto coupled, auto lanes, auto columns) {
    constexpr int W = decltype(lanes)::value;
    for (int row = 0; row < steps.width; row += W) {
      replay_rows<UpdateRule(rule.value), coupled.value, W, columns.value>(state, steps, row, count, history,
                                                                           recalled);
    }
  });
}

void reverse(UpdateRule rule, float* dstate, const Steps& steps, int64_t count, const float* history,
             const float* recalled, const Stream& dreads, const StepGradients& out) {
  dispatch_kernel(rule, steps, [&](auto rule, auto coupled, auto lanes, auto columns) {
    reverse_rows<UpdateRule(rule.value), coupled.value, lanes.value, columns.value>(
        dstate, steps, count, history, recalled, dreads, out);
  });
}

void reverse_read_only(const Steps& steps, int64_t count, const float* state, const Stream& dreads,
                       const StepGradients& out) {
  dispatch_rank(steps.width,
                [&](auto lanes, auto) { reverse_reads<lanes.value>(steps, count, state, dreads, out); });
}

void carry(UpdateRule rule, float* dstate, const Steps& steps, int64_t count, const Stream& dreads) {
  dispatch_kernel(rule, steps, [&](auto rule, auto coupled, auto lanes, auto columns) {
    constexpr int W = decltype(lanes)::value;
    for (int row = 0; row < steps.width; row += W) {
      carry_rows<UpdateRule(rule.value), coupled.value, W, columns.value>(dstate, steps, row, count, dreads);
    }
  });
}

void carry_read_only(float* dstate, const Steps& steps, int64_t count, const Stream& dreads) {
  dispatch_rank(steps.width, [&](auto lanes, auto columns) {
    constexpr int W = decltype(lanes)::value;
    for (int row = 0; row < steps.width; row += W) {
      carry_reads<W, columns.value>(dstate, steps, row, count, dreads);
    }
  });
}

}  // namespace deltamem::DELTAMEM_ISA
