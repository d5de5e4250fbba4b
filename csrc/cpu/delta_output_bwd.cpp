// delta_output backward: the reverse of a row of `hidden` channels, corrected from 0. attn_proj and residual
// get dy.
#include "cpu/correction_bwd.h"
#include "cpu/kernels.h"

namespace deltamem::DELTAMEM_ISA {

void delta_output_bwd(const DeltaOutputBwdParams& p, int num_threads) {
  const int64_t T = p.dy.size[1], hidden = p.dy.size[2], HR = p.reads.size[2] * p.reads.size[3];
  const int64_t tokens = p.dy.size[0] * T, padded = round_up(hidden, kWidth);
  const CorrectionWeights weights({p.delta_o, p.rms_weight}, 1, hidden, HR, p.rms_eps, true, num_threads);
  const HeadCorrection head = weights.head(0, nullptr);
  const int64_t norm_at = HR * padded, norm_size = p.rms_weight ? padded : 0;
  TokenSums sums(ceil_div(tokens, kBlock), norm_at + norm_size);
  Buffer<float> zeros(max(padded, HR));
  std::memset(zeros.data, 0, max(padded, HR) * sizeof(float));
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t part = 0; part < sums.parts(); ++part) {
    Buffer<float> du(kBlock * padded), u(padded), norm(norm_size), dreads(kBlock * HR),
        reads_scratch(kBlock * HR);
    std::memset(du.data, 0, kBlock * padded * sizeof(float));
    std::memset(u.data, 0, padded * sizeof(float));
    sums.clear(part);
    float* total = sums.part(part);
    for (int64_t block = sums.first_block(part); block < sums.first_block(part + 1); ++block) {
      const int64_t first = block * kBlock, length = min<int64_t>(kBlock, tokens - first);
      std::memset(norm.data, 0, norm_size * sizeof(float));
      const float* reads[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) {
        float* row = du + i * padded;
        if (i >= length) {
          std::memset(row, 0, padded * sizeof(float));
          reads[i] = zeros;
          continue;
        }
        const int64_t b = (first + i) / T, t = (first + i) % T;
        TokenInputs token;
        token.reads = reads[i] = reads_row(p.reads, b, t, reads_scratch + i * HR);
        load_row(p.dy, b, t, 0, row, hidden);
        prepare_row_bwd(zeros, head, token, row, u, norm, nullptr, nullptr);
      }
      sums.add(part, norm_at, norm, norm_size);
      std::memset(dreads.data, 0, kBlock * HR * sizeof(float));
      correction_gradients(head, du, reads, dreads, total);
      for (int64_t i = 0; i < length; ++i) {
        std::memcpy(p.dreads.at<float>((first + i) / T, (first + i) % T), dreads + i * HR,
                    HR * sizeof(float));
      }
    }
  }
  store_weight_gradient(sums, 0, p.ddelta_o, 0, hidden);
  if (p.rms_weight) store_norm_gradient(sums, norm_at, p.drms_weight);
}

}  // namespace deltamem::DELTAMEM_ISA
