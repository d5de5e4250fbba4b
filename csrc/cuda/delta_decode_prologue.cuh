// Raw rows into what the products take: the item's queries, and the new keys and values whose slots lie in
// the segment's tiles. Runs while the first tiles are under way.
#pragma once

#include "cuda/delta_decode_schedule.cuh"
#include "cuda/prepare.cuh"

namespace deltamem::cuda::decode {

// Where head row (slot, kv_head) of a cache lies.
template <class T>
DELTAMEM_DEVICE T* cache_row(const Tensor& cache, const Tensor& block_table, int row, int64_t slot,
                             int kv_head) {
  if (!block_table) return cache.at<T>(row, slot, kv_head);
  const int64_t page_size = cache.size[1];
  return cache.at<T>(*block_table.at<int32_t>(row, slot / page_size), slot % page_size, kv_head);
}

template <class T, int kD>
class Prologue {
 public:
  DELTAMEM_DEVICE Prologue(const Argument& call, const Row& row, const Segment& segment,
                           const Shared<T, kD>& shared)
      : call_(call), row_(row), segment_(segment), shared_(shared) {}

  // One warp takes one row after another: the queries' columns, then k and v of each new token in turn.
  DELTAMEM_DEVICE void run() const {
    const int columns = covered_columns<kD>(segment_.columns);
    const int first = segment_.first_tile * kTileSlots - row_.first_slot;
    const int first_new = max(first, 0), end_new = min(first + segment_.tiles * kTileSlots, row_.tokens);
    const int jobs = columns + (call_.p.k ? 2 * max(end_new - first_new, 0) : 0);
    for (int job = ptx::warp(); job < jobs; job += kWarps) {
      if (job >= segment_.columns && job < columns) {
        clear_query(job);
        continue;
      }
      prepare(job < columns ? query(job) : fresh(first_new + (job - columns) / 2, (job - columns) % 2));
    }
  }

 private:
  static constexpr int kChannels = kD / 32;         // of a lane
  static constexpr int kAtOnce = kD > 128 ? 4 : 8;  // columns of a delta weight; more would spill

  struct Job {
    const Tensor& source;
    const Correction& on;
    const Rotary* rotary;
    int token, head;
    T* target;    // this lane's channels in a tile
    T* appended;  // the row in the cache, or null
  };

  DELTAMEM_DEVICE Job query(int column) const {
    const DeltaAttentionParams& p = call_.p.attention.attention;
    const int token = (segment_.first_column + column) / call_.group;
    const int head = segment_.kv_head * call_.group + (segment_.first_column + column) % call_.group;
    const KeyRange seen = visible_keys(p.softmax, row_.first_slot + token, {row_.keys_begin, row_.keys_end});
    if (ptx::lane() == 0) shared_.seen[column] = {static_cast<int>(seen.begin), static_cast<int>(seen.end)};
    return {p.q,    p.on_q, &p.rotary, token, head, shared_.queries.at(column, kChannels * ptx::lane()),
            nullptr};
  }

  DELTAMEM_DEVICE void clear_query(int column) const {
    const float zeros[kChannels] = {};
    store_vector(shared_.queries.at(column, kChannels * ptx::lane()), zeros);
    if (ptx::lane() == 0) shared_.seen[column] = {0, 0};
  }

  // Into the block's own rows, and by the first block of columns into the cache.
  DELTAMEM_DEVICE Job fresh(int token, bool is_v) const {
    const DeltaDecodeParams& p = call_.p;
    const Cache& cache = p.attention.cache;
    T* appended = nullptr;
    if (segment_.column_block == 0) {
      appended = cache_row<T>(is_v ? cache.v_cache : cache.k_cache, cache.block_table, row_.number,
                              row_.first_slot + token, segment_.kv_head);
    }
    T* target = (is_v ? shared_.new_v : shared_.new_k).at(token, kChannels * ptx::lane());
    return {is_v ? p.v : p.k,
            is_v ? p.on_v : p.on_k,
            is_v ? nullptr : &p.attention.attention.rotary,
            token,
            segment_.kv_head,
            target,
            appended};
  }

  DELTAMEM_DEVICE void prepare(const Job& job) const {
    const DeltaAttentionParams& p = call_.p.attention.attention;
    const int64_t t = row_.start + job.token;
    const int64_t position = position_of(p.rotary, row_.batch, t, max(row_.first_slot + job.token, 0));
    const HeadPreparation<kD, 0, kAtOnce> preparation(job.on, int64_t{job.head} * call_.D, call_.D, call_.HR);
    float y[kChannels];
    preparation.load(job.source.template at<T>(row_.batch, t, job.head), y);
    preparation.prepare(shared_.reads + job.token * call_.HR, p.norm_eps, job.rotary,
                        {row_.batch, t, position}, shared_.scratch + ptx::warp() * kD, y);
    store_vector(job.target, y);
    if (job.appended != nullptr) preparation.store(job.appended, y);
  }

  const Argument& call_;
  const Row& row_;
  const Segment& segment_;
  const Shared<T, kD>& shared_;
};

}  // namespace deltamem::cuda::decode
