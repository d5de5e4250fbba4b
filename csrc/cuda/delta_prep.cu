// delta_prep forward: every row is read once, prepared in fp32 and stored once, in place of a copy into the
// cache where there is one. Bound by memory: a warp stays on one head for kTokens tokens, so that the head's
// weights are read once for them and the loads of one token do not wait for the sums of the one before.
#include "cuda/launch.cuh"
#include "cuda/prepare.cuh"
#include "cuda/shared_memory.cuh"
#include "rows.h"

namespace deltamem::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kTokens = 16;

// Where prepared rows go, and which tokens have any.
struct Target {
  Tensor q, k, v;        // [B, T, heads, D], or of a cache
  Tensor cache_seqlens;  // absent: no cache
  Tensor block_table;
  Tensor state_indices;

  // Row of token `index` of its row of the call.
  DELTAMEM_DEVICE int64_t offset(const Tensor& out, int64_t batch, int64_t t, int64_t row, int64_t index,
                                 int64_t h) const {
    if (!cache_seqlens) return out.offset(batch, t, h);
    const int64_t slot = *cache_seqlens.at<int32_t>(row) + index;
    if (!block_table) return out.offset(row, slot, h);
    const int64_t page_size = out.size[1];
    return out.offset(*block_table.at<int32_t>(row, slot / page_size), slot % page_size, h);
  }
};

struct Scratch {
  float *row, *reads;
  size_t bytes;
  DELTAMEM_HD Scratch(Carver carver, int kD, int HR)
      : row(carver.take<float>(kWarps * kD)), reads(carver.take<float>(kTokens * HR)), bytes(carver.used()) {}
};

// Block: kTokens tokens of kWarps heads, counted through q, k and v.
template <int kD, int kHR>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    prep_kernel(const __grid_constant__ DeltaPrepParams p, const __grid_constant__ Target to, int64_t T,
                int64_t tokens, int head_blocks) {
  const int HQ = p.q ? p.q.size[2] : 0, HK = p.k ? p.k.size[2] : 0, HV = p.v ? p.v.size[2] : 0;
  const int HR = p.reads ? p.reads.size[2] * p.reads.size[3] : 0;
  const Scratch scratch(Carver::of_block(), kD, HR);
  const int64_t first = ptx::block() / head_blocks * kTokens;
  const int count = tokens - first < kTokens ? tokens - first : kTokens;
  for (int i = ptx::warp(); i < count && HR > 0; i += kWarps) {
    load_reads(p.reads, (first + i) / T, (first + i) % T, scratch.reads + i * HR);
  }
  ptx::sync_block();

  const int n = ptx::block() % head_blocks * kWarps + ptx::warp();
  if (n >= HQ + HK + HV) return;
  const int which = n < HQ ? 0 : n < HQ + HK ? 1 : 2;
  const int h = which == 0 ? n : which == 1 ? n - HQ : n - HQ - HK;
  const Tensor& x = which == 0 ? p.q : which == 1 ? p.k : p.v;
  const Tensor& out = which == 0 ? to.q : which == 1 ? to.k : to.v;
  const int D = x.size[3];
  const HeadPreparation<kD, kHR> head(which == 0   ? p.on_q
                                      : which == 1 ? p.on_k
                                                   : p.on_v,
                                      int64_t{h} * D, D, HR);

#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int64_t batch = (first + i) / T, t = (first + i) % T;
    const int64_t row = row_of(p.rows, batch, t);
    const bool live = row >= 0 && !is_masked(p.rows, batch, t) && !is_padding(to.state_indices, row);
    if (!live && to.cache_seqlens) continue;
    float y[kD / 32] = {};
    int64_t index = 0;
    if (live) {
      index = t - row_span(p.rows, row, T).start;
      const int64_t slot = to.cache_seqlens ? *to.cache_seqlens.at<int32_t>(row) + index : index;
      dispatch_float(x.dtype, [&](auto type) { head.load(x.at<decltype(type)>(batch, t, h), y); });
      head.prepare(scratch.reads + i * HR, p.norm_eps, which == 2 ? nullptr : &p.rotary,
                   {batch, t, position_of(p.rotary, batch, t, slot)}, scratch.row + ptx::warp() * kD, y);
    }
    const int64_t place = to.offset(out, batch, t, row, index, h);
    dispatch_float(x.dtype,
                   [&](auto type) { head.store(static_cast<decltype(type)*>(out.data) + place, y); });
  }
}

template <int kD>
void queue(const DeltaPrepParams& p, const Target& to, Call& call) {
  const Tensor& x = p.q ? p.q : p.k ? p.k : p.v;
  const int64_t tokens = x.size[0] * x.size[1];
  const int64_t heads = p.q.size[2] + p.k.size[2] + p.v.size[2];
  const int HR = p.reads ? static_cast<int>(p.reads.size[2] * p.reads.size[3]) : 0;
  const int head_blocks = static_cast<int>(ceil_div(heads, int64_t{kWarps}));
  const ptx::LaunchShape shape{ceil_div(tokens, int64_t{kTokens}) * head_blocks, kWarps * kWarp,
                               Scratch(Carver(), kD, HR).bytes};
  const int64_t T = x.size[1];
  if (HR == 8) {
    launch<prep_kernel<kD, 8>>(call, shape, p, to, T, tokens, head_blocks);
  } else {
    launch<prep_kernel<kD, 0>>(call, shape, p, to, T, tokens, head_blocks);
  }
}

void queue(const DeltaPrepParams& p, const Target& to, Call& call) {
  const int64_t D = (p.q ? p.q : p.k ? p.k : p.v).size[3];
  if (D <= 64) return queue<64>(p, to, call);
  if (D <= 128) return queue<128>(p, to, call);
  queue<256>(p, to, call);
}

}  // namespace

void delta_prep_fwd(const DeltaPrepParams& p, Call& call) {
  queue(p, {p.q_prep, p.k_prep, p.v_prep, {}, {}, {}}, call);
}

void delta_prep_with_kvcache(const DeltaPrepCacheParams& p, Call& call) {
  queue(p.prep,
        {{}, p.cache.k_cache, p.cache.v_cache, p.cache.cache_seqlens, p.cache.block_table, p.state_indices},
        call);
}

}  // namespace deltamem::cuda
