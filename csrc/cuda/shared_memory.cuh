// Cuts a block's dynamic shared memory into arrays. The same code tells the host how much a kernel needs: a
// struct that takes its arrays in its constructor is laid out over the block's memory in the kernel, and over
// nothing here.
//
//     struct Tiles {
//       bf16* k;
//       size_t bytes;
//       DELTAMEM_HD explicit Tiles(Carver carver) : k(carver.take<bf16>(64 * 128)), bytes(carver.used()) {}
//     };
//     kernel:  Tiles tiles(Carver::of_block());         host:  Tiles(Carver()).bytes
#pragma once

#include "cuda/ptx.cuh"
#include "delta_rule.h"

namespace deltamem::cuda {

class Carver {
 public:
  DELTAMEM_HD Carver() : base_(nullptr), used_(0), lays_out_(false) {}
  static DELTAMEM_DEVICE Carver of_block() { return Carver(ptx::dynamic_shared_memory()); }

  // Uninitialised; aligned to kAlign bytes, at most 1024.
  template <class T, int kAlign = 16>
  DELTAMEM_HD T* take(int count) {
    used_ = (used_ + kAlign - 1) / kAlign * kAlign;
    // no detour through integers: the compiler must see that arrays lie in shared memory
    T* array = lays_out_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += count * static_cast<int>(sizeof(T));
    if (lays_out_) ptx::poison(base_ + used_, ptx::kRedZone);
    used_ += ptx::kRedZone;
    return array;
  }

  DELTAMEM_HD size_t used() const { return used_; }

 private:
  DELTAMEM_HD explicit Carver(char* base) : base_(base), used_(0), lays_out_(true) {}

  char* base_;
  int used_;
  bool lays_out_;
};

}  // namespace deltamem::cuda
