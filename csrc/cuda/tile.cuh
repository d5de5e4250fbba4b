// A tile of rows of kD 16-bit numbers in shared memory. The 16-byte chunks of a row are permuted by the row's
// number, so that a warp's eight rows of an ldmatrix, and a quarter-warp's stores, fall on different banks.
#pragma once

#include "cuda/ptx.cuh"

namespace deltamem::cuda {

template <class T, int kD>
struct Tile {
  static_assert(kD % 64 == 0, "eight chunks are permuted among themselves");

  T* data;  // [rows, kD], aligned to 16 bytes

  // The permutation stays within eight chunks, and is written so that compilers see it: a fragment's
  // addresses are four, and constants beside them.
  DELTAMEM_DEVICE T* chunk(int row, int c) const {
    return data + (row * kD + ((c & 7) ^ (row & 7)) * 8 + (c & ~7) * 8);
  }
  DELTAMEM_DEVICE T* at(int row, int d) const { return chunk(row, d / 8) + d % 8; }

  // ---- fragments of mma m16n8k16, see ptx.cuh

  // Rows [row, row + 16), channels [16 k, 16 k + 16) as operand a [16 rows, 16 channels].
  DELTAMEM_DEVICE void load_a(uint32_t (&a)[4], int row, int k) const {
    const int lane = ptx::lane();
    ptx::ldmatrix(a, chunk(row + lane % 16, 2 * k + lane / 16));
  }
  // Two operands b [16 channels, 8 rows]: rows [row, row + 8) in b[0], b[1], rows [row + 8, row + 16) in
  // b[2], b[3].
  DELTAMEM_DEVICE void load_b(uint32_t (&b)[4], int row, int k) const {
    const int lane = ptx::lane();
    ptx::ldmatrix(b, chunk(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
  }
  // Two operands b [16 rows, 8 channels]: channels [16 k, 16 k + 8) in b[0], b[1], the next 8 in b[2], b[3].
  DELTAMEM_DEVICE void load_b_transposed(uint32_t (&b)[4], int row, int k) const {
    const int lane = ptx::lane();
    ptx::ldmatrix_transposed(b, chunk(row + lane % 16, 2 * k + lane / 16));
  }
};

}  // namespace deltamem::cuda
