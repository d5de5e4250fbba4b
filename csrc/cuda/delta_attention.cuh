// What the attention kernels share: tiles of query columns, the keys that they see, rows on their way into
// shared memory, and the products of a warp.
//
// A query column is one query head of one token; the columns of a kv head stand in the order of tokens, then
// heads: column m is query m / G and head m % G of the group. So a group shares its K and V in one tile, and
// a tile of a few tokens is full all the same. Tiles start at multiples of their size within a row, blocks of
// keys at multiples of kKeys: a column's sums, and their bits, are its own.
#pragma once

#include <string>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/load.cuh"
#include "cuda/shared_memory.cuh"
#include "cuda/tile.cuh"
#include "mask.h"

namespace deltamem::cuda {

inline constexpr int kKeys = 64;      // of a tile of keys; rows of every tile that load_rows fills
inline constexpr int kThreads = 128;  // four warps, 16 rows of a tile each
inline constexpr int kUnbounded = 1 << 30;
inline constexpr int kNoSlot = -(1 << 30) - 1;
inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

DELTAMEM_HD int lesser(int a, int b) { return a < b ? a : b; }
DELTAMEM_HD int greater(int a, int b) { return a > b ? a : b; }

// ---- which keys ------------------------------------------------------------------------------------------

// The softmax's window around a query's slot in 32 bits, as slots are.
struct Window {
  int left, right;

  DELTAMEM_HD explicit Window(const Softmax& softmax)
      : left(bounded(softmax.window_left)), right(bounded(softmax.causal ? 0 : softmax.window_right)) {}

 private:
  DELTAMEM_HD static int bounded(int64_t side) {
    return side < 0 || side > kUnbounded ? kUnbounded : static_cast<int>(side);
  }
};

// A tile of columns of one kv head of one row, and the slots that hold the row's keys. In tiles of keys,
// group is 1 and column m is token m.
struct ColumnTile {
  int64_t batch, start;  // column m: token start + m / group of `batch`, head kv_head * group + m % group
  int row, kv_head, group;
  int first;       // column of the tile
  int columns;     // of the row
  int live;        // of them count: the tokens behind are masked, padding, or of no sequence
  int first_slot;  // of column 0
  KeyRange keys;

  DELTAMEM_DEVICE int64_t token(int column) const { return start + column / group; }
  DELTAMEM_DEVICE int head(int column) const { return kv_head * group + column % group; }
  // Row of x [B, T, heads, D] for a column.
  template <class T>
  DELTAMEM_DEVICE T* row_of(const Tensor& x, int column) const {
    return x.at<T>(batch, token(column), head(column));
  }
};

// How a call's columns are cut into tiles, one block each.
struct Cut {
  int64_t batch, tokens;
  int kv_heads, group;
  Tensor cu_seqlens;

  // group > 1 or not: columns of q, or keys.
  Cut(const Tensor& x, int64_t kv_heads, const Rows& rows)
      : batch(x.size[0]),
        tokens(x.size[1]),
        kv_heads(static_cast<int>(kv_heads)),
        group(static_cast<int>(x.size[2] / kv_heads)),
        cu_seqlens(rows.cu_seqlens) {}

  // Packed rows, whose lengths stay on the device, get room for any partition: row n's tiles start at
  // cu[n] group / kColumns + n, and behind the last row come those of the tokens that no sequence owns.
  template <int kColumns>
  int64_t num_blocks() const {
    const int64_t columns = tokens * group;
    return kv_heads * (cu_seqlens ? columns / kColumns + cu_seqlens.size[0]
                                  : batch * ceil_div(columns, int64_t(kColumns)));
  }

  // The last row whose tiles start at or before `tile`.
  template <int kColumns>
  DELTAMEM_DEVICE int packed_row_of(int64_t tile) const {
    const int32_t* cu = cu_seqlens.at<int32_t>();
    int row = 0, above = static_cast<int>(cu_seqlens.size[0]);
    while (above - row > 1) {
      const int middle = (row + above) / 2;
      const bool before = int64_t(cu[middle]) * group / kColumns + middle <= tile;
      (before ? row : above) = middle;
    }
    return row;
  }

  // The tile of this block; kv heads of a tile are neighbours, and share what they read. kLastFirst: the last
  // tiles come first, which under a causal mask see the most keys. sequence_of(row): the row as attention
  // sees it.
  template <int kColumns, bool kLastFirst, class SequenceOf>
  DELTAMEM_DEVICE ColumnTile tile_of_block(SequenceOf&& sequence_of) const {
    const int64_t index = ptx::block() / kv_heads;
    const int64_t tile = kLastFirst ? ptx::num_blocks() / kv_heads - 1 - index : index;
    ColumnTile found;
    found.kv_head = static_cast<int>(ptx::block() % kv_heads);
    found.group = group;
    int64_t length = tokens;
    if (cu_seqlens) {
      const int32_t* cu = cu_seqlens.at<int32_t>();
      const int row = found.row = packed_row_of<kColumns>(tile);
      found.first = static_cast<int>((tile - int64_t(cu[row]) * group / kColumns - row) * kColumns);
      const bool owned = row < cu_seqlens.size[0] - 1;
      length = (owned ? cu[row + 1] : tokens) - cu[row];
      if (!owned) {
        found.batch = 0;
        found.start = cu[row];
        found.columns = static_cast<int>(length) * group;
        found.live = found.first_slot = 0;
        found.keys = {0, 0};
        return found;
      }
    } else {
      const int64_t per_row = ceil_div(tokens * group, int64_t(kColumns));
      found.row = static_cast<int>(tile / per_row);
      found.first = static_cast<int>(tile % per_row) * kColumns;
    }
    const Sequence sequence = sequence_of(found.row);
    found.batch = sequence.span.batch;
    found.start = sequence.span.start;
    found.columns = static_cast<int>(length) * group;
    found.live = static_cast<int>(sequence.span.length) * group;
    found.first_slot = static_cast<int>(sequence.first_slot);
    found.keys = sequence.keys;
    return found;
  }
};

// Slots [begin, end) that a query at `slot` sees, none where end <= begin.
DELTAMEM_DEVICE int2 seen_from(const Window& window, const ColumnTile& tile, int slot) {
  if (slot == kNoSlot) return {0, 0};
  return {greater(static_cast<int>(tile.keys.begin), slot - window.left),
          lesser(static_cast<int>(tile.keys.end), slot + window.right + 1)};
}

// kNoSlot where a column is no query, or masked.
DELTAMEM_DEVICE int slot_of_column(const Rows& rows, bool masks_queries, const ColumnTile& tile, int column) {
  if (column >= tile.live || (masks_queries && is_masked(rows, tile.batch, tile.token(column))))
    return kNoSlot;
  return tile.first_slot + column / tile.group;
}

// What the queries of columns [first, first + count) see: any of them, and all of them (of those that are
// not masked). Both ends move with the slot, so that the first and the last query tell.
struct SeenByTile {
  int2 any, all;

  SeenByTile() = default;
  DELTAMEM_DEVICE SeenByTile(const Window& window, const ColumnTile& tile, int count) : any{0, 0}, all{0, 0} {
    if (tile.first >= tile.live) return;
    const int last = lesser(tile.first + count, tile.live) - 1;
    const int2 early = seen_from(window, tile, tile.first_slot + tile.first / tile.group);
    const int2 late = seen_from(window, tile, tile.first_slot + last / tile.group);
    any = {early.x, late.y};
    all = {late.x, early.y};
  }
};

// Bit i: slot first + i lies in [begin, end).
DELTAMEM_DEVICE uint64_t bits_below(int count) {
  return count >= 64 ? ~uint64_t(0) : count <= 0 ? 0 : (uint64_t(1) << count) - 1;
}
DELTAMEM_DEVICE uint64_t bits_of_range(int2 range, int first) {
  return bits_below(range.y - first) & ~bits_below(range.x - first);
}

// Bit i: token `token + i` of the mask's row is shown. Only those of `wanted` are looked at; every lane of a
// warp calls it.
DELTAMEM_DEVICE uint64_t shown_bits(const Rows& rows, int64_t batch, int64_t token, uint64_t wanted) {
  if (!rows.token_mask) return wanted;
  const bool* mask = rows.token_mask.at<bool>(batch, 0);
  const int lane = ptx::lane();
  const uint32_t low = ptx::ballot((wanted >> lane & 1) && mask[token + lane]);
  const uint32_t high = ptx::ballot((wanted >> lane >> 32 & 1) && mask[token + 32 + lane]);
  return uint64_t(high) << 32 | low;
}

// ---- rows into shared memory -----------------------------------------------------------------------------

// Whether the rows of a [., ., ., D] tensor of 16-bit numbers can be copied in chunks of 16 bytes.
inline bool has_aligned_rows(const Tensor& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int i = 0; i + 1 < t.ndim; ++i) aligned &= t.size[i] == 1 || t.stride[i] % 8 == 0;
  return aligned;
}

template <class T>
DELTAMEM_DEVICE const T* shuffled(const T* p, int source_lane) {
  const uint64_t x = reinterpret_cast<uintptr_t>(p);
  const uint32_t low = ptx::shfl(static_cast<uint32_t>(x), source_lane);
  const uint32_t high = ptx::shfl(static_cast<uint32_t>(x >> 32), source_lane);
  return reinterpret_cast<const T*>(uint64_t(high) << 32 | low);
}

// Starts the copy of rows 0 .. 63 of a tile, 16 a warp; row_at(i) is the address of row i, null for zeros.
// kLookUp: row_at is dear, so that one lane asks for each row.
template <bool kLookUp, class T, int D, class RowAt>
DELTAMEM_DEVICE void load_rows(Tile<T, D> tile, bool aligned, RowAt&& row_at) {
  constexpr int kLanes = D / 8, kRows = 32 / kLanes;  // lanes of a row, rows of a pass
  const int first = ptx::warp() * 16 + ptx::lane() / kLanes, c = ptx::lane() % kLanes;
  const T* own = nullptr;
  if (kLookUp) own = row_at(ptx::warp() * 16 + ptx::lane() % 16);
  const auto source_of = [&](int i) {
    const T* row = kLookUp ? shuffled(own, i + ptx::lane() / kLanes) : row_at(first + i);
    return row == nullptr ? nullptr : row + c * 8;
  };
  if (aligned) {
#pragma unroll
    for (int i = 0; i < 16; i += kRows) {
      const T* source = source_of(i);
      ptx::cp_async(tile.chunk(first + i, c), source, source != nullptr);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < 16; i += kRows) {
      const T* source = source_of(i);
      T* target = tile.chunk(first + i, c);
      for (int j = 0; j < 8; ++j) target[j] = source == nullptr ? ptx::from_float<T>(0.0f) : source[j];
    }
  }
}

// ---- products of a warp ----------------------------------------------------------------------------------

// s [16, 64] += a b^T: rows [row, row + 16) of tile a, rows 0 .. 63 of tile b. Thread and element as in mma:
// s[n] holds columns [8 n, 8 n + 8). kM of them, `stride` rows apart, share what is read of b.
template <int kM, class T, int D>
DELTAMEM_DEVICE void multiply(float (&s)[kM][8][4], Tile<T, D> a, int row, int stride, Tile<T, D> b) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) a.load_a(left[m], row + m * stride, k);
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t right[4];
      b.load_b(right, n * 8, k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma<T>(s[m][n], left[m], right[0], right[1]);
        ptx::mma<T>(s[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// Products as multiply left them, rounded, in half the registers: operand a of accumulate.
template <int kM>
using Rounded = uint32_t[kM][8][2];

template <class T, int kM>
DELTAMEM_DEVICE void round_products(const float (&s)[kM][8][4], Rounded<kM>& p) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      p[m][n][0] = ptx::pack<T>(s[m][n][0], s[m][n][1]);
      p[m][n][1] = ptx::pack<T>(s[m][n][2], s[m][n][3]);
    }
  }
}

// out [16, D] += p b: p [16, 64], rows 0 .. 63 of tile b.
template <int kM, class T, int D>
DELTAMEM_DEVICE void accumulate(float (&out)[kM][D / 8][4], const Rounded<kM>& p, Tile<T, D> b) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t right[4];
      b.load_b_transposed(right, j * 16, n / 2);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint32_t left[4] = {p[m][2 * j][0], p[m][2 * j][1], p[m][2 * j + 1][0], p[m][2 * j + 1][1]};
        ptx::mma<T>(out[m][n], left, right[0], right[1]);
        ptx::mma<T>(out[m][n + 1], left, right[2], right[3]);
      }
    }
  }
}

// Rows [row, row + 16) of a tile = out [16, D], rounded.
template <class T, int D>
DELTAMEM_DEVICE void store_fragment(const float (&out)[D / 8][4], Tile<T, D> tile, int row) {
  const int r = row + ptx::lane() / 4, c = ptx::lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const uint32_t low = ptx::pack<T>(out[n][0], out[n][1]), high = ptx::pack<T>(out[n][2], out[n][3]);
    *reinterpret_cast<uint32_t*>(tile.at(r, n * 8 + c)) = low;
    *reinterpret_cast<uint32_t*>(tile.at(r + 8, n * 8 + c)) = high;
  }
}

// Stores rows [row, row + 16) of a tile by one warp; row_at(i): where row i goes, null: nowhere.
template <class T, int D, class RowAt>
DELTAMEM_DEVICE void store_rows(Tile<T, D> tile, int row, bool aligned, RowAt&& row_at) {
  constexpr int kLanes = D / 8, kRows = 32 / kLanes;
  const int lane = ptx::lane(), c = lane % kLanes;
#pragma unroll
  for (int i = 0; i < 16; i += kRows) {
    const int r = row + i + lane / kLanes;
    T* target = row_at(r);
    if (target == nullptr) continue;
    if (aligned) {
      *reinterpret_cast<uint4*>(target + c * 8) = *reinterpret_cast<const uint4*>(tile.chunk(r, c));
    } else {
      for (int j = 0; j < 8; ++j) target[c * 8 + j] = tile.chunk(r, c)[j];
    }
  }
}

// ---- host side -------------------------------------------------------------------------------------------

// Calls f(T{}, head size as an integral_constant) with the types that the kernels are built for.
template <class F>
void dispatch_attention(const Tensor& q, const Call& call, F&& f) {
  const int64_t D = q.size[q.ndim - 1];
  const auto with_type = [&](auto type) {
    if (D == 64) return f(type, std::integral_constant<int, 64>());
    if (D == 128) return f(type, std::integral_constant<int, 128>());
    throw Failure(std::string("deltamem_kernels: ") + call.op +
                  ": q must have a head size of 64 or 128, got " + std::to_string(D));
  };
  if (q.dtype == DType::bf16) return with_type(bf16());
  if (q.dtype == DType::f16) return with_type(f16());
  throw Failure(std::string("deltamem_kernels: ") + call.op + ": q must be bfloat16 or float16, got float32");
}

}  // namespace deltamem::cuda
