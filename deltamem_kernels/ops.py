"""Torch-only operator contracts: schemas, fakes and op handles.

An op's name says the mathematics, its overload says who computes it: ``deltamem::delta_scan_fwd.cpu``.
Every backend fills the same schema from the function of the same name in its own room, imported when the
op first runs. Shapes and letters are those of ``api.py``; memory tensors are 4-D here. An absent result
(the gradient of an absent input) is an empty tensor; a launcher may return None for it.
"""

import functools
import importlib
from collections.abc import Callable

import torch

# backend -> the package whose modules hold its launchers; one module per op family.
ROOMS = {
    "reference": "deltamem_kernels.reference",
    "cpu": "deltamem_kernels.native",
    "triton": "deltamem_kernels.triton_ops",
    "cuda": "deltamem_kernels.native",
}

# native backend -> the compiled module that its launchers call
NATIVE_MODULES = {"cpu": "deltamem_kernels._cpu", "cuda": "deltamem_kernels._cuda"}

# Groups of arguments that several schemas share, in the order every launcher takes them.
_SCAN_INPUTS = "Tensor mem_q, Tensor? mem_k, Tensor? mem_v, Tensor? beta, Tensor? lam"
_GATE_BIASES = "Tensor? beta_bias, Tensor? lam_bias"
_SCAN_FLAGS = "str update_rule, bool write, bool use_qk_activation_in_kernel, bool use_gate_in_kernel"
_POOL_INDICES = "Tensor? state_indices, Tensor? output_state_indices, Tensor? has_initial_state"
_DELTAS = "Tensor? reads, Tensor? delta_q, Tensor? delta_k, Tensor? delta_v"
_NORMS = "Tensor? q_norm_weight, Tensor? k_norm_weight, float norm_eps"
_ROTARY = "Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, Tensor? positions"
_Q_PROLOGUE = f"Tensor? reads, Tensor? delta_q, Tensor? q_norm_weight, float norm_eps, {_ROTARY}"
_SOFTMAX = "float softmax_scale, bool causal, int window_left, int window_right, float softcap"
_ROWS = "Tensor? token_mask, Tensor? cu_seqlens, int max_seqlen"
_CACHE = "Tensor cache_seqlens, Tensor? cache_leftpad, Tensor? block_table"

# op -> (module in every room, arguments, results)
SCHEMAS = {
    # tape: [S, H, R, R] start states of the segments, [0] unless save_tape. segment_len 0: the backend's choice.
    "delta_scan_fwd": (
        "delta_scan",
        f"{_SCAN_INPUTS}, Tensor? initial_state, Tensor? token_mask, Tensor? cu_seqlens, {_GATE_BIASES}, "
        f"{_SCAN_FLAGS}, int segment_len, bool save_tape",
        "(Tensor reads, Tensor final_state, Tensor tape)",
    ),
    "delta_scan_bwd": (
        "delta_scan",
        f"Tensor? dreads, Tensor? dfinal_state, {_SCAN_INPUTS}, Tensor? initial_state, Tensor? token_mask, "
        f"Tensor? cu_seqlens, {_GATE_BIASES}, {_SCAN_FLAGS}, int segment_len, Tensor tape",
        "(Tensor dmem_q, Tensor dmem_k, Tensor dmem_v, Tensor dbeta, Tensor dlam, Tensor dinitial_state, "
        "Tensor dbeta_bias, Tensor dlam_bias)",
    ),
    "delta_scan_with_state_pool": (
        "delta_scan",
        f"{_SCAN_INPUTS}, Tensor(a!) state_pool, {_POOL_INDICES}, Tensor? token_mask, Tensor? cu_seqlens, "
        f"{_GATE_BIASES}, {_SCAN_FLAGS}, Tensor(b!) reads",
        "()",
    ),
    "delta_prep_fwd": (
        "delta_prep",
        f"Tensor? q, Tensor? k, Tensor? v, {_DELTAS}, {_NORMS}, {_ROTARY}, Tensor? cu_seqlens",
        "(Tensor q_prep, Tensor k_prep, Tensor v_prep)",
    ),
    # delta_scan_fwd, then delta_prep_fwd of k and v with its reads: the scan's last pass is the prologue of the other.
    "delta_scan_prep_fwd": (
        "delta_prep",
        f"{_SCAN_INPUTS}, Tensor? initial_state, Tensor? token_mask, Tensor? cu_seqlens, {_GATE_BIASES}, "
        f"{_SCAN_FLAGS}, int segment_len, bool save_tape, Tensor? k, Tensor? v, Tensor? delta_k, Tensor? delta_v, "
        f"Tensor? k_norm_weight, float norm_eps, {_ROTARY}",
        "(Tensor reads, Tensor final_state, Tensor tape, Tensor k_prep, Tensor v_prep)",
    ),
    # drotary_cos, drotary_sin: fp32 per token [B, T, rotary_dim/2], [0] unless rotary_grad.
    "delta_prep_bwd": (
        "delta_prep",
        f"Tensor? dq_prep, Tensor? dk_prep, Tensor? dv_prep, Tensor? q, Tensor? k, Tensor? v, {_DELTAS}, {_NORMS}, "
        f"{_ROTARY}, Tensor? cu_seqlens, bool rotary_grad",
        "(Tensor dq, Tensor dk, Tensor dv, Tensor dreads, Tensor ddelta_q, Tensor ddelta_k, Tensor ddelta_v, "
        "Tensor dq_norm_weight, Tensor dk_norm_weight, Tensor drotary_cos, Tensor drotary_sin)",
    ),
    "delta_prep_with_kvcache": (
        "delta_prep",
        "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? reads, Tensor? delta_k, "
        f"Tensor? delta_v, Tensor? k_norm_weight, float norm_eps, {_ROTARY}, Tensor? token_mask, "
        "Tensor? cu_seqlens, Tensor cache_seqlens, Tensor? block_table, Tensor? state_indices",
        "()",
    ),
    "delta_attention_fwd": (
        "delta_attention",
        f"Tensor q, Tensor k, Tensor v, {_Q_PROLOGUE}, {_ROWS}, {_SOFTMAX}",
        "(Tensor out, Tensor lse)",
    ),
    # q, k, v here are the prepared ones.
    "delta_attention_bwd": (
        "delta_attention",
        f"Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ROWS}, {_SOFTMAX}",
        "(Tensor dq, Tensor dk, Tensor dv)",
    ),
    # appended: the keys of this call's tokens are in the cache at cache_seqlens + i (else they end at cache_seqlens).
    "delta_attention_with_kvcache": (
        "delta_attention",
        f"Tensor q, Tensor k_cache, Tensor v_cache, {_Q_PROLOGUE}, {_ROWS}, {_CACHE}, Tensor? state_indices, "
        f"bool appended, {_SOFTMAX}, int num_splits, Tensor(a!) out, Tensor(b!) lse",
        "()",
    ),
    "delta_decode": (
        "delta_decode",
        "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
        "Tensor? mem_q, Tensor? mem_k, Tensor? mem_v, Tensor? beta, Tensor? lam, Tensor(c!)? state_pool, "
        f"{_POOL_INDICES}, {_GATE_BIASES}, {_SCAN_FLAGS}, Tensor? delta_q, Tensor? delta_k, Tensor? delta_v, "
        f"{_NORMS}, {_ROTARY}, {_ROWS}, {_CACHE}, {_SOFTMAX}, int num_splits, "
        "Tensor(d!) out, Tensor(e!)? reads, Tensor(f!) lse",
        "()",
    ),
    "delta_output_fwd": (
        "delta_output",
        "Tensor attn_proj, Tensor reads, Tensor delta_o, Tensor? rms_weight, float rms_eps, Tensor? residual",
        "Tensor",
    ),
    "delta_output_bwd": (
        "delta_output",
        "Tensor dy, Tensor reads, Tensor delta_o, Tensor? rms_weight, float rms_eps",
        "(Tensor dreads, Tensor ddelta_o, Tensor drms_weight)",
    ),
    "delta_output_out": (
        "delta_output",
        "Tensor attn_proj, Tensor reads, Tensor delta_o, Tensor? rms_weight, float rms_eps, Tensor? residual, "
        "Tensor(a!) out",
        "()",
    ),
}

# Ops that join others of a chain -> the backends that have them; elsewhere the chain runs those others.
JOINED = {"delta_scan_prep_fwd": ("reference", "triton")}

# Tokens between two saved start states of a backward tape. The state is R x R, so 64 tokens make the tape 1/64
# of the full history while a segment's recomputed states (64 R R floats) still fit the first-level cache.
SEGMENT_LEN = 64


def tape_shape(mem_q: torch.Tensor, cu_seqlens: torch.Tensor | None, segment_len: int) -> tuple[int, ...]:
    """Shape of ``tape``: segment s of dense row b at ``b * ceil(T / L) + s``, of packed sequence n at
    ``cu_seqlens[n] // L + n + s``."""
    B, T, H, R = mem_q.shape
    L = segment_len or SEGMENT_LEN
    segments = B * ((T + L - 1) // L) if cu_seqlens is None else T // L + cu_seqlens.shape[0] - 1
    return segments, H, R, R


# ---- fakes: shapes and dtypes of results, without data ------------------------------------------------------


def state_dtype(x: torch.Tensor) -> torch.dtype:
    """dtype of states, reads and lse beside inputs like ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _like(x: torch.Tensor | None, reference: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous result for ``x``, or the empty tensor that stands for an absent one."""
    if x is None:
        return reference.new_empty((0,), dtype=dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _fake_scan_fwd(mem_q, mem_k, mem_v, beta, lam, initial_state, token_mask, cu_seqlens, *rest):
    segment_len, save_tape = rest[-2:]
    B, _, H, R = mem_q.shape
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tape = tape_shape(mem_q, cu_seqlens, segment_len) if save_tape else (0,)
    return tuple(mem_q.new_empty(shape, dtype=state_dtype(mem_q)) for shape in (mem_q.shape, (rows, H, R, R), tape))


def _fake_scan_bwd(dreads, dfinal, mem_q, mem_k, mem_v, beta, lam, initial_state, mask, cu, *rest):
    beta_bias, lam_bias = rest[:2]
    inputs = (mem_q, mem_k, mem_v, beta, lam, initial_state, beta_bias, lam_bias)
    return tuple(_like(x, mem_q) for x in inputs)


def _fake_prep_fwd(q, k, v, *rest):
    given = next(x for x in (q, k, v) if x is not None)
    return tuple(_like(x, given) for x in (q, k, v))


def _fake_scan_prep_fwd(*args):
    k, v = args[16:18]
    given = v if k is None else k
    return *_fake_scan_fwd(*args[:16]), _like(k, given), _like(v, given)


def _fake_prep_bwd(dq, dk, dv, q, k, v, reads, delta_q, delta_k, delta_v, q_norm, k_norm, eps, cos, *rest):
    rotary_grad = rest[-1]
    given = next(x for x in (q, k, v) if x is not None)
    grads = [_like(x, given) for x in (q, k, v, reads, delta_q, delta_k, delta_v, q_norm, k_norm)]
    per_token = (*given.shape[:2], cos.shape[-1]) if rotary_grad else (0,)
    return (*grads, *(given.new_empty(per_token, dtype=state_dtype(given)) for _ in range(2)))


def _fake_attention_fwd(q, k, v, *rest):
    B, T, HQ, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, HQ, T), dtype=state_dtype(q))


def _fake_attention_bwd(dout, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_output_fwd(attn_proj, *rest):
    return attn_proj.new_empty(attn_proj.shape)


def _fake_output_bwd(dy, reads, delta_o, rms_weight, eps):
    return _like(reads, dy), _like(delta_o, dy), _like(rms_weight, dy)


def _fake_in_place(*args):
    return None


_FAKES = {
    "delta_scan_fwd": _fake_scan_fwd,
    "delta_scan_bwd": _fake_scan_bwd,
    "delta_prep_fwd": _fake_prep_fwd,
    "delta_scan_prep_fwd": _fake_scan_prep_fwd,
    "delta_prep_bwd": _fake_prep_bwd,
    "delta_attention_fwd": _fake_attention_fwd,
    "delta_attention_bwd": _fake_attention_bwd,
    "delta_output_fwd": _fake_output_fwd,
    "delta_output_bwd": _fake_output_bwd,
}


# ---- registration -----------------------------------------------------------------------------------------


def _lazy(op: str, backend: str) -> Callable:
    """The launcher of ``op`` in ``backend``'s room, imported at its first call."""
    launcher = None

    def run(*args):
        nonlocal launcher
        if launcher is None:
            module = importlib.import_module(f"{ROOMS[backend]}.{SCHEMAS[op][0]}")
            launcher = getattr(module, op)
            if backend in NATIVE_MODULES:
                launcher = functools.partial(launcher, importlib.import_module(NATIVE_MODULES[backend]))
        return launcher(*args)

    def run_on_their_device(*args):
        with torch.cuda.device_of(next(x for x in args if isinstance(x, torch.Tensor))):
            return run(*args)

    return run_on_their_device if backend == "triton" else run  # Triton launches on the current device


def _as_op(launcher: Callable) -> Callable:
    """The launcher with an empty tensor for each result that it leaves None."""

    def run(*args):
        results = launcher(*args)
        if isinstance(results, tuple) and any(x is None for x in results):
            given = next(x for x in results if x is not None)
            results = tuple(given.new_empty(0) if x is None else x for x in results)
        return results

    return run


_LIBRARY = torch.library.Library("deltamem", "DEF")

# backend -> op -> the launcher, and the op overload ``deltamem::<op>.<backend>`` that dispatches to it
LAUNCHERS = {
    backend: {op: _lazy(op, backend) for op in SCHEMAS if backend in JOINED.get(op, ROOMS)} for backend in ROOMS
}
OVERLOADS: dict[str, dict[str, Callable]] = {backend: {} for backend in ROOMS}

for _backend, _launchers in LAUNCHERS.items():
    for _op, _launcher in _launchers.items():
        _, _arguments, _results = SCHEMAS[_op]
        _name = f"{_op}.{_backend}"
        _LIBRARY.define(f"{_name}({_arguments}) -> {_results}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(_name, _as_op(_launcher), "CompositeExplicitAutograd")
        torch.library.register_fake(f"deltamem::{_name}", _FAKES.get(_op, _fake_in_place), lib=_LIBRARY)
        OVERLOADS[_backend][_op] = getattr(getattr(torch.ops.deltamem, _op), _backend)


def handle(op: str, backend: str) -> Callable:
    """The op overload ``deltamem::<op>.<backend>``."""
    return OVERLOADS[backend][op]
