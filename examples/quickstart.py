"""δ-mem beside one frozen attention layer: read, correct, attend, write, in one call."""

import torch

from deltamem_kernels import delta_output, fused_delta_attention

B, T, HQ, HKV, D, R, hidden = 1, 512, 32, 8, 128, 8, 2560
q, k, v = (torch.randn(B, T, heads, D, dtype=torch.bfloat16) for heads in (HQ, HKV, HKV))
names = ("mem_q", "mem_k", "mem_v", "beta")  # raw projections of the layer's input
memory = {name: torch.randn(B, T, R) for name in names}
delta_q, delta_o = torch.randn(HQ * D, R) / R, torch.randn(hidden, R) / R
kernel_activates = {"use_qk_activation_in_kernel": True, "use_gate_in_kernel": True}

out, reads, state, lse = fused_delta_attention(q, k, v, **memory, delta_q=delta_q, **kernel_activates)
attn_proj = torch.randn(B, T, hidden)  # the layer's o_proj(out)
y = delta_output(attn_proj, reads, delta_o)

print(f"attention {tuple(out.shape)}, layer output {tuple(y.shape)}, memory of the text {tuple(state.shape)}")
