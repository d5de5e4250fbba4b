// Calls each op once on a small layer, for TSan to watch: `races OP`. Results are the Python tests' business;
// here threads must not race, and counters end as they began.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"

namespace deltamem::cuda {
namespace {

constexpr int64_t B = 2, T = 70, HQ = 4, HKV = 2, D = 64, H = 1, R = 8, kHidden = 192;
constexpr int64_t kFew = 19;  // tokens of ops that take each by itself
constexpr int64_t kSlots = 160;

class HostCall : public Call {
 public:
  HostCall(const char* op, const DeviceProperties& properties) : Call(op, 0, nullptr, properties) {}

  void* allocate(size_t bytes) override {
    kept_.emplace_back(new (std::align_val_t{256}) char[bytes]);
    memset(kept_.back().get(), 0xff, bytes);
    return kept_.back().get();
  }
  uint32_t* counters(size_t count) override {
    if (counters_.size() < count) counters_.resize(count, 0);
    return counters_.data();
  }
  bool counters_are_zero() const {
    for (uint32_t counter : counters_) {
      if (counter != 0) return false;
    }
    return true;
  }

 private:
  struct Delete {
    void operator()(char* p) const { operator delete[](p, std::align_val_t{256}); }
  };
  std::vector<std::unique_ptr<char, Delete>> kept_;
  std::vector<uint32_t> counters_;
};

// ---- inputs ----------------------------------------------------------------------------------------------

using Sizes = std::vector<int64_t>;

class Memory {
 public:
  // To be written.
  Tensor empty(const Sizes& sizes, DType dtype = DType::bf16) {
    Tensor t;
    t.dtype = dtype;
    t.ndim = static_cast<int>(sizes.size());
    int64_t count = 1;
    for (int i = t.ndim; i-- > 0;) {
      t.size[i] = sizes[i];
      t.stride[i] = count;
      count *= sizes[i];
    }
    const int64_t bytes = count * (dtype == DType::bf16 ? 2 : dtype == DType::boolean ? 1 : 4);
    kept_.emplace_back(new char[bytes]);
    memset(kept_.back().get(), 0xff, bytes);
    t.data = kept_.back().get();
    return t;
  }
  Tensor given(const Sizes& sizes, float scale = 1.0f, DType dtype = DType::bf16) {
    Tensor t = empty(sizes, dtype);
    for (int64_t i = 0; i < t.size[0] * t.stride[0]; ++i) {
      const float x = scale * uniform();
      if (dtype == DType::bf16) {
        t.at<bf16>()[i] = ptx::from_float<bf16>(x);
      } else {
        t.at<float>()[i] = x;
      }
    }
    return t;
  }
  Tensor fp32(const Sizes& sizes, float scale = 1.0f) { return given(sizes, scale, DType::f32); }
  Tensor ints(const std::vector<int>& values) {
    Tensor t = empty({static_cast<int64_t>(values.size())}, DType::i32);
    memcpy(t.data, values.data(), 4 * values.size());
    return t;
  }

 private:
  float uniform() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }

  std::vector<std::unique_ptr<char[]>> kept_;
  uint64_t state_ = 1;
};

deltamem::Memory memory_inputs(Memory& m, int64_t tokens) {
  deltamem::Memory memory;
  memory.mem_q = m.given({B, tokens, H, R});
  memory.mem_k = m.given({B, tokens, H, R});
  memory.mem_v = m.given({B, tokens, H, R});
  memory.beta = m.given({B, tokens, H, R});
  memory.beta_bias = m.fp32({H, R});
  memory.qk_activation = true;
  memory.gate = true;
  return memory;
}

DeltaScanParams scan(Memory& m, int64_t segment_len) {
  DeltaScanParams p;
  p.memory = memory_inputs(m, T);
  p.initial_state = m.fp32({B, H, R, R});
  p.segment_len = segment_len;
  p.reads = m.empty({B, T, H, R}, DType::f32);
  p.final_state = m.empty({B, H, R, R}, DType::f32);
  p.tape = m.empty({B * ((T + segment_len - 1) / segment_len), H, R, R}, DType::f32);
  return p;
}

Correction correction(Memory& m, int64_t heads, bool norm) {
  return {m.given({heads * D, H * R}, 0.2f), norm ? m.given({D}) : Tensor()};
}

Rotary rotary(Memory& m, int64_t positions) {
  return {m.given({positions, D / 2}), m.given({positions, D / 2}), false, {}};
}

DeltaPrepParams prep(Memory& m) {
  DeltaPrepParams p;
  p.q = m.given({B, kFew, HQ, D});
  p.k = m.given({B, kFew, HKV, D});
  p.v = m.given({B, kFew, HKV, D});
  p.reads = m.fp32({B, kFew, H, R});
  p.on_q = correction(m, HQ, true);
  p.on_k = correction(m, HKV, true);
  p.on_v = correction(m, HKV, false);
  p.rotary = rotary(m, kFew);
  p.q_prep = m.empty({B, kFew, HQ, D});
  p.k_prep = m.empty({B, kFew, HKV, D});
  p.v_prep = m.empty({B, kFew, HKV, D});
  return p;
}

Softmax softmax() {
  Softmax s;
  s.scale = 1.0f / sqrtf(static_cast<float>(D));
  return s;
}

DeltaAttentionParams attention(Memory& m, int64_t tokens) {
  DeltaAttentionParams p;
  p.q = m.given({B, tokens, HQ, D});
  p.k = m.given({B, tokens, HKV, D});
  p.v = m.given({B, tokens, HKV, D});
  p.reads = m.fp32({B, tokens, H, R});
  p.on_q = correction(m, HQ, true);
  p.rotary = rotary(m, kSlots);
  p.softmax = softmax();
  p.out = m.empty({B, tokens, HQ, D});
  p.lse = m.empty({B, HQ, tokens}, DType::f32);
  return p;
}

// Row 0 fills its cache, row 1 does not.
Cache cache(Memory& m, int tokens) {
  Cache c;
  c.k_cache = m.given({B, kSlots, HKV, D});
  c.v_cache = m.given({B, kSlots, HKV, D});
  c.cache_seqlens = m.ints({static_cast<int>(kSlots) - tokens, 67});
  return c;
}

DeltaAttentionCacheParams cached_attention(Memory& m, int tokens, int64_t num_splits) {
  DeltaAttentionCacheParams p;
  p.attention = attention(m, tokens);
  p.attention.k = p.attention.v = {};
  p.cache = cache(m, tokens);
  p.appended = true;
  p.num_splits = num_splits;
  return p;
}

StatePool pool(Memory& m) { return {m.fp32({3, H, R, R}), m.ints({2, 0}), {}, {}}; }

DeltaDecodeParams decode(Memory& m, int tokens, int64_t num_splits) {
  DeltaDecodeParams p;
  p.attention = cached_attention(m, tokens, num_splits);
  p.attention.attention.reads = m.empty({B, tokens, H, R}, DType::f32);
  p.memory = memory_inputs(m, tokens);
  p.pool = pool(m);
  p.attention.state_indices = p.pool.state_indices;
  p.k = m.given({B, tokens, HKV, D});
  p.v = m.given({B, tokens, HKV, D});
  p.on_k = correction(m, HKV, true);
  p.on_v = correction(m, HKV, false);
  return p;
}

DeltaOutputParams output(Memory& m) {
  DeltaOutputParams p;
  p.attn_proj = m.given({B, kFew, kHidden});
  p.reads = m.fp32({B, kFew, H, R});
  p.delta_o = m.given({kHidden, H * R});
  p.rms_weight = m.given({kHidden});
  p.residual = m.given({B, kFew, kHidden});
  p.y = m.empty({B, kFew, kHidden});
  return p;
}

// ---- ops -------------------------------------------------------------------------------------------------

template <int64_t kSegmentLen>
void run_scan_fwd(Memory& m, Call& call) {
  delta_scan_fwd(scan(m, kSegmentLen), call);
}

template <int64_t kSegmentLen>
void run_scan_bwd(Memory& m, Call& call) {
  DeltaScanBwdParams p;
  p.fwd = scan(m, kSegmentLen);
  delta_scan_fwd(p.fwd, call);  // which makes the tape
  p.dreads = m.fp32({B, T, H, R});
  p.dfinal_state = m.fp32({B, H, R, R});
  p.dmem_q = m.empty({B, T, H, R});
  p.dmem_k = m.empty({B, T, H, R});
  p.dmem_v = m.empty({B, T, H, R});
  p.dbeta = m.empty({B, T, H, R});
  p.dinitial_state = m.empty({B, H, R, R}, DType::f32);
  p.dbeta_bias = m.empty({H, R}, DType::f32);
  delta_scan_bwd(p, call);
}

void run_prep_bwd(Memory& m, Call& call) {
  DeltaPrepBwdParams p;
  p.fwd = prep(m);
  p.dq_prep = m.given({B, kFew, HQ, D});
  p.dk_prep = m.given({B, kFew, HKV, D});
  p.dv_prep = m.given({B, kFew, HKV, D});
  p.dq = m.empty({B, kFew, HQ, D});
  p.dk = m.empty({B, kFew, HKV, D});
  p.dv = m.empty({B, kFew, HKV, D});
  p.dreads = m.empty({B, kFew, H, R}, DType::f32);
  p.ddelta_q = m.empty({HQ * D, H * R});
  p.ddelta_k = m.empty({HKV * D, H * R});
  p.ddelta_v = m.empty({HKV * D, H * R});
  p.dq_norm = m.empty({D});
  p.dk_norm = m.empty({D});
  p.drotary_cos = m.empty({B, kFew, D / 2}, DType::f32);
  p.drotary_sin = m.empty({B, kFew, D / 2}, DType::f32);
  delta_prep_bwd(p, call);
}

void run_prep_cache(Memory& m, Call& call) {
  DeltaPrepCacheParams p;
  p.prep = prep(m);
  p.prep.q = p.prep.q_prep = p.prep.k_prep = p.prep.v_prep = {};
  p.cache = cache(m, kFew);
  delta_prep_with_kvcache(p, call);
}

void run_attention_bwd(Memory& m, Call& call) {
  DeltaAttentionParams fwd = attention(m, T);
  fwd.reads = {}, fwd.on_q = {}, fwd.rotary = {};
  delta_attention_fwd(fwd, call);
  DeltaAttentionBwdParams p;
  p.dout = m.given({B, T, HQ, D});
  p.q = fwd.q, p.k = fwd.k, p.v = fwd.v, p.out = fwd.out, p.lse = fwd.lse;
  p.softmax = fwd.softmax;
  p.dq = m.empty({B, T, HQ, D});
  p.dk = m.empty({B, T, HKV, D});
  p.dv = m.empty({B, T, HKV, D});
  delta_attention_bwd(p, call);
}

void run_output_bwd(Memory& m, Call& call) {
  const DeltaOutputParams fwd = output(m);
  DeltaOutputBwdParams p;
  p.dy = m.given({B, kFew, kHidden});
  p.reads = fwd.reads, p.delta_o = fwd.delta_o, p.rms_weight = fwd.rms_weight;
  p.dreads = m.empty({B, kFew, H, R}, DType::f32);
  p.ddelta_o = m.empty({kHidden, H * R});
  p.drms_weight = m.empty({kHidden});
  delta_output_bwd(p, call);
}

struct Op {
  const char* name;
  void (*run)(Memory&, Call&);
};

const Op kOps[] = {
    {"delta_scan_fwd", run_scan_fwd<64>},
    {"delta_scan_fwd_of_many_segments", run_scan_fwd<3>},
    {"delta_scan_bwd", run_scan_bwd<64>},
    {"delta_scan_bwd_of_many_segments", run_scan_bwd<3>},
    {"delta_scan_with_state_pool",
     [](Memory& m, Call& call) {
       delta_scan_with_state_pool({memory_inputs(m, T), {}, pool(m), m.empty({B, T, H, R}, DType::f32)},
                                  call);
     }},
    {"delta_prep_fwd", [](Memory& m, Call& call) { delta_prep_fwd(prep(m), call); }},
    {"delta_prep_bwd", run_prep_bwd},
    {"delta_prep_with_kvcache", run_prep_cache},
    {"delta_attention_fwd", [](Memory& m, Call& call) { delta_attention_fwd(attention(m, T), call); }},
    {"delta_attention_bwd", run_attention_bwd},
    {"delta_attention_with_kvcache",
     [](Memory& m, Call& call) { delta_attention_with_kvcache(cached_attention(m, 20, 0), call); }},
    {"delta_decode", [](Memory& m, Call& call) { delta_decode(decode(m, 1, 0), call); }},
    {"delta_decode_of_3_tokens_in_2_splits",
     [](Memory& m, Call& call) { delta_decode(decode(m, 3, 2), call); }},
    {"delta_output_fwd", [](Memory& m, Call& call) { delta_output_fwd(output(m), call); }},
    {"delta_output_bwd", run_output_bwd},
};

int run(const Op& op) {
  try {
    Memory memory;
    HostCall call(op.name, properties_of(0));
    for (int i = 0; i < 2; ++i) op.run(memory, call);  // the second finds what the first left
    if (call.counters_are_zero()) return 0;
    printf("%s: counters must be zero again\n", op.name);
  } catch (const std::exception& error) {
    printf("%s\n", error.what());
  }
  return 1;
}

}  // namespace
}  // namespace deltamem::cuda

int main(int count, char** arguments) {
  for (const auto& op : deltamem::cuda::kOps) {
    if (count < 2) printf("%s\n", op.name);
    if (count > 1 && strcmp(arguments[1], op.name) == 0) return deltamem::cuda::run(op);
  }
  return count < 2 ? 0 : 3;
}
