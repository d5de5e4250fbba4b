// A few tokens per row through one layer, in one parallel region: the memory reads and advances, k' and v'
// are appended, q' is prepared, the cache is attended in splits, splits are merged in their order.
//
// Bound by the cache's bytes. A unit of work is a split of a row for a group of kv heads that lie side by
// side in memory: keys are taken in blocks, and within a block the heads go by, so that memory is read in its
// own order whichever head a line belongs to. While a block is worked on, the next one is fetched to the
// second-level cache. Units come to threads as they are free; results do not depend on who takes what, nor on
// the groups.
#include "cpu/correction.h"
#include "cpu/decode_plan.h"
#include "cpu/kernels.h"
#include "cpu/scan.h"

namespace deltamem::DELTAMEM_ISA {

namespace {

// Bytes of a key that one unit takes: longer runs of memory read faster, smaller groups balance better.
constexpr int64_t kGroupBytes = 2048;
constexpr int64_t kUnitsPerThread = 4;

template <class T>
class Decode {
 public:
  Decode(const DeltaDecodeParams& p, int num_threads)
      : p_(p),
        num_threads_(num_threads),
        attention_(p.attention.attention),
        cache_(p.attention.cache),
        D_(attention_.q.size[3]),
        heads_(attention_.q.size[2]),
        kv_heads_(cache_.k_cache.size[2]),
        G_(heads_ / max<int64_t>(kv_heads_, 1)),
        padded_(padded_channels<T>(D_)),
        plan_(p.attention, kv_heads_),
        columns_(round_up(G_ * plan_.most_tokens(), kColumns)),
        partial_size_(columns_ * (padded_ + 2)),
        group_(group_heads()),
        groups_(ceil_div(kv_heads_, group_)),
        q_weights_(attention_.on_q, heads_, D_, reads_size(), attention_.norm_eps, false, 1),
        k_weights_(p.on_k, kv_heads_, D_, reads_size(), attention_.norm_eps, false, 1),
        v_weights_(p.on_v, kv_heads_, D_, reads_size(), attention_.norm_eps, false, 1),
        queries_(plan_.count() * kv_heads_ * columns_ * padded_),
        partials_(plan_.splits() * kv_heads_ * partial_size_) {}

  void run() {
    const int64_t head_rows = heads_ + (p_.k ? 2 * kv_heads_ : 0);
#pragma omp parallel num_threads(num_threads_)
    {
      KeyBlock<T> blocks[2];
      const Unit unit = take_unit(&plan_[0]);
      if (locate(unit, 0, blocks[0])) {
        prefetch(cache_.k_cache, blocks[0].k, blocks[0].count, unit).finish();
        prefetch(cache_.v_cache, blocks[0].v, blocks[0].count, unit).finish();
      }
      if (p_.memory.mem_q) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < plan_.count(); ++n) read_memory(plan_[n]);
      }
      Buffer<float> weights(
          max(q_weights_.scratch_size(), max(k_weights_.scratch_size(), v_weights_.scratch_size())));
      Buffer<float> token(token_scratch_size(attention_.reads, attention_.rotary)), x(padded_);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < plan_.count() * head_rows; ++i) {
        prepare(plan_[i / head_rows], i % head_rows, weights, token, x);
      }
      attend_units(unit, blocks);
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t i = 0; i < plan_.count() * heads_; ++i) merge(plan_[i / heads_], i % heads_, x);
    }
  }

 private:
  using Query = typename Products<T>::Query;

  int64_t reads_size() const {
    return attention_.reads ? attention_.reads.size[2] * attention_.reads.size[3] : 0;
  }

  // Heads whose rows of a key lie side by side are taken together, unless threads would be idle.
  int64_t group_heads() const {
    const Tensor &k = cache_.k_cache, &v = cache_.v_cache;
    if (k.stride[2] > k.stride[1] || v.stride[2] > v.stride[1]) return 1;
    int64_t group =
        max<int64_t>(1, min<int64_t>(kv_heads_, kGroupBytes / static_cast<int64_t>(D_ * sizeof(T))));
    while (group > 1 && plan_.splits() * ceil_div(kv_heads_, group) < kUnitsPerThread * num_threads_)
      group /= 2;
    return group;
  }

  void read_memory(const Row& row) {
    if (row.number + 1 < plan_.count()) {
      scan_pool_row(p_.memory, attention_.rows, p_.pool, attention_.reads, row.number);
    } else {
      zero_reads_past_end(attention_.rows, attention_.reads);
    }
  }

  // Head row n of a row's tokens: a query head into queries_, or a kv head's k or v into the cache.
  void prepare(const Row& row, int64_t n, float* weight_scratch, float* token_scratch, float* x) {
    const bool is_q = n < heads_, is_k = !is_q && n < heads_ + kv_heads_;
    const int64_t h = is_q ? n : (n - heads_) % kv_heads_;
    if (row.tokens == 0) return;
    if (is_q && h % G_ == 0) {  // columns that fill up the last tile
      Query* first = query(row, h / G_) + G_ * row.tokens * padded_;
      std::memset(first, 0,
                  (round_up(G_ * row.tokens, kColumns) - G_ * row.tokens) * padded_ * sizeof(Query));
    }
    const Tensor& source = is_q ? attention_.q : is_k ? p_.k : p_.v;
    const CorrectionWeights& weights = is_q ? q_weights_ : is_k ? k_weights_ : v_weights_;
    const HeadCorrection head = weights.head(h, weight_scratch);
    for (int64_t i = 0; i < row.tokens; ++i) {
      const int64_t t = row.span.start + i, slot = row.first_slot + i;
      TokenInputs token = token_inputs(attention_.reads, attention_.rotary, row.span.batch, t,
                                       max<int64_t>(slot, 0), token_scratch);
      if (!is_q && !is_k) token = without_rotary(token);
      prepare_row(source.at<T>(row.span.batch, t, h), head, token, x);
      if (is_q) {
        store_query(x, query(row, h / G_) + (i * G_ + h % G_) * padded_);
      } else {
        const Tensor& cache = is_k ? cache_.k_cache : cache_.v_cache;
        round_row(x, at_slot(cache, row, slot) + h * cache.stride[2], D_);
      }
    }
  }

  // Rounded once to q's dtype, whatever the products take.
  void store_query(const float* x, Query* q) {
    if constexpr (sizeof(Query) == sizeof(T)) {
      round_row(x, q, D_);
    } else {
      for (int64_t d = 0; d < D_; ++d) q[d] = to_float(from_float<T>(x[d]));
    }
    for (int64_t d = D_; d < padded_; ++d) q[d] = Query{};
  }

  Query* query(const Row& row, int64_t kv_head) {
    return queries_ + (row.number * kv_heads_ + kv_head) * columns_ * padded_;
  }

  // [columns, padded D] sums, then the columns' RunningSoftmax.
  float* partial(const Row& row, int64_t split, int64_t kv_head) {
    return partials_ + ((row.first_split + split) * kv_heads_ + kv_head) * partial_size_;
  }
  RunningSoftmax* softmaxes(float* partial) {
    return reinterpret_cast<RunningSoftmax*>(partial + columns_ * padded_);
  }

  T* at_slot(const Tensor& cache, const Row& row, int64_t slot) const {
    if (!cache_.block_table) return cache.at<T>(row.number, slot);
    const int64_t page_size = cache.size[1];
    const int32_t page = *cache_.block_table.at<int32_t>(row.number, slot / page_size);
    return cache.at<T>(page, slot % page_size);
  }

  void locate(const Row& row, int64_t first_slot, int64_t end, KeyBlock<T>& block) const {
    block.first_slot = first_slot;
    block.count = static_cast<int>(max<int64_t>(0, min<int64_t>(kKeys, end - first_slot)));
    for (int j = 0; j < block.count; ++j) {
      block.k[j] = at_slot(cache_.k_cache, row, first_slot + j);
      block.v[j] = at_slot(cache_.v_cache, row, first_slot + j);
    }
    for (int j = block.count; j % kTileKeys != 0; ++j) {
      block.k[j] = block.k[block.count - 1];
      block.v[j] = block.v[block.count - 1];
    }
  }

  struct Unit {
    const Row* row;
    int64_t split, first_head, heads;
  };

  // The next unit that no thread has taken, looked for from `row` on; its row is null if there is none.
  Unit take_unit(const Row* row) {
    const int64_t unit = __atomic_fetch_add(&taken_, 1, __ATOMIC_RELAXED), split = unit / groups_;
    if (split >= plan_.splits()) return {nullptr, 0, 0, 0};
    while (split >= row->first_split + row->splits) ++row;
    const int64_t first_head = unit % groups_ * group_;
    return {row, split - row->first_split, first_head, min(group_, kv_heads_ - first_head)};
  }

  // Block n of a unit, if there is one.
  bool locate(const Unit& unit, int64_t n, KeyBlock<T>& block) const {
    if (unit.row == nullptr) return false;
    const Row& row = *unit.row;
    const int64_t begin = row.keys.begin + unit.split * row.split_keys;
    const int64_t end = min(begin + row.split_keys, row.keys.end);
    locate(row, begin + n * kKeys, end, block);
    return block.count > 0;
  }

  // Attends `unit`, whose first block is blocks[0], then takes units until there are none. The block that
  // follows the one at work is always known, across units, too.
  void attend_units(Unit unit, KeyBlock<T>* blocks) {
    for (int current = 0; unit.row != nullptr;) {
      clear(unit);
      const Unit following = take_unit(unit.row);
      for (int64_t n = 1, more = true; more; ++n, current ^= 1) {
        KeyBlock<T>& next = blocks[current ^ 1];
        more = locate(unit, n, next);
        if (!more) locate(following, 0, next);
        attend(unit, blocks[current], next, more ? unit : following);
      }
      unit = following;
    }
  }

  void clear(const Unit& unit) {
    const int64_t columns = round_up(G_ * unit.row->tokens, kColumns);
    for (int64_t h = unit.first_head; h < unit.first_head + unit.heads; ++h) {
      float* acc = partial(*unit.row, unit.split, h);
      std::memset(acc, 0, columns * padded_ * sizeof(float));
      for (int64_t c = 0; c < columns; ++c) softmaxes(acc)[c] = {-__builtin_inff(), 0.0f};
    }
  }

  Prefetch<T> prefetch(const Tensor& cache, const T* const* rows, int count, const Unit& unit) const {
    const int64_t stride = cache.stride[2];
    return {rows, count, unit.first_head * stride, (unit.heads - 1) * stride + D_};
  }

  void attend(const Unit& unit, const KeyBlock<T>& block, const KeyBlock<T>& next, const Unit& next_unit) {
    Prefetch<T> next_k, next_v;
    if (next_unit.row != nullptr) {
      next_k = prefetch(cache_.k_cache, next.k, next.count, next_unit);
      next_v = prefetch(cache_.v_cache, next.v, next.count, next_unit);
    }
    const Row& row = *unit.row;
    for (int64_t h = unit.first_head; h < unit.first_head + unit.heads; ++h) {
      const int64_t k_offset = h * cache_.k_cache.stride[2], v_offset = h * cache_.v_cache.stride[2];
      float* acc = partial(row, unit.split, h);
      for (int64_t c = 0; c < G_ * row.tokens; c += kColumns) {
        int from[kColumns], to[kColumns];
        for (int i = 0; i < kColumns; ++i) {
          const int64_t slot = row.first_slot + min((c + i) / G_, row.tokens - 1);
          const KeyRange seen = visible_keys(attention_.softmax, slot, row.filled);
          from[i] =
              static_cast<int>(max<int64_t>(0, min<int64_t>(seen.begin - block.first_slot, block.count)));
          to[i] =
              static_cast<int>(max<int64_t>(from[i], min<int64_t>(seen.end - block.first_slot, block.count)));
        }
        attend_tile<T>(query(row, h) + c * padded_, block, k_offset, v_offset, D_, from, to,
                       attention_.softmax, softmaxes(acc) + c, acc + c * padded_, next_k, next_v);
      }
    }
  }

  // out and lse of a query head, from its splits in their order; 0 and -inf for dead tokens.
  void merge(const Row& row, int64_t h, float* sum) {
    for (int64_t i = 0; i < row.span.length; ++i) {
      const int64_t column = i * G_ + h % G_, splits = i < row.tokens ? row.splits : 0,
                    t = row.span.start + i;
      float maximum = -__builtin_inff(), total = 0.0f;
      for (int64_t s = 0; s < splits; ++s) {
        maximum = max(maximum, softmaxes(partial(row, s, h / G_))[column].maximum);
      }
      std::memset(sum, 0, padded_ * sizeof(float));
      for (int64_t s = 0; s < splits && maximum > -__builtin_inff(); ++s) {
        const float* acc = partial(row, s, h / G_) + column * padded_;
        const RunningSoftmax& part = softmaxes(partial(row, s, h / G_))[column];
        const float scale = exp(broadcast(part.maximum - maximum))[0];
        total += part.sum * scale;
        for (int64_t d = 0; d < padded_; d += kWidth) store(sum + d, load(sum + d) + load(acc + d) * scale);
      }
      const float share = total == 0.0f ? 0.0f : 1.0f / total;
      for (int64_t d = 0; d < padded_; d += kWidth) store(sum + d, load(sum + d) * share);
      Products<T>::natural_order(sum, padded_);
      round_row(sum, attention_.out.template at<T>(row.span.batch, t, h), D_);
      *attention_.lse.template at<float>(row.span.batch, h, t) =
          total == 0.0f ? -__builtin_inff() : maximum + std::log(total);
    }
  }

  const DeltaDecodeParams& p_;
  const int num_threads_;
  const DeltaAttentionParams& attention_;
  const Cache& cache_;
  const int64_t D_, heads_, kv_heads_, G_, padded_;
  const DecodePlan plan_;
  const int64_t columns_, partial_size_, group_, groups_;
  const CorrectionWeights q_weights_, k_weights_, v_weights_;
  Buffer<Query> queries_;
  Buffer<float> partials_;
  int64_t taken_ = 0;
};

}  // namespace

void delta_decode(const DeltaDecodeParams& p, int num_threads) {
  dispatch_float(p.attention.attention.q.dtype,
                 [&](auto type) { Decode<decltype(type)>(p, num_threads).run(); });
}

}  // namespace deltamem::DELTAMEM_ISA
