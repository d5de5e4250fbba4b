"""The input contract, once, for every backend: shapes, dtypes, devices, layouts, options.

Nothing here reads a tensor's values, so nothing waits for a device; ``debug.py`` does, under DELTAMEM_DEBUG=1.
A message reads ``<function>: <argument> must <rule>, got <value>``. What is checked is a call's signature
(``plans.py``): metadata of tensors and options, so calls of one signature are checked once.
"""

import torch

UPDATE_RULES = ("standard", "lambda_outside", "no_lambda")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DOUBLE = (torch.float64,)
_INT32 = (torch.int32,)
_BOOL = (torch.bool,)
_FP32 = (torch.float32,)


def _fail(function, name, rule, got):
    raise ValueError(f"{function}: {name} must {rule}, got {got}")


def _names(dtypes):
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def _tensor(function, name, x, shape, dtypes, device):
    """``x`` must be a tensor of this shape, one of these dtypes, on this device, contiguous in its last dimension."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}")
    if x.shape != shape:
        _fail(function, name, f"have shape {tuple(shape)}", tuple(x.shape))
    if x.dtype not in dtypes:
        raise TypeError(f"{function}: {name} must be {_names(dtypes)}, got {_names((x.dtype,))}")
    if x.device != device.device:
        _fail(function, name, f"be on {device.device}", x.device)
    if not x.is_contiguous() and x.stride(-1) != 1 and x.shape[-1] > 1:
        _fail(function, name, "be contiguous in its last dimension", f"strides {x.stride()}")


def _is_tensor(function, name, x, ndims, rule):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}")
    if x.ndim not in ndims:
        _fail(function, name, rule, f"shape {tuple(x.shape)}")


def _absent(function, rule, **arguments):
    for name, x in arguments.items():
        if x is not None:
            _fail(function, name, rule, "a tensor" if isinstance(x, torch.Tensor) else repr(x))


def rows(function, B, T, token_mask, cu_seqlens, device):
    """Number of sequences: B dense rows, or those that ``cu_seqlens`` cuts from one packed row."""
    if token_mask is not None:
        _tensor(function, "token_mask", token_mask, (B, T), _BOOL, device)
    if cu_seqlens is None:
        return B
    if B != 1:
        _fail(function, "cu_seqlens", "come with batch size 1 (packed sequences)", f"batch size {B}")
    _is_tensor(function, "cu_seqlens", cu_seqlens, (1,), "have shape (N + 1,)")
    if cu_seqlens.shape[0] < 1:
        _fail(function, "cu_seqlens", "have shape (N + 1,)", "shape (0,)")
    _tensor(function, "cu_seqlens", cu_seqlens, cu_seqlens.shape, _INT32, device)
    return cu_seqlens.shape[0] - 1


def memory(function, mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, scan):
    """The memory arguments; returns (B, T, H, R)."""
    update_rule, write, _, use_gate_in_kernel = scan
    _is_tensor(function, "mem_q", mem_q, (3, 4), "have shape (B, T, H, R) or (B, T, R)")
    if update_rule not in UPDATE_RULES:
        _fail(function, "update_rule", f"be one of {', '.join(UPDATE_RULES)}", repr(update_rule))
    shape = mem_q.shape
    B, T, R = shape[0], shape[1], shape[-1]
    H = shape[2] if len(shape) == 4 else 1
    if R < 1 or H < 1:
        _fail(function, "mem_q", "have at least one state head and rank 1", f"shape {tuple(shape)}")
    floats = _floats(mem_q)
    _tensor(function, "mem_q", mem_q, shape, floats, mem_q)
    if lam is not None and update_rule == "no_lambda":
        _fail(function, "lam", "be None with update_rule 'no_lambda'", "a tensor")
    if not use_gate_in_kernel:
        _absent(function, "be None unless use_gate_in_kernel", beta_bias=beta_bias, lam_bias=lam_bias)
    if lam is None:
        _absent(function, "be None without lam", lam_bias=lam_bias)
    for name, x in (("mem_k", mem_k), ("mem_v", mem_v)):
        if x is not None:
            _tensor(function, name, x, shape, floats, mem_q)
        elif write:
            _fail(function, name, "be given when write is true", "None")
    if beta is None:
        if write:
            _fail(function, "beta", "be given when write is true", "None")
    else:
        _gate(function, "beta", beta, shape, floats, mem_q)
    if lam is not None:
        _gate(function, "lam", lam, shape, floats, mem_q)
    state_dtype = _state_dtype(mem_q)
    if beta_bias is not None:
        if beta is None:
            _fail(function, "beta_bias", "be None without beta", "a tensor")
        _tensor(function, "beta_bias", beta_bias, (H, beta.shape[-1]), state_dtype, mem_q)
    if lam_bias is not None:
        _tensor(function, "lam_bias", lam_bias, (H, lam.shape[-1]), state_dtype, mem_q)
    return B, T, H, R


def _gate(function, name, x, shape, floats, device):
    if isinstance(x, torch.Tensor) and x.shape != shape and x.shape != (*shape[:-1], 1):
        _fail(function, name, f"have shape {tuple(shape)} or {(*shape[:-1], 1)}", tuple(x.shape))
    _tensor(function, name, x, getattr(x, "shape", None), floats, device)


def initial_state(function, x, N, H, R, mem_q):
    if x is not None:
        _tensor(function, "initial_state", x, (N, H, R, R), _state_dtype(mem_q), mem_q)


def _state_dtype(x):
    return _DOUBLE if x.dtype == torch.float64 else _FP32


def state_pool(function, pool, state_indices, output_state_indices, has_initial_state, B, T, N, H, R, mem_q):
    _is_tensor(function, "state_pool", pool, (4,), f"have shape (P, {H}, {R}, {R})")
    _tensor(function, "state_pool", pool, (pool.shape[0], H, R, R), _state_dtype(mem_q), mem_q)
    if R > 1 and pool.stride(-2) != R:
        _fail(function, "state_pool", "be contiguous in its last two dimensions", f"strides {pool.stride()}")
    if state_indices is None:
        if pool.shape[0] < N:
            _fail(
                function,
                "state_pool",
                f"have a slot for each of {N} rows without state_indices",
                tuple(pool.shape),
            )
    else:
        _tensor(function, "state_indices", state_indices, (N,), _INT32, mem_q)
    if output_state_indices is not None:
        _is_tensor(function, "output_state_indices", output_state_indices, (1, 2), f"have shape ({N},) or ({B}, {T})")
        shape = (N,) if output_state_indices.ndim == 1 else (B, T)
        _tensor(function, "output_state_indices", output_state_indices, shape, _INT32, mem_q)
    if has_initial_state is not None:
        _tensor(function, "has_initial_state", has_initial_state, (N,), _BOOL, mem_q)


def _floats(x):
    """The dtypes that go with ``x``."""
    return _DOUBLE if x.dtype == torch.float64 else _FLOATS


def queries(function, q):
    """q alone; returns (B, T)."""
    _is_tensor(function, "q", q, (4,), "have shape (B, T, HQ, D)")
    B, T, HQ, D = q.shape
    if HQ < 1 or D < 1:
        _fail(function, "q", "have at least one head and one channel", f"shape {tuple(q.shape)}")
    _tensor(function, "q", q, q.shape, _floats(q), q)
    return B, T


def keys_values(function, q, names, k, v, leading):
    """k and v (or their caches) of leading dimensions ``leading``; returns HKV."""
    k_name, v_name = names
    HQ, D = q.shape[2:]
    _is_tensor(function, k_name, k, (4,), f"have 4 dimensions with head size {D}")
    HKV = k.shape[2]
    _tensor(function, k_name, k, (*(leading or k.shape[:2]), HKV, D), (q.dtype,), q)
    _tensor(function, v_name, v, k.shape, (q.dtype,), q)
    if HKV < 1 or HQ % HKV != 0:
        _fail(function, "q", f"have a multiple of {k_name}'s {HKV} heads", f"{HQ} heads")
    return HKV


def same_tokens(function, q, mem_q):
    """Memory and attention describe the same tokens, in fp64 both or neither."""
    if mem_q.shape[:2] != q.shape[:2]:
        _fail(function, "mem_q", f"have q's batch size and tokens {tuple(q.shape[:2])}", tuple(mem_q.shape[:2]))
    if mem_q.dtype not in _floats(q):
        raise TypeError(f"{function}: mem_q must be float64 exactly when q is, got {_names((mem_q.dtype,))}")
    if mem_q.device != q.device:
        _fail(function, "mem_q", f"be on {q.device}", mem_q.device)


def no_memory(function, **arguments):
    _absent(function, "be None without mem_q", **arguments)


def corrections(function, q, HKV, HR, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight):
    HQ, D = q.shape[2:]
    for name, x, shape in (
        ("delta_q", delta_q, (HQ * D, HR)),
        ("delta_k", delta_k, (HKV * D, HR)),
        ("delta_v", delta_v, (HKV * D, HR)),
        ("q_norm_weight", q_norm_weight, (D,)),
        ("k_norm_weight", k_norm_weight, (D,)),
    ):
        if x is not None:
            _tensor(function, name, x, shape, _floats(q), q)


def rotary(function, q, cos, sin, positions, reach):
    """``reach``: how many positions a table must at least hold, as far as the host knows."""
    B, T, _, D = q.shape
    if (cos is None) != (sin is None):
        given, missing = ("rotary_cos", "rotary_sin") if sin is None else ("rotary_sin", "rotary_cos")
        _fail(function, missing, f"be given together with {given}", "None")
    if positions is not None:
        _tensor(function, "positions", positions, (B, T), _INT32, q)
    if cos is None:
        return
    rule = f"have shape (S, rotary_dim/2) or ({B}, {T}, rotary_dim/2)"
    _is_tensor(function, "rotary_cos", cos, (2, 3), rule)
    if not 1 <= cos.shape[-1] <= D // 2:
        _fail(function, "rotary_cos", f"have 1 to D/2 = {D // 2} columns", f"shape {tuple(cos.shape)}")
    shape = (cos.shape[0], cos.shape[1]) if cos.ndim == 2 else (B, T, cos.shape[2])
    _tensor(function, "rotary_cos", cos, shape, _floats(q), q)
    _tensor(function, "rotary_sin", sin, cos.shape, _floats(q), q)
    if cos.ndim == 2 and positions is None and cos.shape[0] < reach:
        _fail(function, "rotary_cos", f"hold the {reach} positions of this call", f"{cos.shape[0]} rows")


def softmax(function, softmax_scale, causal, window_size, softcap, max_seqlen):
    if softmax_scale is not None and not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"{function}: softmax_scale must be a number or None, got {type(softmax_scale).__name__}")
    if len(window_size) != 2 or not all(isinstance(x, int) and x >= -1 for x in window_size):
        _fail(function, "window_size", "be two integers >= -1", window_size)
    if not isinstance(softcap, (int, float)):
        raise TypeError(f"{function}: softcap must be a number, got {type(softcap).__name__}")
    if softcap < 0:
        _fail(function, "softcap", "be >= 0", softcap)
    if max_seqlen is not None and (not isinstance(max_seqlen, int) or max_seqlen < 0):
        _fail(function, "max_seqlen", "be an integer >= 0 or None", repr(max_seqlen))


def num_splits(function, x):
    if not isinstance(x, int) or x < 0:
        _fail(function, "num_splits", "be an integer >= 0", repr(x))


def cache(function, q, k_cache, v_cache, k, v, cache_seqlens, cache_leftpad, block_table, state_indices, N):
    """Caches and what addresses them; returns HKV."""
    HKV = keys_values(function, q, ("k_cache", "v_cache"), k_cache, v_cache, None)
    if block_table is None:
        if k_cache.shape[0] != N:
            _fail(function, "k_cache", f"have a row for each of {N} rows", f"shape {tuple(k_cache.shape)}")
    else:
        _is_tensor(function, "block_table", block_table, (2,), f"have shape ({N}, max_pages)")
        _tensor(function, "block_table", block_table, (N, block_table.shape[1]), _INT32, q)
    if (k is None) != (v is None):
        given, missing = ("k", "v") if v is None else ("v", "k")
        _fail(function, missing, f"be given together with {given}", "None")
    if k is not None:
        _tensor(function, "k", k, (*q.shape[:2], HKV, q.shape[3]), (q.dtype,), q)
        _tensor(function, "v", v, k.shape, (q.dtype,), q)
    if cache_seqlens is not None:
        _tensor(function, "cache_seqlens", cache_seqlens, (N,), _INT32, q)
    elif k is not None or block_table is not None:
        _fail(function, "cache_seqlens", "be given when k or block_table is", "None")
    if cache_leftpad is not None:
        _tensor(function, "cache_leftpad", cache_leftpad, (N,), _INT32, q)
    if state_indices is not None:
        _tensor(function, "state_indices", state_indices, (N,), _INT32, q)
    return HKV


def result(function, name, x, shape, dtype, device):
    if x is not None:
        _tensor(function, name, x, shape, (dtype,), device)


def output(function, attn_proj, reads, delta_o, rms_weight, residual, out):
    _is_tensor(function, "attn_proj", attn_proj, (3,), "have shape (B, T, hidden)")
    B, T, hidden = attn_proj.shape
    floats = _floats(attn_proj)
    _tensor(function, "attn_proj", attn_proj, attn_proj.shape, floats, attn_proj)
    _is_tensor(function, "reads", reads, (3, 4), f"have shape ({B}, {T}, H, R) or ({B}, {T}, R)")
    _tensor(function, "reads", reads, (B, T, *reads.shape[2:]), _state_dtype(attn_proj), attn_proj)
    HR = reads.shape[2] * (reads.shape[3] if reads.ndim == 4 else 1)
    _tensor(function, "delta_o", delta_o, (hidden, HR), floats, attn_proj)
    if rms_weight is not None:
        _tensor(function, "rms_weight", rms_weight, (hidden,), floats, attn_proj)
    if residual is not None:
        _tensor(function, "residual", residual, attn_proj.shape, (attn_proj.dtype,), attn_proj)
    result(function, "out", out, attn_proj.shape, attn_proj.dtype, attn_proj)


def inference_only(function, instead, *tensors):
    """In-place functions have no backward pass."""
    if not torch.is_grad_enabled():
        return
    for x in tensors:
        if x is not None and x.requires_grad:
            raise RuntimeError(
                f"{function}: inputs must not require grad in grad mode, got one that does; {instead} trains"
            )
