// reads_t = S_{t-1} q_t and the update of S, token after token. A row of the state is a lane; columns are
// vectors.
#include "cpu/kernels.h"
#include "cpu/scan_kernel.h"

namespace deltamem::DELTAMEM_ISA {
namespace {

// W rows of the state, from row `row` on. Two tokens a turn, both from the state before the first:
//   S_t k' = keep (S_{t-1} k') + u (k . k'), so the chain from state to state is passed once for two tokens.
// Of a sum of products the first one written becomes the FMA's, so the one that is ready last stands first.
template <UpdateRule RULE, bool COUPLED, int W, int COLS>
void advance_rows(float* state, const Steps& steps, int row, int64_t count, float* reads, int64_t stride) {
  using V = RowOf<W>;
  const Steps x = steps;
  const int cols = COLS ? COLS : x.width;
  V s[COLS ? COLS : kMaxRank];
#pragma GCC unroll 16
  for (int j = 0; j < cols; ++j) s[j] = load_lanes<W>(state + j * x.width + row);
  reads += row;

  int64_t t = 0;
  for (; t + 2 <= count; t += 2) {
    const float *k0 = x.k.at(t), *k1 = x.k.at(t + 1);
    V y[4];  // S k0, S k1, S q0, S q1
    multiply<W, COLS, 4>(s, cols, {k0, k1, x.q.at(t), x.q.at(t + 1)}, y);
    auto w0 = write_of<RULE, COUPLED, W>(x, t, row), w1 = write_of<RULE, COUPLED, W>(x, t + 1, row);
    const float kk = x.pairs[t], kq = x.pairs[t + 1];
    V wrote0 = w0.write * w0.v;
    V u0 = fma<W>(-w0.erase, y[0], wrote0), kept0 = fma<W>(-w1.keep * w0.erase, y[0], w1.keep * wrote0);
    V u1 = fma<W>(-w1.erase * w0.keep, y[1], w1.write * w1.v);
    u1 = fma<W>(-w1.erase * kk, u0, u1);
    store_lanes<W>(reads + t * stride, y[2]);
    store_lanes<W>(reads + (t + 1) * stride, u0 * kq + w0.keep * y[3]);
    V keep = w0.keep * w1.keep;
#pragma GCC unroll 16
    for (int j = 0; j < cols; ++j) s[j] = u1 * k1[j] + (kept0 * k0[j] + keep * s[j]);
  }
  if (t < count) {
    const float* k = x.k.at(t);
    V y[2];  // S k, S q
    multiply<W, COLS, 2>(s, cols, {k, x.q.at(t)}, y);
    auto w = write_of<RULE, COUPLED, W>(x, t, row);
    V u = fma<W>(-w.erase, y[0], w.write * w.v);
    store_lanes<W>(reads + t * stride, y[1]);
#pragma GCC unroll 16
    for (int j = 0; j < cols; ++j) s[j] = u * k[j] + w.keep * s[j];
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

// target[j][i] <- source[i][j]
void transpose_state(const float* source, int64_t source_stride, float* target, int64_t target_stride,
                     int64_t rank) {
  dispatch_rank(padded_rank(rank), [&](auto lanes, auto columns) {
    constexpr int W = decltype(lanes)::value;
    if (rank == W && W == decltype(columns)::value) {
      RowOf<W> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = load_lanes<W>(source + i * source_stride);
      transpose<W>(x);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) store_lanes<W>(target + j * target_stride, x[j]);
      return;
    }
    for (int64_t i = 0; i < rank; ++i) {
      for (int64_t j = 0; j < rank; ++j) target[j * target_stride + i] = source[i * source_stride + j];
    }
  });
}

// slot < 0: nothing is stored.
void store_slot(const StatePool& pool, int32_t slot, int64_t head, const float* state) {
  if (slot >= 0) store_state(pool.state_pool, slot, head, state);
}

// reads <- 0 for `count` tokens of one head.
void zero_reads(const Tensor& reads, int64_t batch, int64_t first, int64_t count, int64_t head) {
  for (int64_t t = first; t < first + count; ++t) {
    std::memset(reads.at<float>(batch, t, head), 0, reads.size[3] * sizeof(float));
  }
}

void scan_pool_head(const Memory& memory, const Rows& rows, const StatePool& pool, const Tensor& reads,
                    int64_t row, int64_t head) {
  const Span span = row_span(rows, row, reads.size[1]);
  const Tensor &in = pool.state_indices, &out = pool.output_state_indices;
  if (is_padding(in, row)) return zero_reads(reads, span.batch, span.start, span.length, head);

  const int32_t slot = in ? *in.at<int32_t>(row) : static_cast<int32_t>(row);
  const bool loaded = !pool.has_initial_state || *pool.has_initial_state.at<bool>(row);
  const bool each_token = out && out.ndim == 2;
  const int64_t step = each_token ? 1 : span.length;
  ScanScratch scratch(memory, step);
  load_state(loaded ? pool.state_pool : Tensor{}, slot, head, reads.size[3], scratch.state);
  for (int64_t t = 0; t < span.length; t += step) {
    scan_tokens(memory, rows, span.batch, span.start + t, step, head, reads, scratch);
    if (each_token) store_slot(pool, *out.at<int32_t>(span.batch, span.start + t), head, scratch.state);
  }
  if (!each_token) store_slot(pool, out ? *out.at<int32_t>(row) : slot, head, scratch.state);
}

}  // namespace

void advance(UpdateRule rule, float* state, const Steps& steps, int64_t count, float* reads, int64_t stride) {
  dispatch_kernel(rule, steps, [&](auto rule, auto coupled, auto lanes, auto columns) {
    for (int row = 0; row < steps.width; row += lanes.value) {
      advance_rows<UpdateRule(rule.value), coupled.value, lanes.value, columns.value>(state, steps, row,
                                                                                      count, reads, stride);
    }
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
  if (source) transpose_state(source.at<float>(i0, i1), source.stride[2], state, width, rank);
}

void store_state(const Tensor& target, int64_t i0, int64_t i1, const float* state) {
  const int64_t rank = target.size[3];
  transpose_state(state, padded_rank(rank), target.at<float>(i0, i1), target.stride[2], rank);
}

ScanScratch::ScanScratch(const Memory& memory, int64_t tokens)
    : loader(memory, min(tokens, kBlock)),
      state(padded_rank(memory.mem_q.size[3]) * padded_rank(memory.mem_q.size[3])),
      reads(min(tokens, kBlock) * padded_rank(memory.mem_q.size[3])) {}

int64_t run_length(const Rows& rows, int64_t batch, int64_t first, int64_t count) {
  if (!rows.token_mask) return count;
  int64_t n = 0;
  while (n < count && !is_masked(rows, batch, first + n)) ++n;
  return n;
}

void scan_tokens(const Memory& memory, const Rows& rows, int64_t batch, int64_t first, int64_t count,
                 int64_t head, const Tensor& reads, ScanScratch& scratch) {
  const int64_t rank = reads.size[3], end = first + count;
  for (int64_t t = first; t < end;) {
    const int64_t n = run_length(rows, batch, t, min(kBlock, end - t));
    if (n == 0) {
      std::memset(reads.at<float>(batch, t++, head), 0, rank * sizeof(float));
      continue;
    }
    Steps steps = scratch.loader.load(batch, t, n, head);
    const bool padded = rank < steps.width;
    float* target = padded ? scratch.reads.data : reads.at<float>(batch, t, head);
    const int64_t stride = padded ? steps.width : reads.stride[1];
    if (memory.write) {
      advance(memory.update_rule, scratch.state, steps, n, target, stride);
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
  for (int64_t h = 0; h < reads.size[2]; ++h) zero_reads(reads, 0, end, reads.size[1] - end, h);
}

void delta_scan_fwd(const DeltaScanParams& p, int num_threads) {
  const Tensor& q = p.memory.mem_q;
  const int64_t tokens = q.size[1], heads = q.size[2], rank = q.size[3];
  const int64_t items = num_rows(p.rows, q.size[0]) * heads;
  const int64_t L = p.segment_len;
#pragma omp parallel num_threads(team(num_threads, items)) if (items > 1)
  {
    ScanScratch scratch(p.memory, tokens);
#pragma omp for schedule(dynamic) nowait
    for (int64_t item = 0; item < items; ++item) {
      const int64_t row = item / heads, head = item % heads;
      const Span span = row_span(p.rows, row, tokens);
      const int64_t step = p.tape ? L : span.length;
      int64_t segment = p.rows.cu_seqlens ? span.start / L + row : row * ceil_div(tokens, L);
      load_state(p.initial_state, row, head, rank, scratch.state);
      for (int64_t t = 0; t < span.length; t += step, ++segment) {
        if (p.tape) store_state(p.tape, segment, head, scratch.state);
        scan_tokens(p.memory, p.rows, span.batch, span.start + t, min(step, span.length - t), head, p.reads,
                    scratch);
      }
      store_state(p.final_state, row, head, scratch.state);
    }
  }
  zero_reads_past_end(p.rows, p.reads);
}

void scan_pool_row(const Memory& memory, const Rows& rows, const StatePool& pool, const Tensor& reads,
                   int64_t row) {
  for (int64_t head = 0; head < reads.size[2]; ++head) scan_pool_head(memory, rows, pool, reads, row, head);
}

void delta_scan_with_state_pool(const DeltaScanPoolParams& p, int num_threads) {
  const int64_t heads = p.reads.size[2], items = num_rows(p.rows, p.reads.size[0]) * heads;
#pragma omp parallel for num_threads(team(num_threads, items)) schedule(dynamic) if (items > 1)
  for (int64_t item = 0; item < items; ++item) {
    scan_pool_head(p.memory, p.rows, p.pool, p.reads, item / heads, item % heads);
  }
  zero_reads_past_end(p.rows, p.reads);
}

}  // namespace deltamem::DELTAMEM_ISA
