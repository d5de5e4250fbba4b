// Raw rows into what the products take: the item's queries, and the new keys and values whose slots lie in the
// segment's tiles. Runs while the first tiles are under way.
#pragma once

#include "cuda/delta_decode_schedule.cuh"
#include "cuda/prepare.cuh"

namespace deltamem::cuda::decode {

// Where head row (slot, kv_head) of a cache lies.
template <class T>
DELTAMEM_DEVICE T* cache_row(const Tensor& cache, const Tensor& block_table, int row, int64_t slot, int kv_head) {
  if (!block_table) return cache.at<T>(row, slot, kv_head);
  const int64_t page_size = cache.size[1];
  return cache.at<T>(*block_table.at<int32_t>(row, slot / page_size), slot % page_size, kv_head);
}

template <class T, int kD>
class Prologue {
 public:
  DELTAMEM_DEVICE Prologue(const Argument& call, const Row& row, const Segment& segment, const Shared<T, kD>& shared)
      : call_(call), row_(row), segment_(segment), shared_(shared) {}

  // One warp takes one row after another.
  DELTAMEM_DEVICE void run() const {
    const int columns = covered_columns<kD>(segment_.columns);
    const int first_slot = segment_.first_tile * kTileSlots;
    const int64_t first_new = max(first_slot - row_.first_slot, int64_t{0});
    const int64_t end_new = min(first_slot + segment_.tiles * kTileSlots - row_.first_slot, int64_t{row_.tokens});
    const int news = call_.p.k ? static_cast<int>(max(end_new - first_new, int64_t{0})) : 0;
    for (int job = ptx::warp(); job < columns + 2 * news; job += kWarps) {
      if (job < columns) {
        prepare_query(job);
      } else {
        const int i = (job - columns) / 2;
        prepare_new(static_cast<int>(first_new) + i, (job - columns) % 2 == 1);
      }
    }
  }

 private:
  static constexpr int kChannels = kD / 32;  // of a lane

  DELTAMEM_DEVICE void prepare_query(int column) const {
    const DeltaAttentionParams& p = call_.p.attention.attention;
    float y[kChannels] = {};
    int2 seen = {0, 0};
    if (column < segment_.columns) {
      const int token = (segment_.first_column + column) / call_.group;
      const int head = segment_.kv_head * call_.group + (segment_.first_column + column) % call_.group;
      prepare(p.q, p.on_q, &p.rotary, token, head, y, nullptr);
      const KeyRange keys = visible_keys(p.softmax, row_.first_slot + token, row_.keys);
      seen = {static_cast<int>(keys.begin), static_cast<int>(keys.end)};
    }
    store_vector(shared_.queries.at(column, kChannels * ptx::lane()), y);
    if (ptx::lane() == 0) shared_.seen[column] = seen;
  }

  // k or v of a token, into the block's own tile, and into the cache by the first block of columns.
  DELTAMEM_DEVICE void prepare_new(int token, bool is_v) const {
    const DeltaDecodeParams& p = call_.p;
    const Cache& cache = p.attention.cache;
    T* target = nullptr;
    if (segment_.column_block == 0) {
      target = cache_row<T>(is_v ? cache.v_cache : cache.k_cache, cache.block_table, row_.number,
                            row_.first_slot + token, segment_.kv_head);
    }
    float y[kChannels];
    prepare(is_v ? p.v : p.k, is_v ? p.on_v : p.on_k, is_v ? nullptr : &p.attention.attention.rotary, token,
            segment_.kv_head, y, target);
    store_vector((is_v ? shared_.new_v : shared_.new_k).at(token, kChannels * ptx::lane()), y);
  }

  // y = this lane's channels of a prepared row, stored in `target`, too, unless it is null.
  DELTAMEM_DEVICE void prepare(const Tensor& source, const Correction& on, const Rotary* rotary, int token, int head,
                               float (&y)[kChannels], T* target) const {
    if (call_.HR == 8) {
      prepare_with<8>(source, on, rotary, token, head, y, target);
    } else {
      prepare_with<0>(source, on, rotary, token, head, y, target);
    }
  }

  template <int kHR>
  DELTAMEM_DEVICE void prepare_with(const Tensor& source, const Correction& on, const Rotary* rotary, int token,
                                    int head, float (&y)[kChannels], T* target) const {
    const DeltaAttentionParams& p = call_.p.attention.attention;
    const int64_t batch = row_.span.batch, t = row_.span.start + token;
    const int64_t position = position_of(p.rotary, batch, t, max(row_.first_slot + token, int64_t{0}));
    const HeadPreparation<kD, kHR> preparation(on, int64_t{head} * call_.D, call_.D, call_.HR);
    preparation.load(source.at<T>(batch, t, head), y);
    preparation.prepare(shared_.reads + token * call_.HR, p.norm_eps, rotary, {batch, t, position},
                        shared_.scratch + ptx::warp() * kD, y);
    if (target != nullptr) preparation.store(target, y);
  }

  const Argument& call_;
  const Row& row_;
  const Segment& segment_;
  const Shared<T, kD>& shared_;
};

}  // namespace deltamem::cuda::decode
