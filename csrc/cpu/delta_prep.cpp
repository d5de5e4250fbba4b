// delta_prep forward: every row is read once, prepared in fp32 and stored once, in place of a copy into the
// cache where there is one. Bound by memory.
#include "cpu/kernels.h"
#include "cpu/prep_tokens.h"

namespace deltamem::DELTAMEM_ISA {

namespace {

// Rows of one head for a block of tokens. target(token) is where its row goes, null: nowhere.
template <class T, class Target>
void prepare_head(const Projection& projection, int64_t h, const Token* block, int length,
                  float* weight_scratch, float* row, Target&& target) {
  const HeadCorrection head = projection.weights.head(h, weight_scratch);
  for (int i = 0; i < length; ++i) {
    const Token& token = block[i];
    T* out = static_cast<T*>(target(token));
    if (out == nullptr) continue;
    if (!token.live) {
      std::memset(out, 0, head.D * sizeof(T));
      continue;
    }
    const TokenInputs inputs = projection.rotated ? token.inputs : without_rotary(token.inputs);
    prepare_row(projection.x.at<T>(token.batch, token.t, h), head, inputs, row);
    round_row(row, out, head.D);
  }
}

// Elements of the result below which another thread costs more than it does.
constexpr int64_t kElementsPerThread = 1 << 14;

// target(which of q, k, v; head; token) is where a row goes.
template <class Target>
void prepare(const DeltaPrepParams& p, const TokenBlocks& tokens, int num_threads, Target&& target) {
  const int64_t elements = tokens.tokens() * (p.q.size[2] + p.k.size[2] + p.v.size[2]) * largest_head_size(p);
  if (elements == 0) return;
  num_threads = static_cast<int>(min<int64_t>(num_threads, ceil_div(elements, kElementsPerThread)));
  const Projections all(p, tokens.count() > 1, num_threads);
  const int64_t heads = all.heads();
  // Few tokens are cut along the heads, too.
  const int64_t heads_at_once = tokens.count() >= 4 * num_threads ? heads : 1;
  const int64_t head_groups = ceil_div(heads, max<int64_t>(heads_at_once, 1));
  const int64_t items = tokens.count() * head_groups;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Buffer<float> weight_scratch(all.scratch_size()), token_scratch(tokens.scratch_size());
    Buffer<float> row(largest_head_size(p));
    Token block[kTokenBlock];
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; ++item) {
      const int length = tokens.fill(item / head_groups, block, token_scratch);
      const int64_t first = item % head_groups * heads_at_once;
      for (int64_t n = first; n < min(first + heads_at_once, heads); ++n) {
        const int which = n < all.q.heads ? 0 : n < all.q.heads + all.k.heads ? 1 : 2;
        const Projection& projection = which == 0 ? all.q : which == 1 ? all.k : all.v;
        const int64_t h = n - (which == 0 ? 0 : which == 1 ? all.q.heads : all.q.heads + all.k.heads);
        dispatch_float(projection.x.dtype, [&](auto type) {
          prepare_head<decltype(type)>(projection, h, block, length, weight_scratch, row,
                                       [&](const Token& token) { return target(which, h, token); });
        });
      }
    }
  }
}

void* element(const Tensor& t, int64_t i0, int64_t i1, int64_t i2) {
  return static_cast<char*>(t.data) + t.offset(i0, i1, i2) * (t.dtype == DType::f32 ? 4 : 2);
}

// Where the slot of a row's token lies in the cache, dense or paged.
void* cache_slot(const Tensor& cache, const Tensor& block_table, int64_t row, int64_t slot, int64_t head) {
  if (!block_table) return element(cache, row, slot, head);
  const int64_t page_size = cache.size[1];
  return element(cache, *block_table.at<int32_t>(row, slot / page_size), slot % page_size, head);
}

}  // namespace

void delta_prep_fwd(const DeltaPrepParams& p, int num_threads) {
  const Tensor* out[] = {&p.q_prep, &p.k_prep, &p.v_prep};
  prepare(p, TokenBlocks(p, {}, {}), num_threads, [&](int which, int64_t h, const Token& token) {
    return element(*out[which], token.batch, token.t, h);
  });
}

void delta_prep_with_kvcache(const DeltaPrepCacheParams& p, int num_threads) {
  const TokenBlocks tokens(p.prep, p.cache.cache_seqlens, p.state_indices);
  prepare(p.prep, tokens, num_threads, [&](int which, int64_t h, const Token& token) -> void* {
    if (!token.live) return nullptr;
    const int64_t slot = *p.cache.cache_seqlens.at<int32_t>(token.row) + token.index;
    return cache_slot(which == 1 ? p.cache.k_cache : p.cache.v_cache, p.cache.block_table, token.row, slot,
                      h);
  });
}

}  // namespace deltamem::DELTAMEM_ISA
