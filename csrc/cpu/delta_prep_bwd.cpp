// delta_prep backward. A thread takes whole tokens, so a token's dreads and table gradients are summed over
// the heads in order; weight gradients are summed over tokens through TokenSums.
#include "cpu/correction_bwd.h"
#include "cpu/kernels.h"
#include "cpu/prep_tokens.h"

namespace deltamem::DELTAMEM_ISA {

namespace {

static_assert(kBlock == kTokenBlock);

// One of q, k, v, and where its sums start in a part.
struct Path {
  const Projection& projection;
  Tensor dy, dx, ddelta, dnorm;
  int64_t D, delta_size, delta_at = 0, norm_at = 0;

  Path(const Projection& projection, const Tensor& dy, const Tensor& dx, const Tensor& ddelta,
       const Tensor& dnorm, int64_t* floats)
      : projection(projection),
        dy(dy),
        dx(dx),
        ddelta(ddelta),
        dnorm(dnorm),
        D(projection.x.size[3]),
        delta_size(ddelta ? ddelta.size[1] * round_up(D, kWidth) : 0) {
    delta_at = *floats;
    norm_at = delta_at + projection.heads * delta_size;
    *floats = norm_at + (dnorm ? round_up(D, kWidth) : 0);
  }
};

// What a block's tokens gather from all heads, and scratch rows; all zero beyond what is filled.
struct Scratch {
  Buffer<float> reads, cos, sin;   // [kBlock, HR], [kBlock, rotary_half]: gradients
  Buffer<float> x, dc, corrected;  // [padded D], [kBlock, padded D], [padded D]
  Buffer<float> norm;              // [padded D]: gradient, of one projection
  Buffer<float> no_reads;          // [HR] zeros, of dead tokens
  int64_t HR, half;

  Scratch(int64_t HR, int64_t half, int64_t padded)
      : reads(kBlock * HR),
        cos(kBlock * half),
        sin(kBlock * half),
        x(padded),
        dc(kBlock * padded),
        corrected(padded),
        norm(padded),
        no_reads(HR),
        HR(HR),
        half(half) {
    std::memset(no_reads.data, 0, HR * sizeof(float));
  }

  void clear_tokens() {
    std::memset(reads.data, 0, kBlock * HR * sizeof(float));
    std::memset(cos.data, 0, kBlock * half * sizeof(float));
    std::memset(sin.data, 0, kBlock * half * sizeof(float));
  }
};

void head_bwd(const Path& path, int64_t h, const Token* block, int length, bool rotary_grad, Scratch& scratch,
              float* sums) {
  const HeadCorrection head = path.projection.weights.head(h, nullptr);
  const int64_t padded = head.padded();
  const bool rotated = path.projection.rotated;
  std::memset(scratch.dc.data, 0, kBlock * padded * sizeof(float));
  std::memset(scratch.corrected.data, 0, padded * sizeof(float));
  const float* reads[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    reads[i] = i < length && block[i].live ? block[i].inputs.reads : scratch.no_reads.data;
    if (i >= length) continue;
    const Token& token = block[i];
    float* dc = scratch.dc + i * padded;
    if (token.live && path.dy) {
      const TokenInputs inputs = rotated ? token.inputs : without_rotary(token.inputs);
      const bool tables = rotary_grad && rotated;
      load_row(path.dy, token.batch, token.t, h, dc, head.D);
      load_row(path.projection.x, token.batch, token.t, h, scratch.x, head.D);
      prepare_row_bwd(scratch.x, head, inputs, dc, scratch.corrected, scratch.norm,
                      tables ? scratch.cos + i * scratch.half : nullptr,
                      tables ? scratch.sin + i * scratch.half : nullptr);
    }
    store_row(path.dx, token.batch, token.t, h, dc, head.D);
  }
  if (head.delta == nullptr || !path.dy) return;
  correction_gradients(head, scratch.dc, reads, scratch.reads, sums + path.delta_at + h * path.delta_size);
}

void store_token_gradients(const DeltaPrepBwdParams& p, const Token* block, int length,
                           const Scratch& scratch) {
  for (int i = 0; i < length; ++i) {
    const int64_t b = block[i].batch, t = block[i].t;
    if (p.dreads)
      std::memcpy(p.dreads.at<float>(b, t), scratch.reads.data + i * scratch.HR, scratch.HR * sizeof(float));
    if (!p.drotary_cos) continue;
    std::memcpy(p.drotary_cos.at<float>(b, t), scratch.cos.data + i * scratch.half,
                scratch.half * sizeof(float));
    std::memcpy(p.drotary_sin.at<float>(b, t), scratch.sin.data + i * scratch.half,
                scratch.half * sizeof(float));
  }
}

}  // namespace

void delta_prep_bwd(const DeltaPrepBwdParams& p, int num_threads) {
  const Projections all(p.fwd, true, num_threads);
  const TokenBlocks tokens(p.fwd, {}, {});
  int64_t floats = 0;
  const Path paths[] = {{all.q, p.dq_prep, p.dq, p.ddelta_q, p.dq_norm, &floats},
                        {all.k, p.dk_prep, p.dk, p.ddelta_k, p.dk_norm, &floats},
                        {all.v, p.dv_prep, p.dv, p.ddelta_v, {}, &floats}};
  const int64_t HR = p.fwd.reads ? p.fwd.reads.size[2] * p.fwd.reads.size[3] : 0;
  TokenSums sums(tokens.count(), floats);
#pragma omp parallel num_threads(num_threads)
  {
    Scratch scratch(HR, rotary_half(p.fwd.rotary), round_up(largest_head_size(p.fwd), kWidth));
    Buffer<float> token_scratch(tokens.scratch_size());
    Token block[kTokenBlock];
#pragma omp for schedule(static)
    for (int64_t part = 0; part < sums.parts(); ++part) {
      sums.clear(part);
      for (int64_t n = sums.first_block(part); n < sums.first_block(part + 1); ++n) {
        const int length = tokens.fill(n, block, token_scratch);
        scratch.clear_tokens();
        for (const Path& path : paths) {
          const int64_t norm_size = path.dnorm ? round_up(path.D, kWidth) : 0;
          std::memset(scratch.norm.data, 0, norm_size * sizeof(float));
          for (int64_t h = 0; h < path.projection.heads; ++h) {
            head_bwd(path, h, block, length, static_cast<bool>(p.drotary_cos), scratch, sums.part(part));
          }
          sums.add(part, path.norm_at, scratch.norm, norm_size);
        }
        store_token_gradients(p, block, length, scratch);
      }
    }
    for (const Path& path : paths) {
      if (!path.ddelta) continue;
#pragma omp for schedule(static)
      for (int64_t h = 0; h < path.projection.heads; ++h) {
        store_weight_gradient(sums, path.delta_at + h * path.delta_size, path.ddelta, h * path.D, path.D);
      }
    }
  }
  for (const Path& path : paths) {
    if (path.dnorm) store_norm_gradient(sums, path.norm_at, path.dnorm);
  }
}

}  // namespace deltamem::DELTAMEM_ISA
