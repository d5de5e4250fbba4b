// delta_output backward: the reverse of a row of `hidden` channels, corrected from 0, in pieces of kPiece
// channels. A block takes a part of the tokens, chunk by chunk; with a norm it first sums over all pieces
// what RMSNorm's reverse needs of a token. attn_proj and residual get dy itself.
#include "cuda/correction_bwd.cuh"
#include "cuda/shared_memory.cuh"

namespace deltamem::cuda {

namespace {

constexpr int kPiece = 128, kChannels = kPiece / 32;

struct Sizes : Parts {
  int64_t delta_floats, part_floats;  // of a part: [hidden, HR], then rms_weight's [hidden]
  int hidden, pieces;
};

struct Scratch {
  float *reads, *sums, *dreads;
  size_t bytes;
  DELTAMEM_HD Scratch(Carver carver, const Sizes& s, bool has_norm, bool dreads_in_shared)
      : reads(carver.take<float>(kChunk * s.HR)),
        sums(has_norm ? carver.take<float>(2 * kChunk * s.pieces) : nullptr),
        dreads(dreads_in_shared ? carver.take<float>(kBwdWarps * kChunk * s.HR) : nullptr),
        bytes(carver.used()) {}
};

// One piece of the channels: its rows of dy, and of u = delta_o reads.
template <int kHR>
struct Piece {
  const DeltaOutputBwdParams& p;
  const Sizes& s;
  int first;  // channel
  HeadPreparation<kPiece, kHR> weights;

  DELTAMEM_DEVICE Piece(const DeltaOutputBwdParams& p, const Correction& on, const Sizes& s, int n)
      : p(p),
        s(s),
        first(n * kPiece),
        weights(on, first, s.hidden - first < kPiece ? s.hidden - first : kPiece, s.HR) {}

  // g = dy * rms_weight, u = delta_o reads
  DELTAMEM_DEVICE void load(int64_t token, const float* reads, float (&dy)[kChannels], float (&g)[kChannels],
                            float (&u)[kChannels]) const {
    dispatch_float(p.dy.dtype, [&](auto type) {
      weights.load(p.dy.at<decltype(type)>(token / s.T, token % s.T) + first, dy);
    });
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const bool inside = weights.channel(i) < weights.D();
      g[i] = p.rms_weight && inside ? dy[i] * load_float(p.rms_weight, first + weights.channel(i)) : dy[i];
      u[i] = 0.0f;
    }
    if (p.rms_weight) weights.correct(reads, u);
  }
};

// sums [kChunk, pieces, 2] = sum u^2, sum g u of each piece
template <int kHR>
DELTAMEM_DEVICE void sum_pieces(const DeltaOutputBwdParams& p, const Correction& on, const Sizes& s,
                                int64_t first, int count, const Scratch& scratch) {
  for (int n = ptx::warp(); n < s.pieces; n += kBwdWarps) {
    const Piece<kHR> piece(p, on, s, n);
    for (int i = 0; i < count; ++i) {
      float dy[kChannels], g[kChannels], u[kChannels], squares = 0.0f, dot = 0.0f;
      piece.load(first + i, scratch.reads + i * s.HR, dy, g, u);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) squares += u[c] * u[c], dot += g[c] * u[c];
      squares = sum_of_warp(squares), dot = sum_of_warp(dot);
      if (ptx::lane() == 0) {
        scratch.sums[2 * (i * s.pieces + n)] = squares;
        scratch.sums[2 * (i * s.pieces + n) + 1] = dot;
      }
    }
  }
  ptx::sync_block();
}

// One warp: piece n for the `count` tokens from `first` on.
template <int kHR>
DELTAMEM_DEVICE void piece_bwd(const DeltaOutputBwdParams& p, const Correction& on, const Sizes& s, int n,
                               int64_t first, int count, bool is_first_chunk, const Scratch& scratch,
                               float* dreads, float* part) {
  const Piece<kHR> piece(p, on, s, n);
  DeltaGradient<kPiece, kHR> gradient(part + int64_t{piece.first} * s.HR, piece.weights.D(), s.HR,
                                      is_first_chunk);
  float dnorm[kChannels] = {};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const float* reads = scratch.reads + i * s.HR;
    float dy[kChannels], du[kChannels], u[kChannels];
    piece.load(first + i, reads, dy, du, u);
    if (p.rms_weight) {
      float squares = 0.0f, dot = 0.0f;
      for (int k = 0; k < s.pieces; ++k) {
        squares += scratch.sums[2 * (i * s.pieces + k)];
        dot += scratch.sums[2 * (i * s.pieces + k) + 1];
      }
      const float scale = 1.0f / sqrtf(squares / static_cast<float>(s.hidden) + p.rms_eps);
      dot = dot / static_cast<float>(s.hidden) * scale * scale;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        dnorm[c] += dy[c] * u[c] * scale;
        du[c] = (du[c] - u[c] * dot) * scale;
      }
    }
    gradient.add(du, reads);
    add_dreads(piece.weights, du, s.HR, dreads + i * s.HR);
  }
  gradient.store();
  if (!p.rms_weight) return;
  float* norms = part + s.delta_floats + piece.first;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const int d = piece.weights.channel(c);
    if (d < piece.weights.D()) norms[d] = is_first_chunk ? dnorm[c] : norms[d] + dnorm[c];
  }
}

template <int kHR>
__global__ void __launch_bounds__(kBwdWarps* kWarp, 2)
    output_bwd_kernel(const __grid_constant__ DeltaOutputBwdParams p, const __grid_constant__ Correction on,
                      const __grid_constant__ Sizes s, float* parts, float* dreads_rows) {
  const Scratch scratch(Carver::of_block(), s, static_cast<bool>(p.rms_weight), kHR > 0);
  float* part = parts + ptx::block() * s.part_floats;
  float* dreads =
      kHR > 0 ? scratch.dreads : dreads_rows + ptx::block() * (int64_t{kBwdWarps} * kChunk * s.HR);
  const auto walk_pieces = [&](int64_t first, int count, float* own_dreads, bool is_first_chunk) {
    if (p.rms_weight) sum_pieces<kHR>(p, on, s, first, count, scratch);
#pragma unroll 1
    for (int n = ptx::warp(); n < s.pieces; n += kBwdWarps) {
      piece_bwd<kHR>(p, on, s, n, first, count, is_first_chunk, scratch, own_dreads, part);
    }
  };
  walk_chunks(s, p.reads, p.dreads, scratch.reads, dreads, walk_pieces);
}

}  // namespace

void delta_output_bwd(const DeltaOutputBwdParams& p, Call& call) {
  const int64_t tokens = p.dy.size[0] * p.dy.size[1], hidden = p.dy.size[2];
  const int HR = static_cast<int>(p.reads.size[2] * p.reads.size[3]);
  const Sizes s{Parts(p.dy.size[1], tokens, HR), hidden * HR, hidden * HR + hidden, static_cast<int>(hidden),
                static_cast<int>(ceil_div(hidden, int64_t{kPiece}))};
  const int64_t parts = s.count();
  float* sums = call.allocate_array<float>(parts * s.part_floats);
  const bool tuned = HR == 8;
  float* dreads_rows = tuned ? nullptr : call.allocate_array<float>(parts * kBwdWarps * kChunk * HR);
  const ptx::LaunchShape shape{parts, kBwdWarps * kWarp,
                               Scratch(Carver(), s, static_cast<bool>(p.rms_weight), tuned).bytes};
  const Correction on{p.delta_o, {}};
  if (tuned) {
    launch<output_bwd_kernel<8>>(call, shape, p, on, s, sums, dreads_rows);
  } else {
    launch<output_bwd_kernel<0>>(call, shape, p, on, s, sums, dreads_rows);
  }
  sum_parts(call, sums, parts, s.part_floats, s.delta_floats, p.ddelta_o);
  sum_parts(call, sums + s.delta_floats, parts, s.part_floats, hidden, p.drms_weight);
}

}  // namespace deltamem::cuda
