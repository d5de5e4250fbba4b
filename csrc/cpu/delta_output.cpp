// delta_output forward: y = attn_proj + u (+ residual), u = delta_o reads or RMSNorm(delta_o reads) *
// rms_weight. One pass over attn_proj, residual and y; u stays in cache. The mean square of u is summed by
// channels in a fixed order, so a token's bits depend neither on the other tokens nor on threads.
#include "cpu/correction.h"
#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {

namespace {

// Channels at a time: their weights and u stay in the first-level cache.
constexpr int64_t kChannels = 256;
// Tokens at a time: a piece of the weights is loaded once for all.
constexpr int64_t kTokens = 4;
// Elements of y below which another thread costs more than it does.
constexpr int64_t kElementsPerThread = 1 << 15;

struct Pieces {
  const DeltaOutputParams& p;
  int64_t T, tokens, hidden, count;  // count of channel pieces
  CorrectionWeights weights;
  Buffer<float> rms;        // [hidden]
  Buffer<float> no_inputs;  // [kChannels] zeros, the row that u is added to before its norm

  Pieces(const DeltaOutputParams& p, int num_threads)
      : p(p),
        T(p.attn_proj.size[1]),
        tokens(p.attn_proj.size[0] * T),
        hidden(p.attn_proj.size[2]),
        count(ceil_div(hidden, kChannels)),
        weights({p.delta_o, {}}, count, kChannels, p.reads.size[2] * p.reads.size[3], p.rms_eps,
                tokens > kTokens, num_threads),
        rms(p.rms_weight ? hidden : 0),
        no_inputs(kChannels) {
    if (p.rms_weight) load_row(p.rms_weight, 0, 0, 0, rms, hidden);
    std::memset(no_inputs.data, 0, kChannels * sizeof(float));
  }
};

// y = u * scale * weight + x (+ residual); weight null: u has x in it.
template <class T>
void finish_row(const float* u, float scale, const float* weight, const T* x, const T* residual, T* y,
                int64_t n) {
  int64_t i = 0;
  for (; i < n; i += kWidth) {
    const int rest = static_cast<int>(min<int64_t>(n - i, kWidth));
    const bool whole = rest == kWidth;
    F32 sum = whole ? load(u + i) : load_n(u + i, rest);
    if (weight != nullptr) {
      sum = sum * scale * (whole ? load(weight + i) : load_n(weight + i, rest));
      sum = sum + (whole ? load(x + i) : load_n(x + i, rest));
    }
    if (residual != nullptr) sum = sum + (whole ? load(residual + i) : load_n(residual + i, rest));
    if (whole) {
      store(y + i, sum);
    } else {
      store_n(y + i, sum, rest);
    }
  }
}

// One piece of the channels for tokens [first, first + length). u: the piece of token i at u + i * hidden.
template <class T>
struct Piece {
  const Pieces& all;
  int64_t first, length, piece;

  // u, or attn_proj + u where no norm stands between; squares[i * count + piece] = the sum of u's squares.
  void project(float* u, float* squares, float* weight_scratch, float* reads_scratch) const {
    const DeltaOutputParams& p = all.p;
    const HeadCorrection weight = all.weights.head(piece, weight_scratch);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t b = (first + i) / all.T, t = (first + i) % all.T;
      const float* reads = reads_row(p.reads, b, t, reads_scratch);
      float* out = u + i * all.hidden;
      if (p.rms_weight) {
        squares[i * all.count + piece] = correct_row(all.no_inputs.data, weight, reads, out);
      } else {
        correct_row(p.attn_proj.at<T>(b, t) + piece * kChannels, weight, reads, out);
      }
    }
  }

  void finish(const float* u, const float* squares) const {
    const DeltaOutputParams& p = all.p;
    const int64_t c = piece * kChannels, n = min(kChannels, all.hidden - c);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t b = (first + i) / all.T, t = (first + i) % all.T;
      float scale = 1.0f;
      if (p.rms_weight) {
        float sum = 0.0f;
        for (int64_t k = 0; k < all.count; ++k) sum += squares[i * all.count + k];
        scale = rms_scale(sum, all.hidden, p.rms_eps);
      }
      const T* residual = p.residual ? p.residual.at<T>(b, t) + c : nullptr;
      finish_row(u + i * all.hidden, scale, p.rms_weight ? all.rms.data + c : nullptr,
                 p.attn_proj.at<T>(b, t) + c, residual, p.y.at<T>(b, t) + c, n);
    }
  }
};

// Many tokens: a thread has whole rows. Few: the channels are cut, too, and the norm needs all of them first.
template <class T>
void add_correction(const DeltaOutputParams& p, int num_threads) {
  const Pieces all(p, num_threads);
  const int64_t blocks = ceil_div(all.tokens, kTokens);
  const bool whole_rows = blocks >= num_threads;
  const int64_t kept = whole_rows ? kTokens : all.tokens;  // tokens whose u is held at a time
  Buffer<float> shared_u(whole_rows ? 0 : kept * all.hidden),
      shared_squares(whole_rows ? 0 : kept * all.count);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Buffer<float> weight_scratch(all.weights.scratch_size()),
        reads_scratch(p.reads.size[2] * p.reads.size[3]);
    if (whole_rows) {
      Buffer<float> u(kept * all.hidden), squares(kept * all.count);
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kTokens, length = min(kTokens, all.tokens - first);
        for (int64_t c = 0; c < all.count; ++c) {
          const Piece<T> piece{all, first, length, c};
          piece.project(u + c * kChannels, squares, weight_scratch, reads_scratch);
          if (!p.rms_weight) piece.finish(u + c * kChannels, squares);
        }
        for (int64_t c = 0; p.rms_weight && c < all.count; ++c) {
          Piece<T>{all, first, length, c}.finish(u + c * kChannels, squares);
        }
      }
    } else {
      for (int step = 0; step < (p.rms_weight ? 2 : 1); ++step) {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < blocks * all.count; ++item) {
          const int64_t first = item / all.count * kTokens, c = item % all.count;
          const Piece<T> piece{all, first, min(kTokens, all.tokens - first), c};
          float *u = shared_u + first * all.hidden + c * kChannels,
                *squares = shared_squares + first * all.count;
          if (step == 0) piece.project(u, squares, weight_scratch, reads_scratch);
          if (step == 1 || !p.rms_weight) piece.finish(u, squares);
        }
      }
    }
  }
}

}  // namespace

void delta_output_fwd(const DeltaOutputParams& p, int num_threads) {
  const Tensor& x = p.attn_proj;
  const int64_t elements = x.size[0] * x.size[1] * x.size[2];
  if (elements == 0) return;
  const int threads = static_cast<int>(min<int64_t>(num_threads, ceil_div(elements, kElementsPerThread)));
  dispatch_float(x.dtype, [&](auto type) { add_correction<decltype(type)>(p, threads); });
}

}  // namespace deltamem::DELTAMEM_ISA
