// delta_output forward: y = attn_proj + u (+ residual), u = delta_o reads or RMSNorm(delta_o reads) *
// rms_weight. Bound by memory: attn_proj, residual and y once. The channels are cut in pieces of kPiece, a
// warp's row; with a norm every block makes u of all pieces once for its sum of squares (hidden * H R FMAs a
// token, little beside one trip to memory), so that a token's bits depend neither on how the pieces are
// shared out nor on its neighbours.
#include "cuda/launch.cuh"
#include "cuda/prepare.cuh"
#include "cuda/shared_memory.cuh"

namespace deltamem::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kTokens = 8;
constexpr int kPiece = 128;

struct Sizes {
  int64_t T, tokens;
  int hidden, HR, pieces, blocks_per_token;  // a block has every blocks_per_token-th group of kWarps pieces
};

struct Scratch {
  float *reads, *squares;
  size_t bytes;
  DELTAMEM_HD Scratch(Carver carver, const Sizes& s, bool has_norm)
      : reads(carver.take<float>(kTokens * s.HR)),
        squares(has_norm ? carver.take<float>(kTokens * s.pieces) : nullptr),
        bytes(carver.used()) {}
};

template <int kHR>
using Piece = HeadPreparation<kPiece, kHR>;

DELTAMEM_DEVICE int length_of(const Sizes& s, int piece) {
  const int rest = s.hidden - piece * kPiece;
  return rest < kPiece ? rest : kPiece;
}

// squares [kTokens, pieces] = sums of u's squares
template <int kHR>
DELTAMEM_DEVICE void sum_squares(const Correction& weights, const Sizes& s, int count,
                                 const Scratch& scratch) {
  for (int n = ptx::warp(); n < s.pieces; n += kWarps) {
    const Piece<kHR> piece(weights, int64_t{n} * kPiece, length_of(s, n), s.HR);
    for (int i = 0; i < count; ++i) {
      float u[kPiece / 32] = {}, sum = 0.0f;
      piece.correct(scratch.reads + i * s.HR, u);
#pragma unroll
      for (int c = 0; c < kPiece / 32; ++c) sum += u[c] * u[c];
      sum = sum_of_warp(sum);
      if (ptx::lane() == 0) scratch.squares[i * s.pieces + n] = sum;
    }
  }
  ptx::sync_block();
}

template <int kHR>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    output_kernel(const __grid_constant__ DeltaOutputParams p, const __grid_constant__ Correction weights,
                  const __grid_constant__ Sizes s) {
  const bool has_norm = static_cast<bool>(p.rms_weight);
  const Scratch scratch(Carver::of_block(), s, has_norm);
  const int64_t first = ptx::block() / s.blocks_per_token * kTokens;
  const int count = s.tokens - first < kTokens ? s.tokens - first : kTokens;
  for (int i = ptx::warp(); i < count; i += kWarps) {
    load_reads(p.reads, (first + i) / s.T, (first + i) % s.T, scratch.reads + i * s.HR);
  }
  ptx::sync_block();
  if (has_norm) sum_squares<kHR>(weights, s, count, scratch);

  const int group = ptx::block() % s.blocks_per_token;
  for (int n = group * kWarps + ptx::warp(); n < s.pieces; n += s.blocks_per_token * kWarps) {
    const Piece<kHR> piece(weights, int64_t{n} * kPiece, length_of(s, n), s.HR);
    float norm[kPiece / 32] = {};
    if (has_norm) {
#pragma unroll
      for (int c = 0; c < kPiece / 32; ++c) {
        if (piece.channel(c) < piece.D()) norm[c] = load_float(p.rms_weight, n * kPiece + piece.channel(c));
      }
    }
    for (int i = 0; i < count; ++i) {
      const int64_t batch = (first + i) / s.T, t = (first + i) % s.T;
      float u[kPiece / 32] = {}, x[kPiece / 32], residual[kPiece / 32] = {};
      dispatch_float(p.attn_proj.dtype, [&](auto type) {
        piece.load(p.attn_proj.at<decltype(type)>(batch, t) + n * kPiece, x);
        if (p.residual) piece.load(p.residual.at<decltype(type)>(batch, t) + n * kPiece, residual);
      });
      piece.correct(scratch.reads + i * s.HR, u);
      float scale = 1.0f;
      if (has_norm) {
        float squares = 0.0f;
        for (int k = 0; k < s.pieces; ++k) squares += scratch.squares[i * s.pieces + k];
        scale = 1.0f / sqrtf(squares / static_cast<float>(s.hidden) + p.rms_eps);
      }
#pragma unroll
      for (int c = 0; c < kPiece / 32; ++c) x[c] += (has_norm ? u[c] * scale * norm[c] : u[c]) + residual[c];
      dispatch_float(p.y.dtype,
                     [&](auto type) { piece.store(p.y.at<decltype(type)>(batch, t) + n * kPiece, x); });
    }
  }
}

}  // namespace

void delta_output_fwd(const DeltaOutputParams& p, Call& call) {
  const Tensor& x = p.attn_proj;
  const int64_t tokens = x.size[0] * x.size[1], hidden = x.size[2];
  if (tokens == 0 || hidden == 0) return;
  const int64_t pieces = ceil_div(hidden, int64_t{kPiece}), groups = ceil_div(pieces, int64_t{kWarps});
  const int64_t token_blocks = ceil_div(tokens, int64_t{kTokens});
  // few tokens: the pieces are shared out, too
  const int64_t wanted = ceil_div(int64_t{2} * call.properties.multiprocessors, token_blocks);
  const int64_t per_token = wanted < groups ? wanted : groups;
  const Sizes s{x.size[1],
                tokens,
                static_cast<int>(hidden),
                static_cast<int>(p.reads.size[2] * p.reads.size[3]),
                static_cast<int>(pieces),
                static_cast<int>(per_token)};
  const ptx::LaunchShape shape{token_blocks * per_token, kWarps * kWarp,
                               Scratch(Carver(), s, static_cast<bool>(p.rms_weight)).bytes};
  const Correction weights{p.delta_o, {}};
  if (s.HR == 8) {
    launch<output_kernel<8>>(call, shape, p, weights, s);
  } else {
    launch<output_kernel<0>>(call, shape, p, weights, s);
  }
}

}  // namespace deltamem::cuda
