"""The public functions that return new tensors and train: contract, validation, choice of backend, run.

No mathematics. Their in-place siblings, which engines call, are in ``serving.py``.
"""

from typing import NamedTuple

import torch

from deltamem_kernels import autograd, debug, fused, plans, validation
from deltamem_kernels.backends import choose
from deltamem_kernels.fused import Corrections, Memory, Rows, Scan, Softmax, memory_4d

Tensor = torch.Tensor


class DeltaScanOutput(NamedTuple):
    reads: Tensor
    final_state: Tensor


class FusedDeltaAttentionOutput(NamedTuple):
    out: Tensor
    reads: Tensor | None
    final_state: Tensor | None
    lse: Tensor


def _needs_grad(*tensors):
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def delta_scan(
    mem_q: Tensor,
    mem_k: Tensor | None,
    mem_v: Tensor | None,
    beta: Tensor | None,
    lam: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    update_rule: str = "standard",
    write: bool = True,
    token_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_activation_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    beta_bias: Tensor | None = None,
    lam_bias: Tensor | None = None,
    backend: str = "auto",
) -> DeltaScanOutput:
    """Read from and write to the associative memory, token by token.

    Per sequence and state head (δ-mem, arXiv 2605.12357), with S of R rows (value) by R columns (key):

        reads_t = S_{t-1} mem_q_t
        S_t     = diag(keep_t) S_{t-1} - diag(erase_t) (S_{t-1} mem_k_t) mem_k_tᵀ + diag(write_t) mem_v_t mem_k_tᵀ

    where (keep, erase, write) is (lam, beta, beta) for ``standard``, (lam, lam·beta, beta) for ``lambda_outside``
    (Gated DeltaNet) and (1, beta, beta) for ``no_lambda`` (DeltaNet). The read comes before the write; nothing is
    scaled by 1/sqrt(R). State and arithmetic are fp32 (fp64 when every input is, on the reference backend).
    Differentiable in every floating input.

    Args:
        mem_q: Memory queries ``[B, T, H, R]``, or ``[B, T, R]`` for H = 1; fp32, fp16 or bf16, as each input
            below independently. Already ``l2norm(tanh(x))`` unless ``use_qk_activation_in_kernel``.
        mem_k: Memory keys, shaped like ``mem_q``; may be None when ``write`` is false, as ``mem_v`` and ``beta``.
        mem_v: Memory values, shaped like ``mem_q``.
        beta: Write strength per row of S, ``[B, T, H, R]``, or ``[B, T, H, 1]`` shared by the rows; in [0, 1],
            or a logit with ``use_gate_in_kernel``.
        lam: Retention, shaped like ``beta`` or its shared form; linear space. None: ``1 - beta``.
        initial_state: ``[N, H, R, R]`` fp32; None is zero. Never modified.
        update_rule: ``standard``, ``lambda_outside`` or ``no_lambda`` (which takes no ``lam``).
        write: False: every token reads ``initial_state``, which is also the result.
        token_mask: ``[B, T]`` bool. A masked token reads 0 and leaves S as it was.
        cu_seqlens: int32 ``[N + 1]`` offsets of sequences packed into one row (B = 1). Later tokens read 0.
        use_qk_activation_in_kernel: ``mem_q`` and ``mem_k`` are raw; ``x / max(‖x‖, 1e-6)`` of their tanh is used.
        use_gate_in_kernel: ``beta`` and ``lam`` are logits; ``sigmoid(x + bias)`` is used.
        beta_bias: ``[H, R or 1]`` fp32, as wide as ``beta``; None is zero.
        lam_bias: ``[H, R or 1]`` fp32, as wide as ``lam``; None is zero.
        backend: ``auto``, or ``reference``, ``cpu``, ``triton``, ``cuda``, which runs or raises.

    Returns:
        ``reads`` ``[B, T, H, R]`` fp32 and ``final_state`` ``[N, H, R, R]`` fp32; neither aliases an input.

    Raises:
        ValueError: A shape, device, layout or option differs from the above.
        TypeError: A dtype does.
        NotImplementedError: The named backend does not cover this input.
        RuntimeError: The named backend is not installed; the message says how to get it.
    """
    tensors = (mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, initial_state, token_mask, cu_seqlens)
    scan = Scan(update_rule, write, use_qk_activation_in_kernel, use_gate_in_kernel)
    key, plan = plans.find("delta_scan", tensors, (*scan, backend))
    if plan is None:
        plan = _plan_scan(*tensors, scan, backend)
        plans.remember(key, plan)
    if debug.ENABLED and cu_seqlens is not None:
        debug.cu_seqlens("delta_scan", cu_seqlens, mem_q.shape[1], None)
    memory = Memory(*memory_4d(mem_q, mem_k, mem_v, beta, lam), beta_bias, lam_bias)
    if _needs_grad(*memory, initial_state):
        call = (key is not None, plan.backend, scan)
        results = autograd.DeltaScan.apply(call, token_mask, cu_seqlens, initial_state, *memory)
    else:
        kernels = plans.kernels(key is not None, plan.backend)
        results = fused.scan_forward(kernels, memory, scan, initial_state, token_mask, cu_seqlens, False)[:2]
    return DeltaScanOutput(*results)


def _plan_scan(
    mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, initial_state, token_mask, cu_seqlens, scan, backend
):
    name = "delta_scan"
    B, T, H, R = validation.memory(name, mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, scan)
    N = validation.rows(name, B, T, token_mask, cu_seqlens, mem_q)
    validation.initial_state(name, initial_state, N, H, R, mem_q)
    return plans.Plan(choose(name, backend, mem_q, R), ())


def fused_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mem_q: Tensor | None = None,
    mem_k: Tensor | None = None,
    mem_v: Tensor | None = None,
    beta: Tensor | None = None,
    lam: Tensor | None = None,
    initial_state: Tensor | None = None,
    delta_q: Tensor | None = None,
    delta_k: Tensor | None = None,
    delta_v: Tensor | None = None,
    update_rule: str = "standard",
    write: bool = True,
    token_mask: Tensor | None = None,
    use_qk_activation_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    beta_bias: Tensor | None = None,
    lam_bias: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    positions: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> FusedDeltaAttentionOutput:
    """Attention whose queries, keys and values an associative memory corrects, in one chain of kernels.

        reads = delta_scan(mem_q, mem_k, mem_v, beta, lam, initial_state)
        q'    = RoPE(RMSNorm(q + delta_q reads)),  k' = RoPE(RMSNorm(k + delta_k reads)),  v' = v + delta_v reads
        out   = softmax(softmax_scale q' k'ᵀ) v'

    (δ-mem, arXiv 2605.12357; the output correction is ``delta_output``.) q' and k' are computed in fp32 and rounded
    once, after RoPE. Without memory arguments this is plain attention with flash_attn's conventions: causal masks
    are bottom-right aligned, windows inclusive, query head h uses kv head ``h // (HQ / HKV)``. Differentiable in
    every floating input.

    Args:
        q: Raw query projections ``[B, T, HQ, D]``, fp32, fp16 or bf16.
        k, v: Raw key and value projections ``[B, T, HKV, D]``, q's dtype. HQ is a multiple of HKV.
        mem_q, mem_k, mem_v, beta, lam, initial_state, update_rule, write, use_qk_activation_in_kernel,
            use_gate_in_kernel, beta_bias, lam_bias: As in ``delta_scan``; ``mem_q`` None: no memory.
        delta_q: ``[HQ·D, H·R]``, column h·R + r, with the factor alpha/R in it; None: no correction.
        delta_k, delta_v: ``[HKV·D, H·R]``.
        token_mask: ``[B, T]`` bool. A masked token reads 0, writes nothing, is hidden as a key, and its out is 0.
        q_norm_weight, k_norm_weight: ``[D]`` weights of an RMSNorm over D, as given; None: no norm.
        norm_eps: The norms' epsilon.
        rotary_cos, rotary_sin: Tables ``[S, rotary_dim/2]`` indexed by position, or rows gathered for each token
            ``[B, T, rotary_dim/2]``. The first rotary_dim channels rotate. None: no RoPE.
        rotary_interleaved: Pairs are (2i, 2i + 1) instead of (i, i + rotary_dim/2).
        positions: int32 ``[B, T]``; None: the token's index in its sequence, masked tokens counted.
        softmax_scale: None: 1/sqrt(D).
        causal: Token i attends to tokens up to i.
        window_size: (left, right): token i attends to [i - left, i + right]; -1 is unbounded.
        softcap: > 0: scores become ``softcap · tanh(score / softcap)``.
        cu_seqlens: int32 ``[N + 1]``, sequences packed into one row (B = 1); tokens past the last one give 0.
        max_seqlen: The longest sequence, where the host knows it.
        backend: ``auto``, or ``reference``, ``cpu``, ``triton``, ``cuda``, which runs or raises.

    Returns:
        out ``[B, T, HQ, D]`` (q's dtype), reads ``[B, T, H, R]`` fp32, final_state ``[N, H, R, R]`` fp32 (both None
        without memory), lse ``[B, HQ, T]`` fp32, natural log, not differentiable. A token that sees no key has
        out 0 and lse -inf.

    Raises:
        As ``delta_scan``.
    """
    memory_inputs = (mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias)
    weights = (delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight)
    tables = (rotary_cos, rotary_sin)
    tensors = (q, k, v, *memory_inputs, initial_state, *weights, *tables, positions, token_mask, cu_seqlens)
    scan = Scan(update_rule, write, use_qk_activation_in_kernel, use_gate_in_kernel)
    softmax = (softmax_scale, causal, tuple(window_size), softcap, max_seqlen)
    key, plan = plans.find("fused_delta_attention", tensors, (*scan, *softmax, backend))
    if plan is None:
        plan = _plan_attention(*tensors, scan, softmax, backend)
        plans.remember(key, plan)
    if debug.ENABLED:
        debug.attention_call("fused_delta_attention", q, cu_seqlens, max_seqlen, positions, rotary_cos)
    max_seqlen = max_seqlen or 0
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    softmax = Softmax(scale, causal, *window_size, softcap)
    memory = None if mem_q is None else Memory(*memory_4d(*memory_inputs[:5]), beta_bias, lam_bias)
    if _needs_grad(q, k, v, *memory_inputs, initial_state, *weights, *tables):
        return FusedDeltaAttentionOutput(
            *autograd.FusedDeltaAttention.apply(
                key is not None, plan.backend, scan, norm_eps, rotary_interleaved, softmax, max_seqlen, token_mask,
                cu_seqlens, positions, q, k, v, *weights, *tables, initial_state, *(memory or (None,) * 7),
            )
        )  # fmt: skip
    kernels = plans.kernels(key is not None, plan.backend)
    fix = Corrections(*weights, norm_eps, *tables, rotary_interleaved, positions)
    rows = Rows(token_mask, cu_seqlens, max_seqlen)
    out, lse, reads, final_state, *_ = fused.attention_forward(
        kernels, q, k, v, memory, scan, initial_state, fix, rows, softmax, False
    )
    return FusedDeltaAttentionOutput(out, reads, final_state, lse)


def _plan_attention(
    q, k, v, mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, initial_state, delta_q, delta_k, delta_v,
    q_norm_weight, k_norm_weight, rotary_cos, rotary_sin, positions, token_mask, cu_seqlens, scan, softmax, backend,
):  # fmt: skip
    name = "fused_delta_attention"
    B, T = validation.queries(name, q)
    HKV = validation.keys_values(name, q, ("k", "v"), k, v, (B, T))
    N = validation.rows(name, B, T, token_mask, cu_seqlens, q)
    H, R = 0, 1
    if mem_q is None:
        validation.no_memory(
            name, mem_k=mem_k, mem_v=mem_v, beta=beta, lam=lam, initial_state=initial_state, delta_q=delta_q,
            delta_k=delta_k, delta_v=delta_v, beta_bias=beta_bias, lam_bias=lam_bias,
        )  # fmt: skip
    else:
        H, R = validation.memory(name, mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, scan)[2:]
        validation.same_tokens(name, q, mem_q)
        validation.initial_state(name, initial_state, N, H, R, mem_q)
    validation.corrections(name, q, HKV, H * R, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight)
    validation.rotary(name, q, rotary_cos, rotary_sin, positions, T if cu_seqlens is None else softmax[-1] or 0)
    validation.softmax(name, *softmax)
    return plans.Plan(choose(name, backend, q, R), ())


def delta_output(
    attn_proj: Tensor,
    reads: Tensor,
    delta_o: Tensor,
    *,
    rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add the memory's correction to the attention's output projection.

        y = attn_proj + delta_o reads [+ residual],  or  attn_proj + RMSNorm(delta_o reads) [+ residual]

    (δ-mem, arXiv 2605.12357.) fp32 arithmetic, rounded once. Under tensor parallelism it is added once, after the
    all-reduce. Differentiable in every floating input.

    Args:
        attn_proj: The result of o_proj, ``[B, T, hidden]``, fp32, fp16 or bf16.
        reads: ``[B, T, H, R]`` or ``[B, T, R]`` fp32, as the scan returns them.
        delta_o: ``[hidden, H·R]``, column h·R + r, with the factor alpha/R in it.
        rms_weight: ``[hidden]``, the weight of an RMSNorm over the correction; None: no norm.
        rms_eps: The norm's epsilon.
        residual: ``[B, T, hidden]``, attn_proj's dtype.
        out: Holds the result; may be ``attn_proj`` or ``residual``.
        backend: ``auto``, or ``reference``, ``cpu``, ``triton``, ``cuda``, which runs or raises.

    Returns:
        y ``[B, T, hidden]``, attn_proj's dtype (``out`` itself when given).

    Raises:
        As ``delta_scan``; and RuntimeError when ``out`` is given and an input requires grad in grad mode.
    """
    inputs = (attn_proj, reads, delta_o, rms_weight, residual)
    key, plan = plans.find("delta_output", (*inputs, out), (backend,))
    if plan is None:
        validation.output("delta_output", *inputs, out)
        plan = plans.Plan(choose("delta_output", backend, attn_proj, reads.shape[-1]), ())
        plans.remember(key, plan)
    (reads,) = memory_4d(reads)
    inputs = (attn_proj, reads, delta_o, rms_weight, residual)
    kernels = plans.kernels(key is not None, plan.backend)
    if out is not None:
        validation.inference_only("delta_output with out", "delta_output without it", *inputs, out)
        kernels["delta_output_out"](attn_proj, reads, delta_o, rms_weight, rms_eps, residual, out)
        return out
    if _needs_grad(*inputs):
        return autograd.DeltaOutput.apply(key is not None, plan.backend, rms_eps, *inputs)
    return kernels["delta_output_fwd"](attn_proj, reads, delta_o, rms_weight, rms_eps, residual)
