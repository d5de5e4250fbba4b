// Flash attention backward, P recomputed from lse, in two loops that share no sums, so that neither needs
// atomics: tiles of query columns gather dq over blocks of keys, tiles of keys gather dk and dv over blocks
// of query columns.
//
//     P = exp(S - lse)     dS = P (dO V^T - delta)     delta = dO . O     dq = dS K     dk = dS^T Q     dv =
//     P^T dO
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/softmax.h"
#include "cpu/tiles.h"

namespace deltamem::DELTAMEM_ISA {

namespace {

// Memory of a thread. Both loops hold two operands of their tiles as lanes, and two of a block as row panels.
template <class Word>
struct Scratch {
  Buffer<Word> staged, rows_a, rows_b, columns_a, columns_b, lanes_a, lanes_b;
  Buffer<float> scores, dp, out_a, out_b, ones, lse, delta;
  Buffer<LaneMask> masks;
  Buffer<KeyRange> seen;  // by the queries of a block
  Buffer<bool> hidden;

  Scratch(const HeadDims<Word>& dims, int64_t tiles)
      : staged(kBlock * dims.width),
        rows_a(kBlock * dims.steps),
        rows_b(kBlock * dims.steps),
        columns_a(dims.panels * kPanel * kBlock / kTerms<Word>),
        columns_b(dims.panels * kPanel * kBlock / kTerms<Word>),
        lanes_a(tiles * dims.steps * kLanes),
        lanes_b(tiles * dims.steps * kLanes),
        scores(kBlock * kLanes),
        dp(kBlock * kLanes),
        out_a(tiles * dims.rows * kLanes),
        out_b(tiles * dims.rows * kLanes),
        ones(kLanes),
        lse(max(tiles * kLanes, kBlock)),
        delta(max(tiles * kLanes, kBlock)),
        masks(tiles),
        seen(kBlock),
        hidden(kBlock) {
    std::memset(staged, 0, sizeof(Word) * kBlock * dims.width);
    for (int i = 0; i < kLanes; ++i) ones[i] = 1.0f;
  }
};

template <class T>
class Backward {
 public:
  using Word = typename WordOf<T>::type;

  Backward(const DeltaAttentionBwdParams& p)
      : p_(p),
        batch_(p.q.size[0]),
        tokens_(p.q.size[1]),
        heads_(p.q.size[2]),
        kv_heads_(p.k.size[2]),
        group_(heads_ / max<int64_t>(kv_heads_, 1)),
        rows_(num_rows(p.rows, batch_)),
        dims_(p.q.size[3]),
        capped_(p.softmax.softcap > 0),
        scale_(capped_ ? p.softmax.scale / p.softmax.softcap : p.softmax.scale),
        inverse_cap_(capped_ ? 1.0f / p.softmax.softcap : 0.0f),
        lse_(batch_ * heads_ * tokens_),
        delta_(batch_ * heads_ * tokens_) {}

  void run(int num_threads) {
    const int64_t tile_bytes = kLanes * 4 * (2 * dims_.steps + 2 * dims_.rows);
    const TaskList queries(rows_, kv_heads_, tile_bytes, num_threads,
                           [&](int64_t row) { return row_span(p_.rows, row, tokens_).length * group_; });
    const TaskList keys(rows_, kv_heads_, tile_bytes, num_threads,
                        [&](int64_t row) { return row_span(p_.rows, row, tokens_).length; });
#pragma omp parallel num_threads(team_size(num_threads, (queries.count + keys.count) * kv_heads_))
    {
      Scratch<Word> scratch(dims_, max(queries.tiles, keys.tiles));
#pragma omp for schedule(static)
      for (int64_t i = 0; i < batch_ * tokens_; ++i) prepare_token(i / tokens_, i % tokens_);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < keys.count * kv_heads_; ++i) {
        const int64_t last = keys.count - 1;  // causal: the first keys are seen by the most queries
        reduce_keys(keys[last - i / kv_heads_], i % kv_heads_, keys.tiles, scratch);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < queries.count * kv_heads_; ++i) {
        reduce_queries(queries[i / kv_heads_], i % kv_heads_, queries.tiles, scratch);
      }
    }
  }

 private:
  // ---- columns: query m / G, head m % G of the group
  // -----------------------------------------------------------

  struct Column {
    int64_t query, token, head;
  };
  Column column(const Span& span, int64_t kv_head, int64_t m) const {
    return {m / group_, span.start + m / group_, kv_head * group_ + m % group_};
  }
  int64_t statistic(int64_t batch, const Column& c) const {
    return (batch * heads_ + c.head) * tokens_ + c.token;
  }

  // Row of a tensor of q's shape for column m, null if masked or past the end.
  const T* column_row(const Tensor& x, const Span& span, int64_t kv_head, int64_t m) const {
    const Column c = column(span, kv_head, m);
    if (c.query >= span.length || is_masked(p_.rows, span.batch, c.token)) return nullptr;
    return x.at<T>(span.batch, c.token, c.head);
  }

  KeyRange seen_by(const Sequence& sequence, int64_t query) const {
    const Span& span = sequence.span;
    if (query >= span.length || is_masked(p_.rows, span.batch, span.start + query)) return {0, 0};
    return visible_keys(p_.softmax, sequence.first_slot + query, sequence.keys);
  }

  const T* key_row(const Tensor& x, const Span& span, int64_t kv_head, int64_t slot) const {
    if (slot >= span.length || is_masked(p_.rows, span.batch, span.start + slot)) return nullptr;
    return x.at<T>(span.batch, span.start + slot, kv_head);
  }

  // lse (+inf where a query sees nothing, so that P = 0) and delta of a token's heads. Rows of no
  // sequence get their zeros here.
  void prepare_token(int64_t batch, int64_t token) {
    const bool inside = row_of(p_.rows, batch, token) >= 0;
    const bool live = inside && !is_masked(p_.rows, batch, token);
    for (int64_t head = 0; head < heads_; ++head) {
      const int64_t at = statistic(batch, {0, token, head});
      const float lse = live ? p_.lse.at<float>(batch, head)[token * p_.lse.stride[2]] : -__builtin_inff();
      lse_[at] = lse == -__builtin_inff() ? __builtin_inff() : lse;
      delta_[at] = live ? dot(p_.dout.at<T>(batch, token, head), p_.out.at<T>(batch, token, head)) : 0.0f;
      if (!inside) std::memset(p_.dq.at<T>(batch, token, head), 0, sizeof(T) * dims_.D);
    }
    for (int64_t head = 0; head < kv_heads_ && !inside; ++head) {
      std::memset(p_.dk.at<T>(batch, token, head), 0, sizeof(T) * dims_.D);
      std::memset(p_.dv.at<T>(batch, token, head), 0, sizeof(T) * dims_.D);
    }
  }

  float dot(const T* a, const T* b) const {
    F32 sum = zero();
    int64_t d = 0;
    for (; d + kWidth <= dims_.D; d += kWidth) sum = sum + load(a + d) * load(b + d);
    float total = reduce_add(sum);
    for (; d < dims_.D; ++d) total += to_float(a[d]) * to_float(b[d]);
    return total;
  }

  // ---- operands
  // ------------------------------------------------------------------------------------------------

  // count rows as lanes of consecutive tiles, zeros to the last vector's end.
  template <class RowAt>
  void load_lanes(int64_t count, Scratch<Word>& s, Word* lanes, RowAt&& row_at) const {
    for (int64_t base = 0; base < count; base += kWidth) {
      stage_rows<T>(kWidth, dims_, s.staged.data,
                    [&](int64_t i) -> const T* { return base + i < count ? row_at(base + i) : nullptr; });
      pack_lanes(s.staged.data, dims_, base % kLanes, lanes + base / kLanes * dims_.steps * kLanes);
    }
  }

  // A block's rows as row panels, and column panels if wanted; zeros to the last vector's end.
  template <class RowAt>
  void load_block(int64_t rows, Scratch<Word>& s, Word* row_panels, Word* column_panels,
                  RowAt&& row_at) const {
    const int64_t staged = round_up(rows, kWidth);
    stage_rows<T>(staged, dims_, s.staged.data,
                  [&](int64_t i) -> const T* { return i < rows ? row_at(i) : nullptr; });
    pack_row_panels(s.staged.data, dims_, staged, row_panels);
    if (column_panels != nullptr) pack_column_panels(s.staged.data, dims_, staged, kBlock, column_panels);
  }

  // Scores and dP of rows [first, first + rows) of a block against tile t.
  template <int V>
  void products(int64_t first, int64_t rows, int64_t t, Scratch<Word>& s) const {
    const int64_t tile = t * dims_.steps * kLanes, panel = first * dims_.steps;
    multiply<V>(s.rows_a + panel, s.lanes_a + tile, rows / kPanel, dims_.steps, scale_, s.scores.data);
    multiply<V>(s.rows_b + panel, s.lanes_b + tile, rows / kPanel, dims_.steps, 1.0f, s.dp.data);
    if (capped_) cap<V>(s.scores, rows, p_.softmax.softcap);
  }

  // out += columns words, over rows [first, first + rows) of a block.
  template <int V>
  void add_product(const Word* columns, int64_t first, int64_t rows, const float* words, int64_t t,
                   float* out, Scratch<Word>& s) const {
    multiply_into<V>(columns + first / kTerms<Word> * kPanel, kBlock / kTerms<Word> * kPanel,
                     reinterpret_cast<const Word*>(words), dims_.panels, rows / kTerms<Word>, s.ones.data,
                     out + t * dims_.rows * kLanes);
  }

  // ---- dq: lanes are columns, blocks are keys
  // ------------------------------------------------------------------

  void reduce_queries(const Task& task, int64_t kv_head, int64_t max_tiles, Scratch<Word>& s) const {
    const Sequence sequence = self_sequence(p_.rows, task.row, tokens_);
    const Span& span = sequence.span;
    const int64_t first = task.first, count = min(span.length * group_ - first, max_tiles * kLanes);
    const int64_t tiles = ceil_div(count, int64_t(kLanes));
    load_lanes(count, s, s.lanes_a, [&](int64_t i) { return column_row(p_.q, span, kv_head, first + i); });
    load_lanes(count, s, s.lanes_b, [&](int64_t i) { return column_row(p_.dout, span, kv_head, first + i); });
    std::memset(s.out_a, 0, sizeof(float) * tiles * dims_.rows * kLanes);
    for (int64_t t = 0; t < tiles; ++t) s.masks[t].clear();
    for (int64_t i = 0; i < round_up(count, kWidth); ++i) {
      const Column c = column(span, kv_head, first + i);
      s.lse[i] = i < count ? lse_.data[statistic(span.batch, c)] : __builtin_inff();
      s.delta[i] = i < count ? delta_.data[statistic(span.batch, c)] : 0.0f;
      s.masks[i / kLanes].set(i % kLanes, seen_by(sequence, c.query));
    }
    KeyRange keys = {INT32_MAX, 0};
    for (int64_t t = 0; t < tiles; ++t) keys = keys.joined(s.masks[t].any);
    for (int64_t start = keys.begin / kBlock * kBlock; start < keys.end; start += kBlock) {
      const int64_t rows = min(kBlock, keys.end - start);
      bool any_hidden = false;
      for (int64_t j = 0; j < round_up(rows, kPanel); ++j) {
        s.hidden[j] = j < rows && is_masked(p_.rows, span.batch, span.start + start + j);
        any_hidden |= s.hidden[j];
      }
      const auto row = [&](const Tensor& x, int64_t j) { return key_row(x, span, kv_head, start + j); };
      load_block(rows, s, s.rows_a, s.columns_a, [&](int64_t j) { return row(p_.k, j); });
      load_block(rows, s, s.rows_b, nullptr, [&](int64_t j) { return row(p_.v, j); });
      for (int64_t t = 0; t < tiles; ++t) {
        dispatch_vectors(count - t * kLanes,
                         [&](auto vectors) { query_tile<vectors.value>(start, any_hidden, t, s); });
      }
    }
    for (int64_t base = 0; base < count; base += kWidth) {
      T* targets[kWidth] = {};
      for (int64_t i = 0; i < min<int64_t>(kWidth, count - base); ++i) {
        const Column c = column(span, kv_head, first + base + i);
        targets[i] = p_.dq.at<T>(span.batch, c.token, c.head);
      }
      unpack_lanes(s.out_a + base / kLanes * dims_.rows * kLanes, dims_, base % kLanes,
                   broadcast(p_.softmax.scale), targets);
    }
  }

  template <int V>
  void query_tile(int64_t start, bool any_hidden, int64_t t, Scratch<Word>& s) const {
    const LaneMask& mask = s.masks[t];
    const KeyRange rows = mask.rows_of_block(start, kBlock);
    if (rows.empty()) return;
    const int64_t first = rows.begin, count = rows.end - rows.begin;
    products<V>(first, count, t, s);
    if (any_hidden || !mask.all.covers({start + first, start + rows.end})) {
      hide<V>(s.scores, start + first, count, mask, s.hidden + first);
    }
    softmax_bwd<V, Word>(s.scores, s.dp, count, PerLane{s.lse + t * kLanes}, PerLane{s.delta + t * kLanes},
                         inverse_cap_);
    add_product<V>(s.columns_a, first, count, s.dp, t, s.out_a, s);
  }

  // ---- dk, dv: lanes are keys, blocks are columns
  // --------------------------------------------------------------

  void reduce_keys(const Task& task, int64_t kv_head, int64_t max_tiles, Scratch<Word>& s) const {
    const Sequence sequence = self_sequence(p_.rows, task.row, tokens_);
    const Span& span = sequence.span;
    const int64_t first = task.first, count = min(span.length - first, max_tiles * kLanes);
    const int64_t tiles = ceil_div(count, int64_t(kLanes));
    load_lanes(count, s, s.lanes_a, [&](int64_t i) { return key_row(p_.k, span, kv_head, first + i); });
    load_lanes(count, s, s.lanes_b, [&](int64_t i) { return key_row(p_.v, span, kv_head, first + i); });
    std::memset(s.out_a, 0, sizeof(float) * tiles * dims_.rows * kLanes);
    std::memset(s.out_b, 0, sizeof(float) * tiles * dims_.rows * kLanes);
    const int64_t columns = span.length * group_;
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t rows = min(kBlock, columns - start);
      KeyRange any = {INT32_MAX, 0};
      for (int64_t j = 0; j < round_up(rows, kPanel); ++j) {
        const Column c = column(span, kv_head, start + j);
        s.seen[j] = seen_by(sequence, c.query);
        if (!s.seen[j].empty()) any = any.joined(s.seen[j]);
        s.lse[j] = j < rows ? lse_.data[statistic(span.batch, c)] : __builtin_inff();
        s.delta[j] = j < rows ? delta_.data[statistic(span.batch, c)] : 0.0f;
      }
      if (any.end <= first || any.begin >= first + count) continue;
      const auto row = [&](const Tensor& x, int64_t j) { return column_row(x, span, kv_head, start + j); };
      load_block(rows, s, s.rows_a, s.columns_a, [&](int64_t j) { return row(p_.q, j); });
      load_block(rows, s, s.rows_b, s.columns_b, [&](int64_t j) { return row(p_.dout, j); });
      for (int64_t t = 0; t < tiles; ++t) {
        dispatch_vectors(count - t * kLanes,
                         [&](auto vectors) { key_tile<vectors.value>(first + t * kLanes, rows, t, s); });
      }
    }
    for (int64_t base = 0; base < count; base += kWidth) {
      T *dk[kWidth] = {}, *dv[kWidth] = {};
      for (int64_t i = 0; i < min<int64_t>(kWidth, count - base); ++i) {
        const int64_t token = span.start + first + base + i;
        dk[i] = p_.dk.at<T>(span.batch, token, kv_head);
        dv[i] = p_.dv.at<T>(span.batch, token, kv_head);
        if (!is_masked(p_.rows, span.batch, token)) continue;
        std::memset(dk[i], 0, sizeof(T) * dims_.D);  // a hidden key's lane ran along unmasked
        std::memset(dv[i], 0, sizeof(T) * dims_.D);
        dk[i] = dv[i] = nullptr;
      }
      const int64_t tile = base / kLanes * dims_.rows * kLanes, lane = base % kLanes;
      unpack_lanes(s.out_a + tile, dims_, lane, broadcast(p_.softmax.scale), dk);
      unpack_lanes(s.out_b + tile, dims_, lane, broadcast(1.0f), dv);
    }
  }

  template <int V>
  void key_tile(int64_t first_slot, int64_t rows, int64_t t, Scratch<Word>& s) const {
    const KeyRange lanes = {first_slot, first_slot + kLanes};
    int64_t first = rows, end = 0;
    for (int64_t j = 0; j < rows; ++j) {
      const KeyRange seen = s.seen[j];
      if (seen.empty() || seen.end <= lanes.begin || seen.begin >= lanes.end) continue;
      first = min(first, j);
      end = j + 1;
    }
    if (end == 0) return;
    first = first / kPanel * kPanel;
    const int64_t count = round_up(end, kPanel) - first;
    products<V>(first, count, t, s);
    hide_rows<V>(s.scores, first_slot, count, s.seen + first);
    softmax_bwd<V, Word>(s.scores, s.dp, count, PerRow{s.lse + first}, PerRow{s.delta + first}, inverse_cap_);
    add_product<V>(s.columns_a, first, count, s.dp, t, s.out_a, s);
    add_product<V>(s.columns_b, first, count, s.scores, t, s.out_b, s);
  }

  const DeltaAttentionBwdParams& p_;
  int64_t batch_, tokens_, heads_, kv_heads_, group_, rows_;
  HeadDims<Word> dims_;
  bool capped_;
  float scale_, inverse_cap_;
  Buffer<float> lse_, delta_;  // [B, HQ, T]
};

}  // namespace

void delta_attention_bwd(const DeltaAttentionBwdParams& p, int num_threads) {
  if (p.q.size[0] * p.q.size[1] * p.q.size[2] == 0) return;
  dispatch_float(p.q.dtype, [&](auto type) { Backward<decltype(type)>(p).run(num_threads); });
}

}  // namespace deltamem::DELTAMEM_ISA
