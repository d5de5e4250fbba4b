// Flash attention backward on prepared q, k, v, with P recomputed from lse:
//
//     P = exp(S - lse)     dS = P (dO V^T - delta)     delta = dO . O     dq = dS K     dk = dS^T Q     dv =
//     P^T dO
//
// Three launches: lse and delta as the others read them; dk and dv, a block per tile of keys, which walks the
// query columns of its kv head; dq, a block per tile of query columns, which walks the keys. Every result is
// written by one block in a fixed order: no atomics, the same bits in every run. Both walks are one shape:
// two tiles stay in shared memory, two come by, the next two on their way meanwhile; a warp holds 16 of the
// staying rows, and S, dP and the results in registers. Rows that are none come in as zeros with lse = inf.
//
// Floor: 14 D flops per visible (query, key) and head, against 10 where dq is added up by atomics.
#include "cuda/delta_attention.cuh"
#include "cuda/delta_attention_softmax.cuh"

namespace deltamem::cuda {

namespace {

constexpr int kStages = 2;
constexpr int kTokensOfBlock = 16;  // of the first launch

template <class T, int D>
struct BackwardTiles {
  Tile<T, D> staying_a, staying_b;  // [64, D]: q and dout, or k and v
  Tile<T, D> passing;               // kStages pairs of [64, D]: the others
  float2* statistics;               // [kStages, 64] of the passing columns: lse log2(e), delta
  ColumnTile *tile, *others;        // the staying columns, and their row as the passing ones
  int2* whole;                      // passing columns that see all of the keys
  size_t bytes;

  DELTAMEM_HD explicit BackwardTiles(Carver carver)
      : staying_a{carver.take<T, 128>(kKeys * D)},
        staying_b{carver.take<T, 128>(kKeys * D)},
        passing{carver.take<T, 128>(kStages * 2 * kKeys * D)},
        statistics(carver.take<float2>(kStages * kKeys)),
        tile(carver.take<ColumnTile>(1)),
        others(carver.take<ColumnTile>(1)),
        whole(carver.take<int2>(1)),
        bytes(carver.used()) {}

  DELTAMEM_DEVICE Tile<T, D> passing_a(int stage) const { return {passing.data + stage * 2 * kKeys * D}; }
  DELTAMEM_DEVICE Tile<T, D> passing_b(int stage) const {
    return {passing.data + (stage * 2 + 1) * kKeys * D};
  }
};

struct BackwardAlignment {
  bool dout, q, k, v, dq, dk, dv;
};

DELTAMEM_DEVICE int own_row(int r) { return ptx::warp() * 16 + r; }

// ---- lse and delta ---------------------------------------------------------------------------------------

// statistics [B, T, HQ] = (lse log2(e), delta); (inf, 0) of what is no query and of what saw nothing: P = 0.
template <class T, int D>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const __grid_constant__ DeltaAttentionBwdParams p, float2* statistics) {
  const int64_t tokens = p.q.size[1], heads = p.q.size[2], all = p.q.size[0] * tokens;
  constexpr int per_lane = D / 32;
  for (int64_t i = 0; i < kTokensOfBlock; ++i) {
    const int64_t at = ptx::block() * kTokensOfBlock + i;
    if (at >= all) return;
    const int64_t batch = at / tokens, token = at % tokens;
    const bool live = row_of(p.rows, batch, token) >= 0 && !is_masked(p.rows, batch, token);
    for (int64_t head = ptx::warp(); head < heads; head += kThreads / kWarp) {
      float2 found = {INFINITY, 0.0f};
      const float lse = live ? p.lse.at<float>(batch, head)[token * p.lse.stride[2]] : -INFINITY;
      if (lse != -INFINITY) {
        float a[per_lane], b[per_lane], sum = 0.0f;
        load_vector(p.dout.at<T>(batch, token, head) + ptx::lane() * per_lane, a);
        load_vector(p.out.at<T>(batch, token, head) + ptx::lane() * per_lane, b);
#pragma unroll
        for (int j = 0; j < per_lane; ++j) sum += a[j] * b[j];
        found = {lse * kLog2E, sum_of_warp(sum)};
      }
      if (ptx::lane() == 0) statistics[at * heads + head] = found;
    }
  }
}

// ---- what both walks share -------------------------------------------------------------------------------

// Rows of x [B, T, heads, D] at 64 columns of a tile's row from `first` on.
template <class T, int D>
DELTAMEM_DEVICE void load_columns(const Rows& rows, const ColumnTile& tile, const Tensor& x, bool aligned,
                                  int first, Tile<T, D> target) {
  load_rows<true>(target, aligned, [&](int i) -> const T* {
    const int column = first + i;
    if (column >= tile.live || is_masked(rows, tile.batch, tile.token(column))) return nullptr;
    return tile.row_of<T>(x, column);
  });
}

// Of column `column` of a tile's row.
DELTAMEM_DEVICE float2 statistic_of(const float2* statistics, int64_t tokens, int64_t heads,
                                    const ColumnTile& tile, int column) {
  if (column >= tile.live) return {INFINITY, 0.0f};
  return statistics[(tile.batch * tokens + tile.token(column)) * heads + tile.head(column)];
}

// How scores and their gradients come from products.
struct Curve {
  float scale, cap, bend;

  DELTAMEM_HD explicit Curve(const Softmax& softmax)
      : scale(softmax.scale * kLog2E),
        cap(softmax.softcap),
        bend(cap > 0 ? softmax.scale / softmax.softcap : 0.0f) {}
};

// s = P and dp = dS / scale, from the products s = q . k and dp = dout . v, where sees[h] has the element's
// bit; 0 elsewhere. statistic(n, i): of element s[n][i].
template <class StatisticOf>
DELTAMEM_DEVICE void differentiate(float (&s)[8][4], float (&dp)[8][4], const Curve& curve,
                                   const uint64_t (&sees)[2], StatisticOf&& statistic) {
  const int shift = ptx::lane() % 4 * 2;
  const uint64_t own[2] = {sees[0] >> shift, sees[1] >> shift};
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 known = statistic(n, i);
      float slope = 1.0f, score = s[n][i] * curve.scale;
      if (curve.cap > 0) {
        const float bent = tanh_of(s[n][i] * curve.bend);
        score = bent * (curve.cap * kLog2E);
        slope = 1.0f - bent * bent;
      }
      const float p = ptx::exp2(score - known.x);
      const bool is_seen = static_cast<uint32_t>(own[i / 2] >> (n / 4 * 32)) >> (n % 4 * 8 + i % 2) & 1;
      s[n][i] = is_seen ? p : 0.0f;
      dp[n][i] = is_seen ? p * (dp[n][i] - known.y) * slope : 0.0f;
    }
  }
}

// This warp's 16 rows of a result: out scale, rounded, through its rows of a tile that nobody reads any more;
// 0 where not live(row).
template <class T, int D, class LiveAt>
DELTAMEM_DEVICE void store_gradient(float (&out)[1][D / 8][4], float scale, const ColumnTile& tile,
                                    Tile<T, D> staging, const Tensor& target, bool aligned, LiveAt&& live) {
  const bool keep[2] = {live(own_row(ptx::lane() / 4)), live(own_row(ptx::lane() / 4 + 8))};
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[0][n][i] = keep[i / 2] ? out[0][n][i] * scale : 0.0f;
  }
  ptx::sync_warp();
  store_fragment(out[0], staging, own_row(0));
  ptx::sync_warp();
  store_rows(staging, own_row(0), aligned, [&](int row) -> T* {
    const int column = tile.first + row;
    return column < tile.columns ? tile.row_of<T>(target, column) : nullptr;
  });
}

// ---- dk, dv ----------------------------------------------------------------------------------------------

// Tokens [begin, end) of a row's queries that see the key at slot `key`.
DELTAMEM_DEVICE int2 queries_of_key(const Window& window, int length, int key) {
  return {greater(0, key - window.right), lesser(length, key + window.left + 1)};
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    dkdv_kernel(const __grid_constant__ DeltaAttentionBwdParams p, const __grid_constant__ Cut cut,
                const __grid_constant__ BackwardAlignment aligned, const float2* statistics) {
  const BackwardTiles<T, D> shared(Carver::of_block());
  const ColumnTile &keys = *shared.tile, &queries = *shared.others;
  const int heads = static_cast<int>(p.q.size[2]), group = heads / cut.kv_heads;
  if (ptx::thread() == 0) {
    *shared.tile = *shared.others =
        cut.tile_of_block<kKeys, false>([&](int row) { return self_sequence(p.rows, row, p.q.size[1]); });
    shared.others->group = group;
    shared.others->live *= group;
  }
  ptx::sync_block();
  if (keys.first >= keys.columns) return;
  const Window window(p.softmax);
  const Curve curve(p.softmax);
  const int last = lesser(keys.first + kKeys, keys.live) - 1;
  // columns that see one of the keys, and those that see all of them
  const int2 early = queries_of_key(window, keys.live, keys.first);
  const int2 late = queries_of_key(window, keys.live, last);
  const int2& whole = *shared.whole;
  if (ptx::thread() == 0) *shared.whole = {late.x * group, early.y * group};
  const int begin = early.x * group / kKeys * kKeys, end = last < keys.first ? begin : late.y * group;

  const auto load = [&](int first, int stage) {
    load_columns(p.rows, queries, p.q, aligned.q, first, shared.passing_a(stage));
    load_columns(p.rows, queries, p.dout, aligned.dout, first, shared.passing_b(stage));
    if (ptx::thread() < kKeys) {
      shared.statistics[stage * kKeys + ptx::thread()] =
          statistic_of(statistics, p.q.size[1], heads, queries, first + ptx::thread());
    }
  };
  load_columns(p.rows, keys, p.k, aligned.k, keys.first, shared.staying_a);
  load_columns(p.rows, keys, p.v, aligned.v, keys.first, shared.staying_b);
  if (begin < end) load(begin, 0);
  ptx::cp_async_commit();

  float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += kKeys, stage ^= 1) {
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // this pair has landed, and every warp is done with the one before
    if (first + kKeys < end) load(first + kKeys, stage ^ 1);
    ptx::cp_async_commit();
    float s[1][8][4] = {}, dp[1][8][4] = {};
    multiply(s, shared.staying_a, own_row(0), 0, shared.passing_a(stage));
    multiply(dp, shared.staying_b, own_row(0), 0, shared.passing_b(stage));
    uint64_t sees[2] = {~uint64_t(0), ~uint64_t(0)};
    if (first < whole.x || first + kKeys > whole.y) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int2 seen = queries_of_key(window, keys.live, keys.first + own_row(ptx::lane() / 4 + 8 * h));
        sees[h] = bits_of_range({seen.x * group, seen.y * group}, first);
      }
    }
    const float2* known = shared.statistics + stage * kKeys + ptx::lane() % 4 * 2;
    differentiate(s[0], dp[0], curve, sees, [&](int n, int i) { return known[n * 8 + i % 2]; });
    Rounded<1> weights, slopes;
    round_products<T>(s, weights);
    round_products<T>(dp, slopes);
    accumulate(dv, weights, shared.passing_b(stage));
    accumulate(dk, slopes, shared.passing_a(stage));
  }
  // a masked key's row ran along
  const auto live = [&](int row) {
    return keys.first + row < keys.live && !is_masked(p.rows, keys.batch, keys.token(keys.first + row));
  };
  store_gradient(dk, p.softmax.scale, keys, shared.staying_a, p.dk, aligned.dk, live);
  store_gradient(dv, 1.0f, keys, shared.staying_b, p.dv, aligned.dv, live);
}

// ---- dq --------------------------------------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    dq_kernel(const __grid_constant__ DeltaAttentionBwdParams p, const __grid_constant__ Cut cut,
              const __grid_constant__ BackwardAlignment aligned, const float2* statistics) {
  const BackwardTiles<T, D> shared(Carver::of_block());
  const ColumnTile &tile = *shared.tile, &keys = *shared.others;
  if (ptx::thread() == 0) {
    *shared.tile = *shared.others =
        cut.tile_of_block<kKeys, true>([&](int row) { return self_sequence(p.rows, row, p.q.size[1]); });
    shared.others->group = 1;
    shared.others->live = static_cast<int>(shared.tile->keys.end);
  }
  ptx::sync_block();
  if (tile.first >= tile.columns) return;
  const Window window(p.softmax);
  const Curve curve(p.softmax);
  const SeenByTile seen(window, tile, kKeys);

  const auto load = [&](int first, int stage) {
    load_columns(p.rows, keys, p.k, aligned.k, first, shared.passing_a(stage));
    load_columns(p.rows, keys, p.v, aligned.v, first, shared.passing_b(stage));
  };
  const int begin = seen.any.x / kKeys * kKeys, end = seen.any.y;
  load_columns(p.rows, tile, p.q, aligned.q, tile.first, shared.staying_a);
  load_columns(p.rows, tile, p.dout, aligned.dout, tile.first, shared.staying_b);
  if (begin < end) load(begin, 0);
  ptx::cp_async_commit();
  float2 known[2];
  int2 own[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int column = tile.first + own_row(ptx::lane() / 4 + 8 * h);
    known[h] = statistic_of(statistics, p.q.size[1], p.q.size[2], tile, column);
    own[h] = seen_from(window, tile, slot_of_column(p.rows, true, tile, column));
  }

  float dq[1][D / 8][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += kKeys, stage ^= 1) {
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // this pair has landed, and every warp is done with the one before
    if (first + kKeys < end) load(first + kKeys, stage ^ 1);
    ptx::cp_async_commit();
    float s[1][8][4] = {}, dp[1][8][4] = {};
    multiply(s, shared.staying_a, own_row(0), 0, shared.passing_a(stage));
    multiply(dp, shared.staying_b, own_row(0), 0, shared.passing_b(stage));
    uint64_t sees[2] = {~uint64_t(0), ~uint64_t(0)};
    if (first < seen.all.x || first + kKeys > seen.all.y || p.rows.token_mask) {
      // a hidden key's score is 0, which may lie far above the lse of those that are seen
      const uint64_t shown =
          shown_bits(p.rows, tile.batch, tile.start + first, bits_of_range(seen.any, first));
#pragma unroll
      for (int h = 0; h < 2; ++h) sees[h] = shown & bits_of_range(own[h], first);
    }
    differentiate(s[0], dp[0], curve, sees, [&](int, int i) { return known[i / 2]; });
    Rounded<1> slopes;
    round_products<T>(dp, slopes);
    accumulate(dq, slopes, shared.passing_a(stage));
  }
  store_gradient(dq, p.softmax.scale, tile, shared.staying_a, p.dq, aligned.dq, [&](int row) {
    return statistic_of(statistics, p.q.size[1], p.q.size[2], tile, tile.first + row).x != INFINITY;
  });
}

template <class T, int D>
void launch_backward(const DeltaAttentionBwdParams& p, Call& call) {
  const int64_t all = p.q.size[0] * p.q.size[1], kv_heads = p.k.size[2];
  float2* const statistics = call.allocate_array<float2>(all * p.q.size[2]);
  const BackwardAlignment aligned = {has_aligned_rows(p.dout), has_aligned_rows(p.q),  has_aligned_rows(p.k),
                                     has_aligned_rows(p.v),    has_aligned_rows(p.dq), has_aligned_rows(p.dk),
                                     has_aligned_rows(p.dv)};
  launch<statistics_kernel<T, D>>(call, {ceil_div(all, int64_t(kTokensOfBlock)), kThreads}, p, statistics);
  const size_t bytes = BackwardTiles<T, D>(Carver()).bytes;
  const Cut keys(p.k, kv_heads, p.rows), columns(p.q, kv_heads, p.rows);
  const float2* const known = statistics;
  launch<dkdv_kernel<T, D>>(call, {keys.num_blocks<kKeys>(), kThreads, bytes}, p, keys, aligned, known);
  launch<dq_kernel<T, D>>(call, {columns.num_blocks<kKeys>(), kThreads, bytes}, p, columns, aligned, known);
}

}  // namespace

void delta_attention_bwd(const DeltaAttentionBwdParams& p, Call& call) {
  if (p.q.size[0] * p.q.size[1] * p.q.size[2] == 0) return;
  dispatch_attention(p.q, call, [&](auto type, auto head_size) {
    launch_backward<decltype(type), decltype(head_size)::value>(p, call);
  });
}

}  // namespace deltamem::cuda
