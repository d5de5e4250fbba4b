// Flash attention forward with the preparation of q as its prologue. A task is a run of query columns of one
// kv head, kLanes to a tile: column m is query m / G and head m % G of the group, so that the group shares K
// and V. Every block of keys is packed once per task and meets all of its tiles.
#include "cpu/correction.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/softmax.h"

namespace deltamem::DELTAMEM_ISA {

namespace {

constexpr int64_t kKeyBlock = 128;
constexpr int64_t kMaxTiles = 8;            // per task: packing costs 1 / (tiles * kLanes) of the products
constexpr int64_t kTilesBytes = 384 << 10;  // q and out of a task's tiles stay in the second-level cache

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
      : staged(kKeyBlock * dims.width),
        k(kKeyBlock * dims.steps),
        v(dims.panels * kPanel * kKeyBlock / kTerms<Word>),
        q(tiles * dims.steps * kLanes),
        scores(kKeyBlock * kLanes),
        out(tiles * dims.rows * kLanes),
        maximum(tiles * kLanes),
        sum(tiles * kLanes),
        lane_scale(kLanes),
        row(kWidth * dims.rows),
        token(token_size),
        head(head_size),
        masks(tiles),
        hidden(kKeyBlock) {}
};

struct Task {
  int32_t row, first;  // tiles from `first` on
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
        scale_(p_.softmax.softcap > 0 ? p_.softmax.scale / p_.softmax.softcap : p_.softmax.scale * kLog2e) {}

  void run(int num_threads) const {
    int64_t tiles = task_tiles(num_threads), longest = 0, count = 0;
    for (int64_t row = 0; row < call_.rows; ++row) {
      const int64_t n = num_tasks(row, tiles);
      longest = max(longest, n);
      count += n;
    }
    Buffer<Task> tasks(count);
    int64_t filled = 0;
    for (int64_t n = longest - 1; n >= 0; --n) {  // the last queries see the most keys: longest tasks first
      for (int64_t row = 0; row < call_.rows; ++row) {
        if (n < num_tasks(row, tiles)) {
          tasks[filled++] = {static_cast<int32_t>(row), static_cast<int32_t>(n * tiles)};
        }
      }
    }
    const int64_t items = count * call_.kv_heads;
#pragma omp parallel num_threads(static_cast<int>(max<int64_t>(1, min<int64_t>(num_threads, items))))
    {
      Scratch<Word> scratch(dims_, tiles, token_scratch_size(reads_, p_.rotary), weights_.scratch_size());
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < items; ++item) {
        const Task& task = tasks[item / call_.kv_heads];
        attend(task, item % call_.kv_heads, tiles, scratch);
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < call_.rows + call_.batch; ++row) clear_rest(row);
    }
  }

 private:
  int64_t columns(int64_t row) const { return call_.sequence(row).span.length * call_.group; }
  int64_t num_tasks(int64_t row, int64_t tiles) const { return ceil_div(columns(row), tiles * kLanes); }

  // Tiles of a task: many, but tasks enough for the threads. A column's arithmetic does not depend on it.
  int64_t task_tiles(int num_threads) const {
    const int64_t tile_bytes = kLanes * 4 * (dims_.steps + dims_.rows);
    int64_t total = 0;
    for (int64_t row = 0; row < call_.rows; ++row) total += ceil_div(columns(row), int64_t(kLanes));
    const int64_t share = total * call_.kv_heads / (8 * num_threads);
    return max<int64_t>(1, min(min(kMaxTiles, kTilesBytes / tile_bytes), share));
  }

  void attend(const Task& task, int64_t kv_head, int64_t max_tiles, Scratch<Word>& s) const {
    const Sequence sequence = call_.sequence(task.row);
    const int64_t first = task.first * kLanes, end = min(columns(task.row), first + max_tiles * kLanes);
    const int64_t tiles = ceil_div(end - first, int64_t(kLanes));
    load_queries(sequence, kv_head, first, end, s);
    std::memset(s.out, 0, sizeof(float) * tiles * dims_.rows * kLanes);
    KeyRange keys = {INT32_MAX, 0};
    for (int64_t t = 0; t < tiles; ++t) {
      stats(s, t).clear();
      keys = {min(keys.begin, s.masks[t].any.begin), max(keys.end, s.masks[t].any.end)};
    }
    // Blocks start at multiples of kKeyBlock whatever the task sees, so that sums do not depend on the task.
    for (int64_t start = keys.begin / kKeyBlock * kKeyBlock; start < keys.end; start += kKeyBlock) {
      const KeyRange block = {max(start, keys.begin), min(start + kKeyBlock, keys.end)};
      const bool any_hidden = pack_keys(sequence, task.row, kv_head, start, block, s);
      for (int64_t t = 0; t < tiles; ++t) attend_block(start, any_hidden, t, s);
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
    T* rounded = reinterpret_cast<T*>(s.row + dims_.rows);
    round_row(s.row.data, rounded, dims_.D);
    stage_row(rounded, dims_, words);
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
    stage_keys(call_.key_rows(false, row, sequence.span, kv_head), start, block, rows, s);
    pack_row_panels(s.staged.data, dims_, rows, s.k.data);
    stage_keys(call_.key_rows(true, row, sequence.span, kv_head), start, block, rows, s);
    pack_column_panels(s.staged.data, dims_, rows, kKeyBlock, s.v.data);
    return any_hidden;
  }

  void stage_keys(const KeyRows& source, int64_t start, KeyRange block, int64_t rows,
                  Scratch<Word>& s) const {
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t slot = start + j;
      Word* words = s.staged + j * dims_.width;
      if (slot < block.begin || slot >= block.end || s.hidden[j]) {
        stage_zeros(dims_, words);
      } else {
        stage_row(source.at<T>(slot), dims_, words);
      }
    }
  }

  // Tile t meets the block of keys from `start` on.
  void attend_block(int64_t start, bool any_hidden, int64_t t, Scratch<Word>& s) const {
    const LaneMask& mask = s.masks[t];
    const int64_t first = max(mask.any.begin - start, int64_t(0)) / kPanel * kPanel;
    const int64_t end = round_up(min(mask.any.end - start, kKeyBlock), kPanel), keys = end - first;
    if (keys <= 0) return;
    multiply(s.k + first * dims_.steps, s.q + t * dims_.steps * kLanes, keys / kPanel, dims_.steps, scale_,
             s.scores.data);
    if (p_.softmax.softcap > 0) cap(s.scores, keys, p_.softmax.softcap);
    if (any_hidden || !mask.all.covers({start + first, start + end})) {
      hide(s.scores, start + first, keys, mask, s.hidden + first);
    }
    online_softmax<Word>(s.scores, keys, stats(s, t), s.lane_scale);
    multiply_into(s.v + first / kTerms<Word> * kPanel, kKeyBlock / kTerms<Word> * kPanel,
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
      unpack_lanes(s.out + t * dims_.rows * kLanes, dims_.rows, lane, s.row);
      for (int64_t i = 0; i < min<int64_t>(kWidth, end - base); ++i) {
        const int64_t token = span.start + (base + i) / call_.group;
        const int64_t head = kv_head * call_.group + (base + i) % call_.group;
        const float sum = found.sum[lane + i];
        const bool blind = sum == 0;
        float* row = s.row + i * dims_.rows;
        const F32 inverse = broadcast(blind ? 0.0f : 1.0f / sum);
        for (int64_t d = 0; d < dims_.rows; d += kWidth) store(row + d, load(row + d) * inverse);
        round_row(row, p_.out.at<T>(span.batch, token, head), dims_.D);
        *lse(span.batch, head, token) = blind ? -__builtin_inff()
                                              : static_cast<float>(found.maximum[lane + i] * kLn2 +
                                                                   __builtin_log(static_cast<double>(sum)));
      }
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
  float scale_;  // of the products, into base 2 or the softcap's argument
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

void delta_attention_with_kvcache(const DeltaAttentionCacheParams& p, int num_threads) {
  run(Call(p.attention, &p), num_threads);
}

}  // namespace deltamem::DELTAMEM_ISA
