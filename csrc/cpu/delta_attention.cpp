// Flash attention forward with the preparation of q as its prologue. A task is a run of query columns of one
// kv head, kLanes to a tile: column m is query m / G and head m % G of the group, so that the group shares K
// and V. Every block of keys is packed once per task and meets all of its tiles.
#include "cpu/correction.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/softmax.h"
#include "cpu/tiles.h"

namespace deltamem::DELTAMEM_ISA {

namespace {

// A call: what both entry points bring to the same kernel.
struct Call {
  const DeltaAttentionParams& p;
  const DeltaAttentionCacheParams* cached;  // null: keys are the call's own tokens
  int64_t batch, tokens, heads, D, kv_heads, group, rows;

  Call(const DeltaAttentionParams& p, const DeltaAttentionCacheParams* cached)
      : p(p),
        cached(cached),
        batch(p.q.size[0]),
        tokens(p.q.size[1]),
        heads(p.q.size[2]),
        D(p.q.size[3]),
        kv_heads((cached ? cached->cache.k_cache : p.k).size[2]),
        group(heads / max<int64_t>(kv_heads, 1)),
        rows(num_rows(p.rows, batch)) {}

  Sequence sequence(int64_t row) const {
    return cached ? cached_sequence(*cached, row) : self_sequence(p.rows, row, tokens);
  }

  KeyRows key_rows(bool values, int64_t row, const Span& span, int64_t head) const {
    if (!cached) return {values ? &p.v : &p.k, span.batch, span.start, head, nullptr};
    const Cache& cache = cached->cache;
    const Tensor* tensor = values ? &cache.v_cache : &cache.k_cache;
    return {tensor, row, 0, head, cache.block_table ? cache.block_table.at<int32_t>(row) : nullptr};
  }

  // Only the call's own tokens can be masked as keys: in a cache, masked tokens have no slot.
  bool is_hidden(const Span& span, int64_t slot) const {
    return !cached && is_masked(p.rows, span.batch, span.start + slot);
  }

  bool prepares_q() const { return p.on_q.delta || p.on_q.norm || p.rotary.cos; }
};

// Memory of a thread.
template <class Word>
struct Scratch {
  Buffer<Word> staged, k, v, q;
  Buffer<float> scores, out, maximum, sum, lane_scale, row, token, head;
  Buffer<LaneMask> masks;
  Buffer<bool> hidden;

  Scratch(const HeadDims<Word>& dims, int64_t tiles, int64_t token_size, int64_t head_size)
      : staged(kBlock * dims.width),
        k(kBlock * dims.steps),
        v(dims.panels * kPanel * kBlock / kTerms<Word>),
        q(tiles * dims.steps * kLanes),
        scores(kBlock * kLanes),
        out(tiles * dims.rows * kLanes),
        maximum(tiles * kLanes),
        sum(tiles * kLanes),
        lane_scale(kLanes),
        row(dims.rows),
        token(token_size),
        head(head_size),
        masks(tiles),
        hidden(kBlock) {
    std::memset(staged, 0, sizeof(Word) * kBlock * dims.width);
  }
};

template <class T>
class Forward {
 public:
  using Word = typename WordOf<T>::type;

  Forward(const Call& call, int num_threads)
      : call_(call),
        p_(call.p),
        dims_(call.D),
        reads_(call.p.on_q.delta ? call.p.reads : Tensor{}),
        weights_(call.p.on_q, call.heads, call.D, reads_ ? reads_.size[2] * reads_.size[3] : 0,
                 call.p.norm_eps, call.batch * call.tokens > 1, num_threads),
        scale_(p_.softmax.softcap > 0 ? p_.softmax.scale / p_.softmax.softcap : p_.softmax.scale) {}

  void run(int num_threads) const {
    const TaskList tasks(call_.rows, call_.kv_heads, kLanes * 4 * (dims_.steps + dims_.rows), num_threads,
                         [&](int64_t row) { return columns(row); });
    const int64_t items = tasks.count * call_.kv_heads;
#pragma omp parallel num_threads(team_size(num_threads, items))
    {
      Scratch<Word> scratch(dims_, tasks.tiles, token_scratch_size(reads_, p_.rotary),
                            weights_.scratch_size());
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < items; ++item) {
        attend(tasks[item / call_.kv_heads], item % call_.kv_heads, tasks.tiles, scratch);
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < call_.rows + call_.batch; ++row) clear_rest(row);
    }
  }

 private:
  int64_t columns(int64_t row) const { return call_.sequence(row).span.length * call_.group; }

  void attend(const Task& task, int64_t kv_head, int64_t max_tiles, Scratch<Word>& s) const {
    const Sequence sequence = call_.sequence(task.row);
    const int64_t first = task.first, end = min(columns(task.row), first + max_tiles * kLanes);
    const int64_t tiles = ceil_div(end - first, int64_t(kLanes));
    load_queries(sequence, kv_head, first, end, s);
    std::memset(s.out, 0, sizeof(float) * tiles * dims_.rows * kLanes);
    KeyRange keys = {INT32_MAX, 0};
    for (int64_t t = 0; t < tiles; ++t) {
      stats(s, t).clear();
      keys = keys.joined(s.masks[t].any);
    }
    // Blocks start at multiples of kBlock whatever the task sees, so that sums do not depend on the task.
    for (int64_t start = keys.begin / kBlock * kBlock; start < keys.end; start += kBlock) {
      const KeyRange block = {max(start, keys.begin), min(start + kBlock, keys.end)};
      const bool any_hidden = pack_keys(sequence, task.row, kv_head, start, block, s);
      for (int64_t t = 0; t < tiles; ++t) {
        dispatch_vectors(end - first - t * kLanes,
                         [&](auto vectors) { attend_block<vectors.value>(start, any_hidden, t, s); });
      }
    }
    store_results(sequence, kv_head, first, end, s);
  }

  LaneStats stats(Scratch<Word>& s, int64_t t) const { return {s.maximum + t * kLanes, s.sum + t * kLanes}; }

  // Columns [first, end) as the tiles' q, prepared, and which keys they see.
  void load_queries(const Sequence& sequence, int64_t kv_head, int64_t first, int64_t end,
                    Scratch<Word>& s) const {
    const Span& span = sequence.span;
    TokenInputs token;
    int64_t query = -1;
    for (int64_t base = first; base < end; base += kWidth) {
      const int64_t t = (base - first) / kLanes, lane = (base - first) % kLanes;
      if (lane == 0) {
        s.masks[t].clear();
        std::memset(s.q + t * dims_.steps * kLanes, 0, sizeof(Word) * dims_.steps * kLanes);
      }
      for (int64_t i = 0; i < kWidth; ++i) {
        Word* words = s.staged + i * dims_.width;
        const int64_t column = base + i;
        if (column >= end || is_masked(p_.rows, span.batch, span.start + column / call_.group)) {
          stage_zeros(dims_, words);
          continue;
        }
        const int64_t head = kv_head * call_.group + column % call_.group;
        if (column / call_.group != query) {
          query = column / call_.group;
          token = token_inputs(reads_, p_.rotary, span.batch, span.start + query,
                               max<int64_t>(0, sequence.first_slot + query), s.token);
        }
        s.masks[t].set(lane + i, visible_keys(p_.softmax, sequence.first_slot + query, sequence.keys));
        stage_query(p_.q.at<T>(span.batch, span.start + query, head), head, token, s, words);
      }
      pack_lanes(s.staged.data, dims_, lane, s.q + t * dims_.steps * kLanes);
    }
  }

  void stage_query(const T* q, int64_t head, const TokenInputs& token, Scratch<Word>& s, Word* words) const {
    if (!call_.prepares_q()) return stage_row(q, dims_, words);
    prepare_row(q, weights_.head(head, s.head), token, s.row.data);
    stage_rounded<T>(s.row, dims_, words);
  }

  // Keys and values of a block as panels; whether some of them are hidden from everybody.
  bool pack_keys(const Sequence& sequence, int64_t row, int64_t kv_head, int64_t start, KeyRange block,
                 Scratch<Word>& s) const {
    const int64_t rows = round_up(block.end - start, kWidth);
    bool any_hidden = false;
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t slot = start + j;
      const bool inside = slot >= block.begin && slot < block.end;
      s.hidden[j] = inside && call_.is_hidden(sequence.span, slot);
      any_hidden |= s.hidden[j];
    }
    const KeyRows keys = call_.key_rows(false, row, sequence.span, kv_head);
    const KeyRows values = call_.key_rows(true, row, sequence.span, kv_head);
    const auto shown = [&](int64_t j) {
      return start + j >= block.begin && start + j < block.end && !s.hidden[j];
    };
    stage_rows<T>(rows, dims_, s.staged.data,
                  [&](int64_t j) { return shown(j) ? keys.at<T>(start + j) : nullptr; });
    pack_row_panels(s.staged.data, dims_, rows, s.k.data);
    stage_rows<T>(rows, dims_, s.staged.data,
                  [&](int64_t j) { return shown(j) ? values.at<T>(start + j) : nullptr; });
    pack_column_panels(s.staged.data, dims_, rows, kBlock, s.v.data);
    return any_hidden;
  }

  // The first V vectors of tile t meet the block of keys from `start` on.
  template <int V>
  void attend_block(int64_t start, bool any_hidden, int64_t t, Scratch<Word>& s) const {
    const LaneMask& mask = s.masks[t];
    const KeyRange rows = mask.rows_of_block(start, kBlock);
    if (rows.empty()) return;
    const int64_t first = rows.begin, keys = rows.end - rows.begin;
    multiply<V>(s.k + first * dims_.steps, s.q + t * dims_.steps * kLanes, keys / kPanel, dims_.steps, scale_,
                s.scores.data);
    if (p_.softmax.softcap > 0) cap<V>(s.scores, keys, p_.softmax.softcap);
    if (any_hidden || !mask.all.covers({start + first, start + rows.end})) {
      hide<V>(s.scores, start + first, keys, mask, s.hidden + first);
    }
    online_softmax<V, Word>(s.scores, keys, stats(s, t), s.lane_scale);
    multiply_into<V>(s.v + first / kTerms<Word> * kPanel, kBlock / kTerms<Word> * kPanel,
                     reinterpret_cast<const Word*>(s.scores.data), dims_.panels, keys / kTerms<Word>,
                     s.lane_scale.data, s.out + t * dims_.rows * kLanes);
  }

  // out / sum and the log of the sum, rows of zeros and -inf for queries that saw nothing.
  void store_results(const Sequence& sequence, int64_t kv_head, int64_t first, int64_t end,
                     Scratch<Word>& s) const {
    const Span& span = sequence.span;
    for (int64_t base = first; base < end; base += kWidth) {
      const int64_t t = (base - first) / kLanes, lane = (base - first) % kLanes;
      const LaneStats found = stats(s, t);
      const F32 sum = load(found.sum + lane), inverse = select(sum == 0.0f, zero(), 1.0f / sum);
      T* rows[kWidth] = {};
      for (int64_t i = 0; i < min<int64_t>(kWidth, end - base); ++i) {
        const int64_t token = span.start + (base + i) / call_.group;
        const int64_t head = kv_head * call_.group + (base + i) % call_.group;
        rows[i] = p_.out.at<T>(span.batch, token, head);
        *lse(span.batch, head, token) = static_cast<float>(found.maximum[lane + i] + __builtin_log(sum[i]));
      }
      unpack_lanes(s.out + t * dims_.rows * kLanes, dims_, lane, inverse, rows);
    }
  }

  float* lse(int64_t batch, int64_t head, int64_t token) const {
    return p_.lse.at<float>(batch, head) + token * p_.lse.stride[2];
  }

  // Tokens that no task reaches: a masked tail over a cache, padding rows, what lies past the packed
  // sequences.
  void clear_rest(int64_t index) const {
    int64_t batch = index - call_.rows, begin = 0, end = 0;
    if (index < call_.rows) {
      const Span whole = row_span(p_.rows, index, call_.tokens), used = call_.sequence(index).span;
      batch = whole.batch, begin = whole.start + used.length, end = whole.start + whole.length;
    } else if (p_.rows.cu_seqlens) {
      begin = packed_end(p_.rows), end = call_.tokens;
    }
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t head = 0; head < call_.heads; ++head) {
        std::memset(p_.out.at<T>(batch, token, head), 0, sizeof(T) * dims_.D);
        *lse(batch, head, token) = -__builtin_inff();
      }
    }
  }

  const Call& call_;
  const DeltaAttentionParams& p_;
  HeadDims<Word> dims_;
  Tensor reads_;
  CorrectionWeights weights_;
  float scale_;  // of the products: into scores, or the softcap's argument
};

void run(const Call& call, int num_threads) {
  if (call.batch * call.tokens * call.heads == 0) return;
  dispatch_float(call.p.q.dtype,
                 [&](auto type) { Forward<decltype(type)>(call, num_threads).run(num_threads); });
}

}  // namespace

void delta_attention_fwd(const DeltaAttentionParams& p, int num_threads) {
  run(Call(p, nullptr), num_threads);
}

// num_splits changes nothing: keys are never split between tasks, so a row's bits are its own for every
// value.
void delta_attention_with_kvcache(const DeltaAttentionCacheParams& p, int num_threads) {
  run(Call(p.attention, &p), num_threads);
}

}  // namespace deltamem::DELTAMEM_ISA
