// reads_t = S_{t-1} q_t and the update of S, token after token. A row of the state is a lane; columns are
// vectors.
#include "cpu/kernels.h"
#include "cpu/scan.h"

namespace deltamem::DELTAMEM_ISA {
namespace {

// y[m] = S x[m] for M vectors x[m], S as columns s[j]. Accumulators are split to shorten the chain of
// additions.
template <int W, int COLS, int M>
inline __attribute__((always_inline)) void multiply(const RowOf<W>* s, int cols, const float* const (&x)[M],
                                                    RowOf<W> (&y)[M]) {
  constexpr int A = COLS ? 4 : 2;
  RowOf<W> sum[M][A];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) sum[m][a] = s[a] * x[m][a];
  }
#pragma GCC unroll 16
  for (int j = A; j < cols; j += A) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) sum[m][a] = s[j + a] * x[m][j + a] + sum[m][a];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
    y[m] = A == 4 ? (sum[m][0] + sum[m][1]) + (sum[m][2] + sum[m][3]) : sum[m][0] + sum[m][1];
}

// W rows of the state, from row `row` on. Two tokens a turn, both from the state before the first:
//   S_t k' = keep (S_{t-1} k') + u (k . k'), so the chain from state to state is passed once for two tokens.
template <int W, int COLS>
void advance_rows(float* state, const Steps& x, int row, int64_t count, float* reads, int64_t stride) {
  using V = RowOf<W>;
  const int cols = COLS ? COLS : x.width;
  V s[COLS ? COLS : kMaxRank];
#pragma GCC unroll 16
  for (int j = 0; j < cols; ++j) s[j] = load_lanes<W>(state + j * x.width + row);
  auto at = [row](const Stream& stream, int64_t t) { return load_lanes<W>(stream.at(t) + row); };

  int64_t t = 0;
  for (; t + 2 <= count; t += 2) {
    const float *k0 = x.k.at(t), *k1 = x.k.at(t + 1);
    V y[4];  // S k0, S k1, S q0, S q1
    multiply<W, COLS, 4>(s, cols, {k0, k1, x.q.at(t), x.q.at(t + 1)}, y);
    float kk = x.kk[t / 2], kq = x.kq[t / 2];
    V keep0 = at(x.keep, t), keep1 = at(x.keep, t + 1), erase1 = at(x.erase, t + 1);
    V u0 = at(x.write, t) * at(x.v, t) - at(x.erase, t) * y[0];
    V u1 = at(x.write, t + 1) * at(x.v, t + 1) - (erase1 * keep0) * y[1];
    u1 = u1 - (erase1 * kk) * u0;
    store_lanes<W>(reads + t * stride + row, y[2]);
    store_lanes<W>(reads + (t + 1) * stride + row, u0 * kq + keep0 * y[3]);
    V keep = keep0 * keep1, w0 = keep1 * u0;
#pragma GCC unroll 16
    for (int j = 0; j < cols; ++j) s[j] = u1 * k1[j] + (w0 * k0[j] + keep * s[j]);
  }
  if (t < count) {
    const float* k = x.k.at(t);
    V y[2];  // S k, S q
    multiply<W, COLS, 2>(s, cols, {k, x.q.at(t)}, y);
    V keep = at(x.keep, t), u = at(x.write, t) * at(x.v, t) - at(x.erase, t) * y[0];
    store_lanes<W>(reads + t * stride + row, y[1]);
#pragma GCC unroll 16
    for (int j = 0; j < cols; ++j) s[j] = u * k[j] + keep * s[j];
  }
#pragma GCC unroll 16
  for (int j = 0; j < cols; ++j) store_lanes<W>(state + j * x.width + row, s[j]);
}

template <int W, int COLS>
void read_rows(const float* state, const Steps& x, int row, int64_t count, float* reads, int64_t stride) {
  const int cols = COLS ? COLS : x.width;
  RowOf<W> s[COLS ? COLS : kMaxRank];
#pragma GCC unroll 16
  for (int j = 0; j < cols; ++j) s[j] = load_lanes<W>(state + j * x.width + row);
  for (int64_t t = 0; t < count; ++t) {
    RowOf<W> y[1];
    multiply<W, COLS, 1>(s, cols, {x.q.at(t)}, y);
    store_lanes<W>(reads + t * stride + row, y[0]);
  }
}

// Stores the state of (row n, head) to its output slot; slot < 0: nothing.
void store_slot(const StatePool& pool, int32_t slot, int64_t head, const float* state) {
  if (slot >= 0) store_state(pool.state_pool, slot, head, state);
}

int team(int num_threads, int64_t items) {
  return static_cast<int>(max<int64_t>(1, min<int64_t>(num_threads, items)));
}

void zero_rows(const Tensor& reads, int64_t batch, int64_t first, int64_t count) {
  for (int64_t t = first; t < first + count; ++t) {
    for (int64_t h = 0; h < reads.size[2]; ++h) {
      std::memset(reads.at<float>(batch, t, h), 0, reads.size[3] * sizeof(float));
    }
  }
}

}  // namespace

void advance(float* state, const Steps& steps, int64_t count, float* reads, int64_t stride) {
  dispatch_rank(steps.width, [&](auto lanes, auto columns) {
    constexpr int W = decltype(lanes)::value, COLS = decltype(columns)::value;
    for (int row = 0; row < steps.width; row += W)
      advance_rows<W, COLS>(state, steps, row, count, reads, stride);
  });
}

void read_only(const float* state, const Steps& steps, int64_t count, float* reads, int64_t stride) {
  dispatch_rank(steps.width, [&](auto lanes, auto columns) {
    constexpr int W = decltype(lanes)::value, COLS = decltype(columns)::value;
    for (int row = 0; row < steps.width; row += W)
      read_rows<W, COLS>(state, steps, row, count, reads, stride);
  });
}

void load_state(const Tensor& source, int64_t i0, int64_t i1, int64_t rank, float* state) {
  const int width = padded_rank(rank);
  if (!source || rank < width) std::memset(state, 0, width * width * sizeof(float));
  if (!source) return;
  for (int64_t i = 0; i < rank; ++i) {
    const float* row = source.at<float>(i0, i1, i);
    for (int64_t j = 0; j < rank; ++j) state[j * width + i] = row[j];
  }
}

void store_state(const Tensor& target, int64_t i0, int64_t i1, const float* state) {
  const int64_t rank = target.size[3];
  const int width = padded_rank(rank);
  for (int64_t i = 0; i < rank; ++i) {
    float* row = target.at<float>(i0, i1, i);
    for (int64_t j = 0; j < rank; ++j) row[j] = state[j * width + i];
  }
}

ScanScratch::ScanScratch(const Memory& memory, int64_t tokens)
    : loader(memory, tokens),
      state(padded_rank(memory.mem_q.size[3]) * padded_rank(memory.mem_q.size[3])),
      reads(min(tokens, kBlock) * padded_rank(memory.mem_q.size[3])) {}

void scan_tokens(const Memory& memory, const Rows& rows, int64_t batch, int64_t first, int64_t count,
                 int64_t head, const Tensor& reads, ScanScratch& scratch) {
  const int64_t rank = reads.size[3], end = first + count;
  for (int64_t t = first; t < end;) {
    int64_t n = 0;
    while (n < min(kBlock, end - t) && !is_masked(rows, batch, t + n)) ++n;
    if (n == 0) {
      std::memset(reads.at<float>(batch, t++, head), 0, rank * sizeof(float));
      continue;
    }
    Steps steps = scratch.loader.load(batch, t, n, head);
    const bool padded = rank < steps.width;
    float* target = padded ? scratch.reads.data : reads.at<float>(batch, t, head);
    const int64_t stride = padded ? steps.width : reads.stride[1];
    if (memory.write) {
      advance(scratch.state, steps, n, target, stride);
    } else {
      read_only(scratch.state, steps, n, target, stride);
    }
    for (int64_t i = 0; padded && i < n; ++i) {
      std::memcpy(reads.at<float>(batch, t + i, head), target + i * stride, rank * sizeof(float));
    }
    t += n;
  }
}

void zero_reads_past_end(const Rows& rows, const Tensor& reads) {
  if (!rows.cu_seqlens) return;
  const int64_t end = packed_end(rows);
  zero_rows(reads, 0, end, reads.size[1] - end);
}

void delta_scan_fwd(const DeltaScanParams& p, int num_threads) {
  const Tensor& q = p.memory.mem_q;
  const int64_t tokens = q.size[1], heads = q.size[2], rank = q.size[3];
  const int64_t items = num_rows(p.rows, q.size[0]) * heads;
  const int64_t L = p.segment_len;
#pragma omp parallel for num_threads(team(num_threads, items)) schedule(dynamic) if (items > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t row = item / heads, head = item % heads;
    const Span span = row_span(p.rows, row, tokens);
    const int64_t step = p.tape ? L : span.length;
    int64_t segment = p.rows.cu_seqlens ? span.start / L + row : row * ceil_div(tokens, L);
    ScanScratch scratch(p.memory, span.length);
    load_state(p.initial_state, row, head, rank, scratch.state);
    for (int64_t t = 0; t < span.length; t += step, ++segment) {
      if (p.tape) store_state(p.tape, segment, head, scratch.state);
      scan_tokens(p.memory, p.rows, span.batch, span.start + t, min(step, span.length - t), head, p.reads,
                  scratch);
    }
    store_state(p.final_state, row, head, scratch.state);
  }
  zero_reads_past_end(p.rows, p.reads);
}

void scan_pool_row(const Memory& memory, const Rows& rows, const StatePool& pool, const Tensor& reads,
                   int64_t row) {
  const Span span = row_span(rows, row, reads.size[1]);
  const Tensor &in = pool.state_indices, &out = pool.output_state_indices;
  if (is_padding(in, row)) return zero_rows(reads, span.batch, span.start, span.length);

  const int32_t slot = in ? *in.at<int32_t>(row) : static_cast<int32_t>(row);
  const bool loaded = !pool.has_initial_state || *pool.has_initial_state.at<bool>(row);
  const bool each_token = out && out.ndim == 2;
  const int64_t step = each_token ? 1 : span.length;
  ScanScratch scratch(memory, step);
  for (int64_t head = 0; head < reads.size[2]; ++head) {
    load_state(loaded ? pool.state_pool : Tensor{}, slot, head, reads.size[3], scratch.state);
    for (int64_t t = 0; t < span.length; t += step) {
      scan_tokens(memory, rows, span.batch, span.start + t, step, head, reads, scratch);
      if (each_token) store_slot(pool, *out.at<int32_t>(span.batch, span.start + t), head, scratch.state);
    }
    if (!each_token) store_slot(pool, out ? *out.at<int32_t>(row) : slot, head, scratch.state);
  }
}

void delta_scan_with_state_pool(const DeltaScanPoolParams& p, int num_threads) {
  const int64_t items = num_rows(p.rows, p.reads.size[0]);
#pragma omp parallel for num_threads(team(num_threads, items)) schedule(dynamic) if (items > 1)
  for (int64_t row = 0; row < items; ++row) scan_pool_row(p.memory, p.rows, p.pool, p.reads, row);
  zero_reads_past_end(p.rows, p.reads);
}

}  // namespace deltamem::DELTAMEM_ISA
