"""Launchers of the delta-rule scan.

    segment maps (LANES segments' rows, all at once) -> group maps, one or two levels -> replay of every segment

or the replay alone, where sequences are short or enough to fill the machine. Maps stay in L2: 4 (RP + 1) RP^2
bytes a segment and head. The scan's floor is its inputs and reads once through memory, 12 R bytes a token in
bf16 with row gates; its maps' arithmetic, 3 R^3 + 3 R^2 operations a token, is above that from R = 8 on.
"""

import torch

from deltamem_kernels.ops import SEGMENT_LEN, tape_shape

from .delta_scan_bwd import delta_scan_bwd
from .lowering import launches, unique
from .scan_build import build_maps, gate_flags, replay_inputs
from .scan_plan import Plan, given, plan, width
from .scan_replay import copy_states_kernel, replay_kernel

__all__ = ["delta_scan_bwd", "delta_scan_fwd", "delta_scan_with_state_pool"]


def _replay(
    cut: Plan, tokens, biases, token_mask, cu_seqlens, flags, activation, write, start, start_slots, has_initial,
    copied, final, final_slots, tape, tape_len, reads,
):  # fmt: skip
    B, T, H, R = tokens[0].shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    CW = cut.RP // cut.NB
    tokens, constants = replay_inputs(cut, tokens, cu_seqlens, write, activation, tape_len)
    maps = map_biases = None
    if cut.levels:
        _, mem_k, mem_v, beta, lam = tokens
        maps, map_biases = build_maps(cut, None, mem_v, mem_k, beta, lam, *biases, token_mask, cu_seqlens, flags, False)
    per_token = final_slots is not None and final_slots.dim() == 2
    replay_kernel[(cut.blocks(cut.slots[0], H),)](
        *map(given, (*tokens, *biases)),
        given(token_mask), cu_seqlens, given(start), start_slots, has_initial, maps, map_biases,
        given(final), given(final_slots), tape, given(reads),
        T, N, H, cut.L, cut.slots[0], cut.second, cut.third,
        R=R, RP=cut.RP, NB=cut.NB, MAP_SHARED=cut.map_shared, **flags, **constants, WRITE=write,
        PER_TOKEN=per_token, COPIED=copied, TAPE=tape_len, LEVELS=cut.levels, G1=cut.group, G2=cut.supergroup,
        LANES=cut.LANES, WS=width(start, R, CW), WF=width(final, R, CW), WT=width(tape, R, CW), WM=min(cut.RP, 4),
        num_warps=cut.num_warps, num_stages=1,
    )  # fmt: skip


def delta_scan_fwd(
    mem_q, mem_k, mem_v, beta, lam, initial_state, token_mask, cu_seqlens, beta_bias, lam_bias, update_rule, write,
    use_qk_activation_in_kernel, use_gate_in_kernel, segment_len, save_tape,
):  # fmt: skip
    B, T, H, R = mem_q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    reads = mem_q.new_empty((B, T, H, R), dtype=torch.float32)
    final_state = mem_q.new_empty((N, H, R, R), dtype=torch.float32)
    tape = mem_q.new_empty(tape_shape(mem_q, cu_seqlens, segment_len) if save_tape else (0,), dtype=torch.float32)
    cut = plan(mem_q, beta, lam, cu_seqlens, update_rule, write, segment_len)
    flags = gate_flags(beta, lam, update_rule, use_gate_in_kernel)
    if cut.slots[0]:
        _replay(
            cut, (mem_q, mem_k, mem_v, beta, lam), (beta_bias, lam_bias), token_mask, cu_seqlens, flags,
            use_qk_activation_in_kernel, write, initial_state, None, None, False, final_state, None,
            tape if save_tape else None, (segment_len or SEGMENT_LEN) if save_tape else 0, reads,
        )  # fmt: skip
    return reads, final_state, tape


def delta_scan_with_state_pool(
    mem_q, mem_k, mem_v, beta, lam, state_pool, state_indices, output_state_indices, has_initial_state, token_mask,
    cu_seqlens, beta_bias, lam_bias, update_rule, write, use_qk_activation_in_kernel, use_gate_in_kernel, reads,
):  # fmt: skip
    B, T, H, R = mem_q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    per_token = output_state_indices is not None and output_state_indices.dim() == 2
    cut = plan(mem_q, beta, lam, cu_seqlens, update_rule, write, 0, whole=per_token)
    if not cut.slots[0]:
        return
    flags = gate_flags(beta, lam, update_rule, use_gate_in_kernel)
    start, copied = state_pool, cut.L <= T and write
    if copied and N:  # the last segment stores where the first one, elsewhere on the machine, may not yet have read
        start = state_pool.new_empty((N, H, R, R))
        copy_states_kernel[(-(-N * H * R // 128),)](
            given(state_pool), state_indices, has_initial_state, given(start), N, H, R=R, LANES=128,
            num_warps=4,
        )  # fmt: skip
    _replay(
        cut, (mem_q, mem_k, mem_v, beta, lam), (beta_bias, lam_bias), token_mask, cu_seqlens, flags,
        use_qk_activation_in_kernel, write, start, state_indices, None if copied else has_initial_state, copied,
        state_pool, output_state_indices, None, 0, reads,
    )  # fmt: skip


def lowerings():
    """Every (name, kernel, signature, constexprs, options) that the launchers pick, at sizes of an 8B model."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def tokens(B, T, H, R, dtype, gate, free):
        q, k, v = (meta(B, T, H, R, dtype=dtype) for _ in range(3))
        return q, k, v, meta(B, T, H, gate, dtype=dtype), meta(B, T, H, gate, dtype=dtype) if free else None

    def found():
        half, full = torch.bfloat16, torch.float32
        # fp32, free gates, lambda_outside and a mask hold most registers, several heads and packed rows most addresses
        for B, T, H, R, dtype, gate, free, raw, rule, N in (
            (1, 8192, 1, 8, half, 8, False, False, "standard", 0),
            (1, 131072, 1, 8, half, 8, False, True, "standard", 0),
            (1, 8192, 4, 8, full, 8, True, True, "lambda_outside", 0),
            (1, 32768, 4, 8, full, 8, True, True, "lambda_outside", 8),
            (1, 8192, 4, 8, full, 1, True, True, "lambda_outside", 8),
            (1024, 2048, 1, 8, half, 8, False, True, "standard", 0),
            (1, 131072, 1, 4, full, 4, False, True, "no_lambda", 0),
            (1, 8192, 1, 16, half, 16, False, False, "standard", 0),
            (1, 8192, 4, 16, full, 16, True, True, "lambda_outside", 8),
            (1, 8192, 1, 16, full, 1, True, False, "standard", 0),
            (1, 8192, 1, 32, half, 32, False, False, "standard", 0),
            (1, 8192, 4, 32, full, 32, True, True, "lambda_outside", 8),
            (1, 8192, 1, 64, half, 64, False, False, "standard", 0),
            (1, 8192, 4, 64, full, 64, True, True, "lambda_outside", 8),
        ):
            memory = tokens(B, T, H, R, dtype, gate, free)
            start, mask = meta(N or B, H, R, R), meta(B, T, dtype=torch.bool) if free else None
            cu_seqlens = meta(N + 1, dtype=torch.int32) if N else None
            biases = (meta(H, gate) if raw else None, meta(H, gate) if raw and free else None)
            options = (start, mask, cu_seqlens, *biases, rule, True, raw, raw, 0)
            words = (f"{B}x{T} H={H} R={R} gate={gate}", raw and "raw", free and "free", N and "packed", rule)
            name = " ".join(filter(None, words))
            yield from launches(name, delta_scan_fwd, *memory, *options, True)
            tape = meta(*tape_shape(memory[0], cu_seqlens, 0))
            yield from launches(name, delta_scan_bwd, meta(B, T, H, R), start, *memory, *options, tape)
        for B, T, R, dtype, N, snapshots in (
            *((64, 1, R, half, 0, False) for R in (4, 8, 16, 32, 64)),
            (64, 1, 8, full, 0, False),
            (1, 256, 8, half, 256, False),
            (64, 4, 8, half, 0, True),
            (64, 16, 8, full, 0, False),
            (64, 16, 16, full, 0, False),
            (64, 16, 64, half, 0, False),
            (1, 8192, 8, half, 0, False),
        ):
            memory = tokens(B, T, 1, R, dtype, R, False)
            pool, slots, reads = meta(512, 1, R, R), meta(N or B, dtype=torch.int32), meta(B, T, 1, R)
            after = meta(B, T, dtype=torch.int32) if snapshots else None
            cu_seqlens = meta(N + 1, dtype=torch.int32) if N else None
            options = (None, cu_seqlens, meta(1, R), None, "standard", True, True, True, reads)
            name = " ".join(filter(None, (f"pool {B}x{T} R={R} raw", N and "packed", snapshots and "snapshots")))
            yield from launches(name, delta_scan_with_state_pool, *memory, pool, slots, after, None, *options)

    yield from unique(found())
