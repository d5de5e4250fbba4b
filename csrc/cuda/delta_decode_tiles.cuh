// A segment's keys under its queries. Each warp has 16 slots of every tile to itself: its own ring of copies
// under way, its own online softmax; warps meet when the segment ends. Tokens are the M of the products,
// query columns the N:
//
//     S^T [16 slots, columns] = K Q^T      O^T [kD, columns] += V^T P^T
//
// so that few columns waste nothing, the sums of a softmax are sums over lanes 4, 8 and 16 apart, and P goes
// from the first product to the second through movmatrix, in registers.
#pragma once

#include "cuda/delta_decode_schedule.cuh"

namespace deltamem::cuda::decode {

// Copies a warp's slices of the tiles into its ring, in order, k before v. The page of the slice after the
// next copy is looked up beforehand.
template <class T, int kD>
class SliceLoader {
 public:
  DELTAMEM_DEVICE SliceLoader(const Argument& call, const Row& row, const Segment& segment)
      : call_(call),
        row_(row.number),
        head_(segment.kv_head),
        left_(segment.tiles),
        first_((segment.first_tile - 1) * kTileSlots + ptx::warp() * kSlice),
        begin_(row.begin),
        end_(call.p.attention.appended ? row.first_slot : row.end),
        page_(find_page()) {}

  // Turns to the next tile.
  DELTAMEM_DEVICE void copy_keys(Tile<T, kD> target) {
    const Cache& cache = call_.p.attention.cache;
    first_ += kTileSlots;
    const int slot = first_ + ptx::lane() % kSlice, page = cache.block_table ? page_ : row_;
    const int position = cache.block_table ? slot % static_cast<int>(cache.k_cache.size[1]) : slot;
    v_offset_ = cache.v_cache.offset(page, position, head_);
    if (left_ > 0) copy(cache.k_cache, cache.k_cache.offset(page, position, head_), target);
    ptx::cp_async_commit();
    if (--left_ > 0) page_ = find_page();
  }

  // Of the tile whose keys were copied last.
  DELTAMEM_DEVICE void copy_values(Tile<T, kD> target) const {
    if (left_ >= 0) copy(call_.p.attention.cache.v_cache, v_offset_, target);
    ptx::cp_async_commit();
  }

 private:
  static constexpr int kChunks = kD / 8;  // of a row
  static constexpr int kRowsAtOnce = 32 / kChunks;

  DELTAMEM_DEVICE bool is_filled(int slot) const { return begin_ <= slot && slot < end_; }

  // Of the lane's slot in the next tile.
  DELTAMEM_DEVICE int find_page() const {
    const Cache& cache = call_.p.attention.cache;
    const int slot = first_ + kTileSlots + ptx::lane() % kSlice;
    if (!cache.block_table || !is_filled(slot)) return 0;
    return *cache.block_table.at<int32_t>(row_, slot / static_cast<int>(cache.k_cache.size[1]));
  }

  // Where row r of the slice begins. offset: of the row that the lane (% kSlice) stands for.
  DELTAMEM_DEVICE const T* source_row(const Tensor& cache, int64_t offset, int r) const {
    const uint32_t low = ptx::shfl(static_cast<uint32_t>(offset), r);
    const uint32_t high = ptx::shfl(static_cast<uint32_t>(offset >> 32), r);
    return static_cast<const T*>(cache.data) + static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
  }

  DELTAMEM_DEVICE void copy(const Tensor& cache, int64_t offset, Tile<T, kD> target) const {
    if (!call_.copies_chunks) return copy_elements(cache, offset, target);
    const int c = ptx::lane() % kChunks;
#pragma unroll
    for (int r = 0; r < kSlice; r += kRowsAtOnce) {
      const int row = r + ptx::lane() / kChunks;
      const T* source = source_row(cache, offset, row);
      ptx::cp_async(target.chunk(row, c), source + c * 8, is_filled(first_ + row) && c * 8 < call_.D);
    }
  }

  // Of rows that are not aligned to 16 bytes, or not whole chunks.
  DELTAMEM_DEVICE void copy_elements(const Tensor& cache, int64_t offset, Tile<T, kD> target) const {
#pragma unroll 1
    for (int row = 0; row < kSlice; ++row) {
      const T* source = source_row(cache, offset, row);
#pragma unroll 1
      for (int d = ptx::lane(); d < kD; d += 32) {
        const bool is_there = is_filled(first_ + row) && d < call_.D;
        *target.at(row, d) = is_there ? source[d] : ptx::from_float<T>(0.0f);
      }
    }
  }

  const Argument& call_;
  const int row_, head_;
  int left_;               // tiles whose keys are to be copied
  int first_;              // slot of the tile at hand
  const int begin_, end_;  // of the slots in the cache; new ones are not there yet
  int page_;               // of the lane's slot in the next tile
  int64_t v_offset_ = 0;
};

// A warp's share of an item: sums O^T [kD, 8 kN], and of each column the peak and the total of weights. A
// lane has channels lane / 4 (+ 8) of every 16, columns 2 (lane % 4) + {0, 1} of every 8; totals are its
// slots' alone.
template <int kD, int kN>
struct Sums {
  float out[kD / 16][kN][4];
  float peak[kN][2], total[kN][2];

  DELTAMEM_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int m = 0; m < kD / 16; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] = 0.0f;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) peak[n][e] = -INFINITY, total[n][e] = 0.0f;
    }
  }
};

template <class T, int kD, int kN>
class Attention {
 public:
  DELTAMEM_DEVICE Attention(const Argument& call, const Segment& segment, const Shared<T, kD>& shared,
                            Sums<kD, kN>& sums)
      : call_(call), shared_(shared), sums_(sums) {
    first_ = segment.first_tile * kTileSlots + ptx::warp() * kSlice;
    end_ = first_ + segment.tiles * kTileSlots;
    seen_by_all_ = {shared.seen[max(segment.columns - 1, 0)].x, shared.seen[0].y};
  }

  // The loader has filled the ring.
  DELTAMEM_DEVICE void run(SliceLoader<T, kD>& loader) {
    sums_.clear();
    int stage = 0;
    for (; first_ < end_; first_ += kTileSlots) {
      const Tile<T, kD> k = shared_.stage(call_.stages, stage, 0), v = shared_.stage(call_.stages, stage, 1);
      float s[kN][4] = {};
      uint32_t p[kN][2];
      wait_for_oldest();
      multiply_keys(k, s);
      ptx::sync_warp();
      loader.copy_keys(k);
      weigh(s, p);
      wait_for_oldest();
      multiply_values(v, p);
      ptx::sync_warp();
      loader.copy_values(v);
      stage = stage + 1 == call_.stages ? 0 : stage + 1;
    }
    ptx::cp_async_wait<0>();
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          sums_.total[n][e] += ptx::shfl_xor(sums_.total[n][e], distance);
        }
      }
    }
  }

 private:
  // Of 2 stages copies, k and v in turn, all but the first may still be under way.
  DELTAMEM_DEVICE void wait_for_oldest() const {
    switch (call_.stages) {
      case 1:
        ptx::cp_async_wait<1>();
        break;
      case 2:
        ptx::cp_async_wait<3>();
        break;
      case 3:
        ptx::cp_async_wait<5>();
        break;
      default:
        ptx::cp_async_wait<2 * kMaxStages - 1>();
    }
    ptx::sync_warp();
  }

  // A row in shared memory, by its chunks.
  struct ChunkRow {
    const T* data;
    int permutation;
    DELTAMEM_DEVICE const T* chunk(int c) const { return data + (c ^ permutation) * 8; }
  };
  // Row r of the slice at hand, or the new token's whose slot it is.
  DELTAMEM_DEVICE ChunkRow row(Tile<T, kD> slice, Tile<T, kD> news, int r) const {
    const int token = first_ + r - shared_.block->row.first_slot;
    const bool is_new = call_.p.attention.appended && token >= 0 && token < shared_.block->row.tokens;
    const int index = is_new ? token : r;
    return {(is_new ? news.data : slice.data) + index * kD, index & 7};
  }

  // s = K Q^T
  DELTAMEM_DEVICE void multiply_keys(Tile<T, kD> slice, float (&s)[kN][4]) const {
    const int lane = ptx::lane();
    const ChunkRow keys = row(slice, shared_.new_k, lane % 16);
#pragma unroll
    for (int k = 0; k < kD / 16; k += 2) {  // sixteen channels
      uint32_t a[2][4];
      ptx::ldmatrix(a[0], keys.chunk(2 * k + lane / 16));
      ptx::ldmatrix(a[1], keys.chunk(2 * k + 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        uint32_t q[4];
        ptx::ldmatrix(q, shared_.queries.chunk(8 * n + lane % 8, 2 * k + lane / 8));
        ptx::mma<T>(s[n], a[0], q[0], q[1]);
        ptx::mma<T>(s[n], a[1], q[2], q[3]);
      }
    }
  }

  // out += V^T P^T
  DELTAMEM_DEVICE void multiply_values(Tile<T, kD> slice, const uint32_t (&p)[kN][2]) const {
    const int lane = ptx::lane();
    const ChunkRow values = row(slice, shared_.new_v, lane % 8 + lane / 16 * 8);
#pragma unroll
    for (int m = 0; m < kD / 16; ++m) {
      uint32_t a[4];
      ptx::ldmatrix_transposed(a, values.chunk(2 * m + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kN; ++n) ptx::mma<T>(sums_.out[m][n], a, p[n][0], p[n][1]);
    }
  }

  // Scores in base 2; what a column does not see is -inf.
  DELTAMEM_DEVICE void score(float (&s)[kN][4]) const {
    const Softmax& softmax = call_.p.attention.attention.softmax;
    constexpr float kLog2E = 1.4426950408889634f;
    const float cap = softmax.softcap * kLog2E, factor = softmax.scale * kLog2E;
    const bool masked = first_ < seen_by_all_.x || first_ + kSlice > seen_by_all_.y;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] *= factor;  // cap tanh(x / cap) by 2^x
        if (cap > 0.0f)
          s[n][i] = cap - __fdividef(2.0f * cap, 1.0f + ptx::exp2(s[n][i] * (2.0f / softmax.softcap)));
      }
      if (!masked) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = first_ + ptx::lane() / 4 + i / 2 * 8;
        const int2 seen = shared_.seen[8 * n + 2 * (ptx::lane() % 4) + i % 2];
        if (slot < seen.x || slot >= seen.y) s[n][i] = -INFINITY;
      }
    }
  }

  // Scores s into weights p, operand b of the second product; the sums so far follow the new peaks.
  DELTAMEM_DEVICE void weigh(float (&s)[kN][4], uint32_t (&p)[kN][2]) {
    score(s);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      float scale[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float peak = max(s[n][e], s[n][e + 2]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) peak = max(peak, ptx::shfl_xor(peak, distance));
        peak = max(peak, sums_.peak[n][e]);
        const float base = peak == -INFINITY ? 0.0f : peak;  // a column that has seen nothing yet
        scale[e] = ptx::exp2(sums_.peak[n][e] - base);
        s[n][e] = ptx::exp2(s[n][e] - base), s[n][e + 2] = ptx::exp2(s[n][e + 2] - base);
        sums_.peak[n][e] = peak;
        sums_.total[n][e] = sums_.total[n][e] * scale[e] + (s[n][e] + s[n][e + 2]);
      }
      p[n][0] = ptx::movmatrix(ptx::pack<T>(s[n][0], s[n][1]));
      p[n][1] = ptx::movmatrix(ptx::pack<T>(s[n][2], s[n][3]));
#pragma unroll
      for (int m = 0; m < kD / 16; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_.out[m][n][i] *= scale[i % 2];
      }
    }
  }

  const Argument& call_;
  const Shared<T, kD>& shared_;
  Sums<kD, kN>& sums_;
  int first_, end_;  // slots of the slice at hand, and of the one past the last
  int2 seen_by_all_;
};

}  // namespace deltamem::cuda::decode
