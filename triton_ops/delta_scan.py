"""Launchers of the delta-rule scan.

    segment maps (LANES segments' rows, all at once) -> group maps, one or two levels -> replay of every segment

or the replay alone, where sequences are short or enough to fill the machine. Maps stay in L2: 4 (RP + 1) RP^2
bytes a segment and head. The scan's floor is its inputs and reads once through memory, 12 R bytes a token in
bf16 with row gates; its maps' arithmetic, 3 R^3 + 3 R^2 operations a token, is above that from R = 8 on.
"""

import torch

from deltamem_kernels.ops import SEGMENT_LEN, tape_shape

from .delta_scan_bwd import delta_scan_bwd
from .lowering import launches
from .scan_build import build_maps, gate_flags
from .scan_plan import AHEAD, Plan, given, plan, width
from .scan_replay import copy_states_kernel, replay_kernel

__all__ = ["delta_scan_bwd", "delta_scan_fwd", "delta_scan_with_state_pool"]


def _replay(
    cut: Plan, tokens, biases, token_mask, cu_seqlens, flags, write, start, start_slots, has_initial, copied,
    final, final_slots, tape, tape_len, reads,
):  # fmt: skip
    mem_q, mem_k, mem_v, beta, lam = tokens
    B, T, H, R = mem_q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    CW = cut.RP // cut.NB
    maps = map_biases = None
    if cut.levels:
        maps, map_biases = build_maps(cut, None, mem_v, mem_k, beta, lam, *biases, token_mask, cu_seqlens, flags, False)
    ahead = 1 if T == 1 else AHEAD[cut.RP][1]
    while tape_len % ahead:  # a tape's state is stored between two blocks of tokens
        ahead //= 2
    per_token = final_slots is not None and final_slots.dim() == 2
    replay_kernel[(cut.blocks(cut.slots[0], H),)](
        given(mem_q), *map(given, (mem_k, mem_v, beta, lam) if write else (None,) * 4), *map(given, biases),
        given(token_mask), cu_seqlens, given(start), start_slots, has_initial, maps, map_biases,
        given(final), given(final_slots), tape, given(reads),
        T, N, H, cut.L, cut.slots[0], cut.second, cut.third,
        R=R, RP=cut.RP, NB=cut.NB, MAP_SHARED=cut.map_shared, **flags, WRITE=write, PER_TOKEN=per_token,
        COPIED=copied, TAPE=tape_len, ONE=T == 1, LEVELS=cut.levels, G1=cut.group, G2=cut.supergroup,
        LANES=cut.LANES, U=ahead, WQ=width(mem_q, R, CW), WK=width(mem_k, R, CW), WS=width(start, R, min(CW, 4)),
        WM=min(cut.RP, 4), num_warps=cut.num_warps, num_stages=1,
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
    flags = gate_flags(beta, lam, update_rule, use_qk_activation_in_kernel, use_gate_in_kernel)
    if cut.slots[0]:
        _replay(
            cut, (mem_q, mem_k, mem_v, beta, lam), (beta_bias, lam_bias), token_mask, cu_seqlens, flags, write,
            initial_state, None, None, False, final_state, None, tape if save_tape else None,
            (segment_len or SEGMENT_LEN) if save_tape else 0, reads,
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
    flags = gate_flags(beta, lam, update_rule, use_qk_activation_in_kernel, use_gate_in_kernel)
    start, copied = state_pool, cut.L <= T and write
    if copied and N:  # the last segment stores where the first one, elsewhere on the machine, may not yet have read
        start = state_pool.new_empty((N, H, R, R))
        copy_states_kernel[(-(-N * H * R // 128),)](
            given(state_pool), state_indices, has_initial_state, given(start), N, H, R=R, LANES=128,
            num_warps=4,
        )  # fmt: skip
    _replay(
        cut, (mem_q, mem_k, mem_v, beta, lam), (beta_bias, lam_bias), token_mask, cu_seqlens, flags, write,
        start, state_indices, None if copied else has_initial_state, copied, state_pool, output_state_indices,
        None, 0, reads,
    )  # fmt: skip


def lowerings():
    """Every (name, kernel, signature, constexprs, options) that the launchers pick, at sizes of an 8B model."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def tokens(B, T, H, R, dtype, gate, free):
        q, k, v = (meta(B, T, H, R, dtype=dtype) for _ in range(3))
        return q, k, v, meta(B, T, H, gate, dtype=dtype), meta(B, T, H, gate, dtype=dtype) if free else None

    half, full = torch.bfloat16, torch.float32
    for B, T, H, R, dtype, gate, free, raw, rule in (
        (1, 8192, 1, 8, half, 8, False, False, "standard"),
        (1, 131072, 1, 8, half, 8, False, True, "standard"),
        (1, 8192, 4, 8, full, 8, True, True, "lambda_outside"),
        (1, 8192, 1, 8, half, 1, False, False, "standard"),
        (1, 8192, 1, 4, half, 4, False, False, "no_lambda"),
        (1, 8192, 1, 16, half, 16, False, False, "standard"),
        (1, 8192, 1, 16, full, 1, True, True, "standard"),
        (1, 8192, 1, 32, half, 32, False, False, "standard"),
        (1, 8192, 1, 64, half, 64, False, True, "standard"),
    ):
        memory = tokens(B, T, H, R, dtype, gate, free)
        biases = (meta(H, gate) if raw else None, meta(H, gate) if raw and free else None)
        options = (None, None, None, *biases, rule, True, raw, raw, 0)
        name = f"T={T} H={H} R={R} gate={gate}{' raw' if raw else ''}{' free' if free else ''} {rule}"
        yield from launches(name, delta_scan_fwd, *memory, *options, True)
        tape = meta(*tape_shape(memory[0], None, 0))
        yield from launches(name, delta_scan_bwd, meta(B, T, H, R), None, *memory, *options, tape)
    for T, R in ((1, 8), (1, 16), (4, 8), (8192, 8)):
        memory = tokens(1 if T > 4 else 64, T, 1, R, half, R, False)
        pool, slots = meta(128, 1, R, R), meta(memory[0].shape[0], dtype=torch.int32)
        name, reads = f"pool T={T} R={R} raw", meta(*memory[0].shape)
        options = (None, None, meta(1, R), None, "standard", True, True, True, reads)
        yield from launches(name, delta_scan_with_state_pool, *memory, pool, slots, None, None, *options)
    packed, cu_seqlens = tokens(1, 32768, 1, 8, half, 8, False), meta(9, dtype=torch.int32)
    options = (None, None, cu_seqlens, None, None, "standard", True, False, False, 0)
    yield from launches("packed T=32768 R=8", delta_scan_fwd, *packed, *options, True)
    tape = meta(*tape_shape(packed[0], cu_seqlens, 0))
    yield from launches("packed T=32768 R=8", delta_scan_bwd, meta(1, 32768, 1, 8), None, *packed, *options, tape)
