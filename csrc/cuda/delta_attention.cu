// Flash attention forward over the call's own keys or a cache, with the preparation of q as its prologue.
//
// A block takes 128 query columns of one kv head and meets their keys in tiles of 64. Three pieces:
//
//     prologue  q + delta reads -> RMSNorm -> RoPE in fp32, rounded once into a tile of shared memory, while
//               the first tiles of K and V fly
//     mainloop  in: ForwardTiles::q, prepared, zeros where a column is no query, and the columns' slots;
//               out: Attended, in fragments of m16n8k16, warp w with rows 16 w .. and 64 + 16 w ..
//     epilogue  out = sum p v / sum p, lse = log sum e^score; zeros and -inf for rows that saw nothing
//
// The mainloop is FlashAttention-2's for mma.sync: four warps of 32 rows, so that each fragment of K or V
// that ldmatrix brings serves two products; scores, P and out in registers; tiles of K and V alternate in a
// ring of three, each on its way for a whole step (a softmax and a product) before its use, with one barrier
// a tile. Masks are bits, one per key, and touched only in tiles that some row does not see whole. Another
// mainloop needs nothing but these contracts: whichever warps filled the tile of q, a barrier stands behind
// it, and wgmma's accumulators are the fragments that Attended holds.
//
// Floor: 4 D flops per visible (query, key) and head on the tensor cores' mma.sync rate.
#include "cuda/delta_attention.cuh"
#include "cuda/delta_attention_prologue.cuh"
#include "cuda/delta_attention_softmax.cuh"

namespace deltamem::cuda {

namespace {

inline constexpr int kColumns = 64 * kFragments;
inline constexpr int kRing = 3;

// What a block knows of its tile. It lies in shared memory, for the loop leaves no registers.
template <class T>
struct BlockState {
  ColumnTile tile;
  SeenByTile seen;
  const T *k, *v;        // slot 0, or page 0
  const int32_t* pages;  // optional
};

template <class T, int D>
struct ForwardTiles {
  Tile<T, D> q;     // [kColumns, D]
  Tile<T, D> ring;  // kRing times [kKeys, D]
  int* slots;       // [kColumns], kNoSlot where a column is no query
  BlockState<T>* state;
  size_t bytes;

  DELTAMEM_HD explicit ForwardTiles(Carver carver)
      : q{carver.take<T, 128>(kColumns * D)},
        ring{carver.take<T, 128>(kRing * kKeys * D)},
        slots(carver.take<int>(kColumns)),
        state(carver.take<BlockState<T>>(1)),
        bytes(carver.used()) {}

  DELTAMEM_DEVICE Tile<T, D> stage(int i) const { return {ring.data + i * (kKeys * D)}; }
  // Free until the mainloop starts: D floats for each warp.
  DELTAMEM_DEVICE float* scratch() const {
    return reinterpret_cast<float*>(stage(kRing - 1).data) + ptx::warp() * D;
  }
};

// What the launcher found out about the call.
struct Alignment {
  bool q, k, v, out;
};

// Row r of this warp's m-th fragment, as a row of the block's tile.
DELTAMEM_DEVICE int own_row(int m, int r) { return m * 64 + ptx::warp() * 16 + r; }

DELTAMEM_DEVICE bool is_cached(const DeltaAttentionCacheParams& p) { return p.cache.cache_seqlens.data; }

// In a cache, masked tokens have no slot.
DELTAMEM_DEVICE bool masks_keys(const DeltaAttentionCacheParams& p) {
  return p.attention.rows.token_mask && !is_cached(p);
}

// By one thread.
template <class T>
DELTAMEM_DEVICE void find_state(const DeltaAttentionCacheParams& p, const Cut& cut, BlockState<T>& state) {
  const DeltaAttentionParams& a = p.attention;
  state.tile = cut.tile_of_block<kColumns, true>([&](int row) {
    return is_cached(p) ? cached_sequence(p, row) : self_sequence(a.rows, row, a.q.size[1]);
  });
  const ColumnTile& tile = state.tile;
  state.seen = SeenByTile(Window(a.softmax), tile, kColumns);
  int64_t row = tile.batch, first = tile.start;
  if (is_cached(p)) row = tile.row, first = 0;
  state.pages = p.cache.block_table ? p.cache.block_table.at<int32_t>(tile.row) : nullptr;
  if (state.pages != nullptr) row = 0;
  state.k = a.k.at<T>(row, first, tile.kv_head);
  state.v = a.v.at<T>(row, first, tile.kv_head);
}

// ---- K and V ---------------------------------------------------------------------------------------------

// Which keys of the tile at `first` somebody of this block may see.
template <class T>
DELTAMEM_DEVICE uint64_t bits_of_keys(const DeltaAttentionCacheParams& p, const BlockState<T>& state,
                                      int first) {
  const uint64_t inside = bits_of_range(state.seen.any, first);
  if (!masks_keys(p)) return inside;
  return shown_bits(p.attention.rows, state.tile.batch, state.tile.start + first, inside);
}

// Starts the copy of the rows at slots [first, first + kKeys) of x, of which `base` is slot 0 or page 0.
template <class T, int D>
DELTAMEM_DEVICE void load_keys(const DeltaAttentionCacheParams& p, const BlockState<T>& state,
                               const Tensor& x, const T* base, bool aligned, int first, Tile<T, D> tile) {
  const uint64_t bits = bits_of_keys(p, state, first);
  const int64_t page_stride = x.stride[0], stride = x.stride[1];
  const int page_size = static_cast<int>(x.size[1]);
  const int32_t* pages = state.pages;
  if (pages == nullptr || page_size % kKeys == 0) {  // rows at one stride
    const T* row = base + first * stride;
    if (pages != nullptr) row = base + pages[first / page_size] * page_stride + first % page_size * stride;
    load_rows<false>(tile, aligned, [&](int i) { return bits >> i & 1 ? row + i * stride : nullptr; });
  } else {
    load_rows<true>(tile, aligned, [&](int i) -> const T* {
      if (!(bits >> i & 1)) return nullptr;
      const int slot = first + i;
      return base + pages[slot / page_size] * page_stride + slot % page_size * stride;
    });
  }
}

// ---- prologue --------------------------------------------------------------------------------------------

// Starts the copy of the block's rows of q, each by the warp that owns it, and notes what they see.
template <class T, int D>
DELTAMEM_DEVICE void load_queries(const DeltaAttentionCacheParams& p, bool aligned,
                                  const ForwardTiles<T, D>& shared) {
  const Tensor& q = p.attention.q;
  const ColumnTile& tile = shared.state->tile;
  const int own = own_row(ptx::lane() / 16, ptx::lane() % 16);
  shared.slots[own] = slot_of_column(p.attention.rows, !is_cached(p), tile, tile.first + own);
  ptx::sync_warp();
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
    load_rows<true>(Tile<T, D>{shared.q.data + m * 64 * D}, aligned, [&](int i) -> const T* {
      const int row = m * 64 + i, column = tile.first + row;
      if (shared.slots[row] == kNoSlot) return nullptr;
      return tile.row_of<T>(q, column);
    });
  }
}

// Prepares this warp's rows that see a key, a head of the group after the other.
template <class T, int D>
DELTAMEM_DEVICE void prepare_queries(const DeltaAttentionParams& p, const ForwardTiles<T, D>& shared) {
  const ColumnTile& tile = shared.state->tile;
  const int own = own_row(ptx::lane() / 16, ptx::lane() % 16);
  const bool is_query = shared.slots[own] != kNoSlot;
#pragma unroll 1
  for (int g = 0; g < tile.group; ++g) {
    uint32_t rest = ptx::ballot(is_query && (tile.first + own) % tile.group == g);
#pragma unroll 1
    while (rest != 0) {
      int row[kBatch], lane = 0;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {  // the last one again where none is left
        if (rest != 0) lane = ptx::first_bit(rest);
        rest &= rest - 1;
        row[b] = own_row(lane / 16, lane % 16);
      }
      prepare_rows(p, tile, tile.kv_head * tile.group + g, row, shared.q, shared.scratch());
    }
  }
  ptx::sync_warp();
}

// ---- mainloop --------------------------------------------------------------------------------------------

// From prepared q and ranges to sums; see the head of this file.
template <class T, int D>
DELTAMEM_DEVICE void attend(const DeltaAttentionCacheParams& p, const Alignment& aligned,
                            const Scores& scores, const ForwardTiles<T, D>& shared, Attended<D>& result) {
  const DeltaAttentionParams& a = p.attention;
  const BlockState<T>& state = *shared.state;
  const int& end = state.seen.any.y;
  int stage = 0;
#pragma unroll 1
  for (int first = state.seen.any.x / kKeys * kKeys; first < end; first += kKeys) {
    const int next = first + kKeys;
    ptx::cp_async_wait<1>();
    ptx::sync_block();  // K has landed, and every warp is done with the tile before
    if (next < end)
      load_keys(p, state, a.k, state.k, aligned.k, next, shared.stage(stage == 0 ? 2 : stage - 1));
    ptx::cp_async_commit();
    float s[kFragments][8][4] = {};
    multiply(s, shared.q, own_row(0, 0), 64, shared.stage(stage));
    if (scores.cap > 0) cap_scores(s, scores.cap, scores.bend);
    if (first < state.seen.all.x || next > state.seen.all.y || masks_keys(p)) {
      const Window window(a.softmax);
      const uint64_t shown = bits_of_keys(p, state, first);
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int slot = shared.slots[own_row(m, ptx::lane() / 4 + 8 * h)];
          hide(s[m], h, shown & bits_of_range(seen_from(window, state.tile, slot), first));
        }
      }
    }
    result.meet(s, scores.factor);
    Rounded<kFragments> weights;
    round_products<T>(s, weights);
    stage = stage == 2 ? 0 : stage + 1;
    ptx::cp_async_wait<1>();
    ptx::sync_block();  // V has landed, and every warp is done with K
    if (next < end)
      load_keys(p, state, a.v, state.v, aligned.v, next, shared.stage(stage == 0 ? 2 : stage - 1));
    ptx::cp_async_commit();
    accumulate(result.out, weights, shared.stage(stage));
    stage = stage == 2 ? 0 : stage + 1;
  }
}

// ---- epilogue --------------------------------------------------------------------------------------------

// This warp's rows to out, through its rows of the tile of q, and their lse.
template <class T, int D>
DELTAMEM_DEVICE void store_results(const DeltaAttentionParams& p, bool aligned,
                                   const ForwardTiles<T, D>& shared, Attended<D>& result) {
  const ColumnTile& tile = shared.state->tile;
  const float factor = Scores(p.softmax).factor;
  const int lane = ptx::lane();
  ptx::sync_warp();  // the whole warp has read its rows of q
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = own_row(m, lane / 4 + 8 * h), column = tile.first + row;
      const float sum = sum_of_quad(result.sum[m][h]);
      const bool sees = shared.slots[row] != kNoSlot && sum != 0.0f;
      const float inverse = sees ? 1.0f / sum : 0.0f;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          result.out[m][n][i] = sees ? result.out[m][n][i] * inverse : 0.0f;
        }
      }
      if (lane % 4 != 0 || column >= tile.columns) continue;
      float* lse = p.lse.at<float>(tile.batch, tile.head(column)) + tile.token(column) * p.lse.stride[2];
      *lse = sees ? result.peak[m][h] * factor * kLn2 + logf(sum) : -INFINITY;
    }
    store_fragment(result.out[m], shared.q, own_row(m, 0));
  }
  ptx::sync_warp();
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
    store_rows(shared.q, own_row(m, 0), aligned, [&](int row) -> T* {
      const int column = tile.first + row;
      if (column >= tile.columns) return nullptr;
      return tile.row_of<T>(p.out, column);
    });
  }
}

// p.attention.k and v: the call's own, or the cache. Two blocks to a multiprocessor, or three.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, D == 64 ? 3 : 2)
    delta_attention_kernel(const __grid_constant__ DeltaAttentionCacheParams p,
                           const __grid_constant__ Cut cut, const __grid_constant__ Alignment aligned,
                           const __grid_constant__ Scores scores) {
  const DeltaAttentionParams& a = p.attention;
  const ForwardTiles<T, D> shared(Carver::of_block());
  const BlockState<T>& state = *shared.state;
  if (ptx::thread() == 0) find_state(p, cut, *shared.state);
  ptx::sync_block();
  if (state.tile.first >= state.tile.columns) return;

  load_queries(p, aligned.q, shared);
  ptx::cp_async_commit();
  const int2 any = state.seen.any;
  if (any.x < any.y) load_keys(p, state, a.k, state.k, aligned.k, any.x / kKeys * kKeys, shared.stage(0));
  ptx::cp_async_commit();
  if (any.x < any.y) load_keys(p, state, a.v, state.v, aligned.v, any.x / kKeys * kKeys, shared.stage(1));
  ptx::cp_async_commit();
  ptx::cp_async_wait<2>();
  ptx::sync_warp();  // this warp's rows of q have landed
  if (prepares(a)) prepare_queries(a, shared);

  Attended<D> result;
  attend(p, aligned, scores, shared, result);
  store_results(a, aligned.out, shared, result);
}

template <class T, int D>
void launch_forward(const DeltaAttentionCacheParams& p, Call& call) {
  const DeltaAttentionParams& a = p.attention;
  const Alignment aligned = {has_aligned_rows(a.q), has_aligned_rows(a.k), has_aligned_rows(a.v),
                             has_aligned_rows(a.out)};
  const Cut cut(a.q, a.k.size[2], a.rows);
  launch<delta_attention_kernel<T, D>>(
      call, {cut.num_blocks<kColumns>(), kThreads, ForwardTiles<T, D>(Carver()).bytes}, p, cut, aligned,
      Scores(a.softmax));
}

void run(const DeltaAttentionCacheParams& p, Call& call) {
  const Tensor& q = p.attention.q;
  if (q.size[0] * q.size[1] * q.size[2] == 0) return;
  dispatch_attention(q, call, [&](auto type, auto head_size) {
    launch_forward<decltype(type), decltype(head_size)::value>(p, call);
  });
}

}  // namespace

void delta_attention_fwd(const DeltaAttentionParams& p, Call& call) {
  DeltaAttentionCacheParams alone;
  alone.attention = p;
  run(alone, call);
}

// num_splits changes nothing: keys are never split between blocks, so a row's bits are its own for every
// value.
void delta_attention_with_kvcache(const DeltaAttentionCacheParams& p, Call& call) {
  DeltaAttentionCacheParams whole = p;
  whole.attention.k = p.cache.k_cache;
  whole.attention.v = p.cache.v_cache;
  run(whole, call);
}

}  // namespace deltamem::cuda
