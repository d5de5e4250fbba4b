// A few tokens per row through one layer, in one parallel region: the memory reads and advances, k' and v' are
// appended, q' is prepared, the cache is attended in splits, splits are merged in their order.
//
// Bound by the cache's bytes. A unit of work is a split of a row for a group of kv heads that lie side by side in
// memory: keys are taken in blocks, and within a block the heads go by, so that memory is read in its own order
// whichever head a line belongs to. While a block is worked on, the next one is fetched to the second-level cache.
#include "cpu/attention_tile.h"
#include "cpu/correction.h"
#include "cpu/decode_plan.h"
#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {

namespace {

// Bytes of a key that one unit takes: longer runs of memory read faster, smaller groups balance better.
static int env(const char*n,int d){const char*e=getenv(n);return e?atoi(e):d;}
static const int64_t kGroupBytes = env("GB",2048);

template <class T>
class Decode {
 public:
  Decode(const DeltaDecodeParams& p, int num_threads)
      : p_(p),
        attention_(p.attention.attention),
        cache_(p.attention.cache),
        D_(attention_.q.size[3]),
        heads_(attention_.q.size[2]),
        kv_heads_(cache_.k_cache.size[2]),
        G_(heads_ / max<int64_t>(kv_heads_, 1)),
        padded_(padded_channels<T>(D_)),
        plan_(p, kv_heads_),
        columns_(round_up(G_ * plan_.most_tokens(), kColumns)),
        partial_size_(columns_ * (padded_ + 2)),
        group_(group_heads()),
        groups_(ceil_div(kv_heads_, group_)),
        q_weights_(attention_.on_q, heads_, D_, reads_size(), attention_.norm_eps, false, 1),
        k_weights_(p.on_k, kv_heads_, D_, reads_size(), attention_.norm_eps, false, 1),
        v_weights_(p.on_v, kv_heads_, D_, reads_size(), attention_.norm_eps, false, 1),
        queries_(plan_.count() * kv_heads_ * columns_ * padded_),
        partials_(plan_.splits() * kv_heads_ * partial_size_) {
    run(num_threads);
  }

 private:
  using Query = typename Products<T>::Query;

  int64_t reads_size() const {
    return attention_.reads ? attention_.reads.size[2] * attention_.reads.size[3] : 0;
  }

  // Heads whose rows of a key lie side by side are taken together.
  int64_t group_heads() const {
    const Tensor& k = cache_.k_cache;
    if (k.stride[2] > k.stride[1]) return 1;
    return max<int64_t>(1, min<int64_t>(kv_heads_, kGroupBytes / static_cast<int64_t>(D_ * sizeof(T))));
  }

  void run(int num_threads) {
    const int64_t head_rows = heads_ + (p_.k ? 2 * kv_heads_ : 0);
    const int64_t preparations = plan_.count() * head_rows;
#pragma omp parallel num_threads(num_threads)
    {
      {
        Buffer<float> weight_scratch(max(q_weights_.scratch_size(), k_weights_.scratch_size()) + v_weights_.scratch_size());
        Buffer<float> token_scratch(token_scratch_size(attention_.reads, attention_.rotary)), row(D_);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < preparations; ++i) {
          prepare(plan_[i / head_rows], i % head_rows, weight_scratch, token_scratch, row);
        }
      }
      attend_units();
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t i = 0; i < plan_.count() * kv_heads_; ++i) merge(plan_[i / kv_heads_], i % kv_heads_);
    }
  }

  // Head row n of a row's tokens: a query head into queries_, or a kv head's k or v into the cache.
  void prepare(const Row& row, int64_t n, float* weight_scratch, float* token_scratch, float* x) {
    const bool is_q = n < heads_, is_k = !is_q && n < heads_ + kv_heads_;
    const int64_t h = is_q ? n : (n - heads_) % kv_heads_;
    if (row.tokens == 0) return;
    const Tensor& source = is_q ? attention_.q : is_k ? p_.k : p_.v;
    const CorrectionWeights& weights = is_q ? q_weights_ : is_k ? k_weights_ : v_weights_;
    const HeadCorrection head = weights.head(h, weight_scratch);
    for (int64_t i = 0; i < row.tokens; ++i) {
      const int64_t t = row.span.start + i, slot = row.first_slot + i;
      TokenInputs token = token_inputs(attention_.reads, attention_.rotary, row.span.batch, t, max<int64_t>(slot, 0),
                                       token_scratch);
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

  // The next unit that no thread has taken; row is null if there is none. The row is looked for from `row` on.
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
    const int64_t begin = row.lo + unit.split * row.split_keys, end = min(begin + row.split_keys, row.hi);
    locate(row, begin + n * kKeys, end, block);
    return block.count > 0;
  }

  // Takes units until there are none. The block that follows the one at work is always known, across units, too.
  void attend_units() {
    KeyBlock<T> blocks[2];
    Unit unit = take_unit(&plan_[0]);
    locate(unit, 0, blocks[0]);
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
          const Slots seen = visible_slots(row, min((c + i) / G_, row.tokens - 1), attention_.softmax);
          from[i] = static_cast<int>(max<int64_t>(0, min<int64_t>(seen.from - block.first_slot, block.count)));
          to[i] = static_cast<int>(max<int64_t>(0, min<int64_t>(seen.to - block.first_slot, block.count)));
        }
        attend_tile<T>(query(row, h) + c * padded_, block, k_offset, v_offset, D_, from, to, attention_.softmax,
                       softmaxes(acc) + c, acc + c * padded_, next_k, next_v);
      }
    }
  }

  // out and lse of a kv head's columns, from its splits in their order; 0 and -inf for dead tokens.
  void merge(const Row& row, int64_t kv_head) {
    Buffer<float> sum(padded_);
    for (int64_t c = 0; c < G_ * row.span.length; ++c) {
      const int64_t t = row.span.start + c / G_, h = kv_head * G_ + c % G_;
      float maximum = -__builtin_inff(), total = 0.0f;
      std::memset(sum, 0, padded_ * sizeof(float));
      for (int64_t s = 0; c < G_ * row.tokens && s < row.splits; ++s) {
        maximum = max(maximum, softmaxes(partial(row, s, kv_head))[c].maximum);
      }
      for (int64_t s = 0; maximum > -__builtin_inff() && s < row.splits; ++s) {
        float* acc = partial(row, s, kv_head);
        const RunningSoftmax& part = softmaxes(acc)[c];
        const float scale = exp(broadcast(part.maximum - maximum))[0];
        total += part.sum * scale;
        for (int64_t d = 0; d < padded_; d += kWidth) {
          store(sum + d, load(sum + d) + load(acc + c * padded_ + d) * scale);
        }
      }
      if (total > 0) {
        for (int64_t d = 0; d < padded_; d += kWidth) store(sum + d, load(sum + d) * (1.0f / total));
      }
      Products<T>::natural_order(sum, padded_);
      round_row(sum.data, attention_.out.template at<T>(row.span.batch, t, h), D_);
      *attention_.lse.template at<float>(row.span.batch, h, t) =
          total > 0 ? maximum + logf(total) : -__builtin_inff();
    }
  }

  const DeltaDecodeParams& p_;
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
  dispatch_float(p.attention.attention.q.dtype, [&](auto type) { Decode<decltype(type)>(p, num_threads); });
}

}  // namespace deltamem::DELTAMEM_ISA
