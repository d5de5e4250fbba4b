"""Checks that read tensor values, and so wait for the device: on under DELTAMEM_DEBUG=1 (read at import)."""

import itertools
import os

import torch

ENABLED = os.environ.get("DELTAMEM_DEBUG", "0") not in ("", "0")


def _fail(function, name, rule, got):
    raise ValueError(f"{function}: {name} must {rule}, got {got}")


def cu_seqlens(function, cu, T, max_seqlen):
    values = cu.tolist()
    if values[0] != 0 or values[-1] > T or any(b < a for a, b in itertools.pairwise(values)):
        _fail(function, "cu_seqlens", f"start at 0, never decrease and end at or before {T}", values)
    longest = max((b - a for a, b in itertools.pairwise(values)), default=0)
    if max_seqlen is not None and longest > max_seqlen:
        _fail(function, "max_seqlen", f"be at least the longest sequence, {longest}", max_seqlen)


def _slots(function, name, indices, P, active=None):
    values = indices.reshape(-1)
    values = values[values >= 0] if active is None else values[active & (values >= 0)]
    if values.numel() and int(values.max()) >= P:
        _fail(function, name, f"be below the pool's {P} slots", int(values.max()))
    if values.unique().numel() != values.numel():
        repeated, counts = values.unique(return_counts=True)
        _fail(function, name, "be unique among active rows", f"slot {int(repeated[counts > 1][0])} twice")


def state_slots(function, pool, state_indices, output_state_indices):
    if state_indices is not None:
        _slots(function, "state_indices", state_indices, pool.shape[0])
    if output_state_indices is not None:
        active = None
        if state_indices is not None and output_state_indices.ndim == 1:
            active = state_indices >= 0
        _slots(function, "output_state_indices", output_state_indices, pool.shape[0], active)


def _tail_lengths(function, token_mask):
    lengths = token_mask.sum(1)
    expected = torch.arange(token_mask.shape[1], device=token_mask.device) < lengths[:, None]
    if not bool((expected == token_mask).all()):
        _fail(function, "token_mask", "mask only the tail of a row with a cache", "a hole or a masked head")
    return lengths


def cache(function, q, k, k_cache, cache, rows, state_indices):
    cache_seqlens, cache_leftpad, block_table = cache
    token_mask, cu_seqlens, _ = rows
    N = cache_seqlens.shape[0]
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
    elif token_mask is not None:
        lengths = _tail_lengths(function, token_mask)
    else:
        lengths = torch.full((N,), q.shape[1], device=q.device)
    active = torch.ones(N, dtype=torch.bool, device=q.device) if state_indices is None else state_indices >= 0
    if bool((cache_seqlens[active] < 0).any()):
        _fail(function, "cache_seqlens", "be >= 0", int(cache_seqlens[active].min()))
    used = cache_seqlens + (lengths if k is not None else 0)
    capacity = k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    if bool((used[active] > capacity).any()):
        _fail(
            function,
            "k_cache",
            f"hold cache_seqlens and the appended tokens, {int(used[active].max())} slots",
            capacity,
        )
    if k is None and bool((lengths[active] > cache_seqlens[active]).any()):
        _fail(function, "cache_seqlens", "count the row's own tokens when k is None", cache_seqlens.tolist())
    if cache_leftpad is not None and bool((cache_leftpad[active] > cache_seqlens[active]).any()):
        _fail(function, "cache_leftpad", "be at most cache_seqlens", cache_leftpad.tolist())
    if block_table is not None:
        pages = (used + k_cache.shape[1] - 1) // k_cache.shape[1]
        needed = torch.arange(block_table.shape[1], device=q.device) < pages[:, None]
        ids = block_table[needed & active[:, None]]
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= k_cache.shape[0]):
            bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            _fail(function, "block_table", f"name pages 0 to {k_cache.shape[0] - 1} where a row has tokens", bad)


def positions(function, x, rows):
    if x.numel() and (int(x.min()) < 0 or int(x.max()) >= rows):
        bad = int(x.min()) if int(x.min()) < 0 else int(x.max())
        _fail(function, "positions", f"be within the rotary table's {rows} rows", bad)


def attention_call(function, q, cu, max_seqlen, position_ids, rotary_cos):
    if cu is not None:
        cu_seqlens(function, cu, q.shape[1], max_seqlen)
    if position_ids is not None and rotary_cos is not None and rotary_cos.ndim == 2:
        positions(function, position_ids, rotary_cos.shape[0])


def pool_call(function, mem_q, cu, pool):
    if cu is not None:
        cu_seqlens(function, cu, mem_q.shape[1], None)
    state_slots(function, *pool[:3])


def kvcache_call(function, q, k, k_cache, kv, rows, pool, position_ids, rotary_cos):
    attention_call(function, q, rows.cu_seqlens, rows.max_seqlen or None, position_ids, rotary_cos)
    if pool.state_pool is not None:
        state_slots(function, *pool[:3])
    cache(function, q, k, k_cache, kv, rows, pool.state_indices)
    if rotary_cos is not None and rotary_cos.ndim == 2 and position_ids is None:
        tokens = 0 if k is None else (q.shape[1] if rows.cu_seqlens is None else int(rows.cu_seqlens.diff().max()))
        filled = kv.cache_seqlens if pool.state_indices is None else kv.cache_seqlens[pool.state_indices >= 0]
        if filled.numel() and int(filled.max()) + tokens > rotary_cos.shape[0]:
            _fail(function, "rotary_cos", f"hold {int(filled.max()) + tokens} positions", rotary_cos.shape[0])
