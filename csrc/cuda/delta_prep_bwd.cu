// delta_prep backward. A block takes a part of the tokens and all heads: warp w has heads w, w + kBwdWarps,
// ..., counted through q, k and v, and goes through a chunk of tokens with each. It makes the row again,
// turns the gradient back through RoPE and RMSNorm, and stores it as the raw row's; see correction_bwd.cuh
// for the weights' and the reads'.
#include "cuda/correction_bwd.cuh"
#include "cuda/shared_memory.cuh"
#include "rows.h"

namespace deltamem::cuda {

namespace {

struct Sizes : Parts {
  int HQ, HK, HV;
  int64_t delta_floats, part_floats;  // of a part: [heads, D, HR], then norms [2, kD]

  DELTAMEM_HD int heads() const { return HQ + HK + HV; }
};

struct Scratch {
  float *row, *reads, *norms, *dreads;
  size_t bytes;
  // dreads_in_shared: else it is had from the workspace
  DELTAMEM_HD Scratch(Carver carver, int kD, int HR, bool dreads_in_shared)
      : row(carver.take<float>(kBwdWarps * kD)),
        reads(carver.take<float>(kChunk * HR)),
        norms(carver.take<float>(kBwdWarps * 2 * kD)),
        dreads(dreads_in_shared ? carver.take<float>(kBwdWarps * kChunk * HR) : nullptr),
        bytes(carver.used()) {}
};

// dy = gradient of the corrected row c, from that of the prepared row; dnorm += that of the norm weight.
template <int kD, int kHR>
DELTAMEM_DEVICE void prepare_bwd(const HeadPreparation<kD, kHR>& head, bool has_norm, float eps,
                                 const Rotary* rotary, const TokenPlace& place, float* scratch,
                                 const float (&c)[kD / 32], float (&dy)[kD / 32], float (&dnorm)[kD / 32]) {
  if (rotary != nullptr && rotary->cos) head.rotate(*rotary, place, scratch, dy, -1.0f);
  if (!has_norm) return;
  const float scale = head.rms_scale(c, eps);
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < kD / 32; ++i) {
    dnorm[i] += dy[i] * c[i] * scale;
    dy[i] *= head.norm(i);
    dot += dy[i] * c[i];
  }
  dot = sum_of_warp(dot) / static_cast<float>(head.D()) * scale * scale;
#pragma unroll
  for (int i = 0; i < kD / 32; ++i) dy[i] = (dy[i] - c[i] * dot) * scale;
}

// One warp: head n for the `count` tokens from `first` on. sums: this part's.
template <int kD, int kHR>
DELTAMEM_DEVICE void head_bwd(const DeltaPrepBwdParams& p, const Sizes& s, int n, int64_t first, int count,
                              bool is_first_chunk, const Scratch& scratch, float* dreads, float* sums) {
  const DeltaPrepParams& f = p.fwd;
  const int which = n < s.HQ ? 0 : n < s.HQ + s.HK ? 1 : 2;
  const int h = which == 0 ? n : which == 1 ? n - s.HQ : n - s.HQ - s.HK;
  const Correction& on = which == 0 ? f.on_q : which == 1 ? f.on_k : f.on_v;
  const Tensor& x = which == 0 ? f.q : which == 1 ? f.k : f.v;
  const Tensor& dy = which == 0 ? p.dq_prep : which == 1 ? p.dk_prep : p.dv_prep;
  const Tensor& dx = which == 0 ? p.dq : which == 1 ? p.dk : p.dv;
  const int D = x.size[3];
  const HeadPreparation<kD, kHR> head(on, int64_t{h} * D, D, s.HR);
  const bool corrects = static_cast<bool>(on.delta);
  DeltaGradient<kD, kHR> gradient(sums + int64_t{n} * D * s.HR, D, corrects ? s.HR : 0, is_first_chunk);
  float dnorm[kD / 32] = {};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int64_t batch = (first + i) / s.T, t = (first + i) % s.T;
    const int64_t row = row_of(f.rows, batch, t);
    const float* reads = scratch.reads + i * s.HR;
    float c[kD / 32] = {}, g[kD / 32] = {};
    if (row >= 0 && dy) {
      dispatch_float(x.dtype, [&](auto type) {
        head.load(x.at<decltype(type)>(batch, t, h), c);
        head.load(dy.at<decltype(type)>(batch, t, h), g);
      });
      head.correct(reads, c);
      const int64_t position = position_of(f.rotary, batch, t, t - row_span(f.rows, row, s.T).start);
      prepare_bwd(head, static_cast<bool>(on.norm), f.norm_eps, which == 2 ? nullptr : &f.rotary,
                  {batch, t, position}, scratch.row + ptx::warp() * kD, c, g, dnorm);
      if (corrects) {
        gradient.add(g, reads);
        add_dreads(head, g, s.HR, dreads + i * s.HR);
      }
    }
    dispatch_float(x.dtype, [&](auto type) { head.store(dx.at<decltype(type)>(batch, t, h), g); });
  }
  if (corrects) gradient.store();
  if (!on.norm) return;
#pragma unroll
  for (int i = 0; i < kD / 32; ++i)
    scratch.norms[(ptx::warp() * 2 + which) * kD + head.channel(i)] += dnorm[i];
}

template <int kD, int kHR>
__global__ void __launch_bounds__(kBwdWarps* kWarp, 1)
    prep_bwd_kernel(const __grid_constant__ DeltaPrepBwdParams p, const __grid_constant__ Sizes s,
                    float* parts, float* dreads_rows) {
  const Scratch scratch(Carver::of_block(), kD, s.HR, kHR > 0);
  const int thread = ptx::thread();
  float* sums = parts + ptx::block() * s.part_floats;
  float* dreads =
      kHR > 0 ? scratch.dreads : dreads_rows + ptx::block() * (int64_t{kBwdWarps} * kChunk * s.HR);
  for (int i = thread; i < kBwdWarps * 2 * kD; i += kBwdWarps * kWarp) scratch.norms[i] = 0.0f;
  const auto walk_heads = [&](int64_t first, int count, float* own_dreads, bool is_first_chunk) {
#pragma unroll 1
    for (int n = ptx::warp(); n < s.heads(); n += kBwdWarps) {
      head_bwd<kD, kHR>(p, s, n, first, count, is_first_chunk, scratch, own_dreads, sums);
    }
  };
  walk_chunks(s, p.fwd.reads, p.dreads, scratch.reads, dreads, walk_heads);
  ptx::sync_block();
  for (int i = thread; i < 2 * kD; i += kBwdWarps * kWarp) {
    sums[s.delta_floats + i] = sum_of_warps(scratch.norms, 2 * kD, i);
  }
}

// The gradients of a token's RoPE rows, summed over the heads of q, then of k. One warp a token.
template <int kD>
__global__ void __launch_bounds__(kBwdWarps* kWarp, 1)
    rotary_bwd_kernel(const __grid_constant__ DeltaPrepBwdParams p, const __grid_constant__ Sizes s) {
  using Head = HeadPreparation<kD, 0>;
  const DeltaPrepParams& f = p.fwd;
  Carver carver = Carver::of_block();
  float* row = carver.take<float>(2 * kBwdWarps * kD) + ptx::warp() * 2 * kD;
  float* reads = carver.take<float>(kBwdWarps * s.HR) + ptx::warp() * s.HR;
  const int64_t token = ptx::block() * kBwdWarps + ptx::warp();
  if (token >= s.tokens) return;
  const int64_t batch = token / s.T, t = token % s.T;
  const int half = f.rotary.cos.size[f.rotary.cos.ndim - 1];
  if (s.HR > 0) load_reads(f.reads, batch, t, reads);
  ptx::sync_warp();
  float dcos[kD / 32] = {}, dsin[kD / 32] = {};
  for (int n = 0; n < s.HQ + s.HK && row_of(f.rows, batch, t) >= 0; ++n) {
    const bool is_q = n < s.HQ;
    const int h = is_q ? n : n - s.HQ;
    const Tensor &x = is_q ? f.q : f.k, &dy = is_q ? p.dq_prep : p.dk_prep;
    if (!dy) continue;
    const int D = x.size[3];
    const Head head(is_q ? f.on_q : f.on_k, int64_t{h} * D, D, s.HR);
    float y[kD / 32], g[kD / 32];
    dispatch_float(x.dtype, [&](auto type) {
      head.load(x.at<decltype(type)>(batch, t, h), y);
      head.load(dy.at<decltype(type)>(batch, t, h), g);
    });
    head.prepare(reads, f.norm_eps, nullptr, {}, row, y);
    Head::exchange(row, y);
    Head::exchange(row + kD, g);
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) {
      const int d = Head::channel(i);
      const typename Head::RotaryPair pair(f.rotary, d, half);
      if (d >= 2 * half || !pair.is_first) continue;
      dcos[i] += g[i] * y[i] + row[kD + pair.partner] * row[pair.partner];
      dsin[i] += row[kD + pair.partner] * y[i] - g[i] * row[pair.partner];
    }
  }
#pragma unroll
  for (int i = 0; i < kD / 32; ++i) {
    const int d = Head::channel(i);
    const typename Head::RotaryPair pair(f.rotary, d, half);
    if (d >= 2 * half || !pair.is_first) continue;
    *(p.drotary_cos.at<float>(batch, t) + pair.index) = dcos[i];
    *(p.drotary_sin.at<float>(batch, t) + pair.index) = dsin[i];
  }
}

template <int kD>
void queue(const DeltaPrepBwdParams& p, Sizes s, int64_t D, Call& call) {
  const int64_t parts = s.count();
  s.delta_floats = s.heads() * D * s.HR;
  s.part_floats = s.delta_floats + 2 * kD;
  float* sums = call.allocate_array<float>(parts * s.part_floats);
  const bool tuned = s.HR == 8;
  float* dreads_rows = tuned ? nullptr : call.allocate_array<float>(parts * kBwdWarps * kChunk * s.HR);
  const ptx::LaunchShape shape{parts, kBwdWarps * kWarp, Scratch(Carver(), kD, s.HR, tuned).bytes};
  if (tuned) {
    launch<prep_bwd_kernel<kD, 8>>(call, shape, p, s, sums, dreads_rows);
  } else {
    launch<prep_bwd_kernel<kD, 0>>(call, shape, p, s, sums, dreads_rows);
  }
  const auto sum = [&](int64_t at, int64_t count, const Tensor& out) {
    sum_parts(call, sums + at, parts, s.part_floats, count, out);
  };
  sum(0, s.HQ * D * s.HR, p.ddelta_q);
  sum(s.HQ * D * s.HR, s.HK * D * s.HR, p.ddelta_k);
  sum((s.HQ + s.HK) * D * s.HR, s.HV * D * s.HR, p.ddelta_v);
  sum(s.delta_floats, D, p.dq_norm);
  sum(s.delta_floats + kD, D, p.dk_norm);
  if (!p.drotary_cos) return;
  const size_t bytes = [&] {
    Carver carver;
    carver.take<float>(2 * kBwdWarps * kD);
    carver.take<float>(kBwdWarps * s.HR);
    return carver.used();
  }();
  launch<rotary_bwd_kernel<kD>>(call, {ceil_div(s.tokens, int64_t{kBwdWarps}), kBwdWarps * kWarp, bytes}, p,
                                s);
}

}  // namespace

void delta_prep_bwd(const DeltaPrepBwdParams& p, Call& call) {
  const DeltaPrepParams& f = p.fwd;
  const Tensor& x = f.q ? f.q : f.k ? f.k : f.v;
  const int HR = f.reads ? static_cast<int>(f.reads.size[2] * f.reads.size[3]) : 0;
  const int64_t D = x.size[3];
  const Sizes s{Parts(x.size[1], x.size[0] * x.size[1], HR),
                static_cast<int>(f.q.size[2]),
                static_cast<int>(f.k.size[2]),
                static_cast<int>(f.v.size[2]),
                0,
                0};
  if (D <= 64) return queue<64>(p, s, D, call);
  if (D <= 128) return queue<128>(p, s, D, call);
  queue<256>(p, s, D, call);
}

}  // namespace deltamem::cuda
