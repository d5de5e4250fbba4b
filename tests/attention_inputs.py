"""Small fp64 inputs of the prep, attention and decode ops, and attention one query at a time."""

import inspect
import math

import torch
from gradients import ints, randn


def defaults(op, **args):
    """Every argument of an op: None, or its plainest value."""
    plain = {
        "update_rule": "standard",
        "write": True,
        "use_qk_activation_in_kernel": False,
        "use_gate_in_kernel": False,
        "norm_eps": 1e-3,
        "rotary_interleaved": False,
        "max_seqlen": 0,
        "softmax_scale": 0.4,
        "causal": True,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "num_splits": 0,
    }
    return {name: args.get(name, plain.get(name)) for name in inspect.signature(op).parameters}


def rotary_tables(*shape, half):
    angle = randn(*shape, half)
    return {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}


def prep_args(B=2, T=5, HQ=4, HKV=2, D=6, *, correct=True, norm=True, half=2, gathered=False, packed=None, **options):
    B = 1 if packed else B
    H, R = 2, 3
    tables = {"rotary_cos": None, "rotary_sin": None}
    if half:
        tables = rotary_tables(*((B, T) if gathered else (40,)), half=half)
    return {
        **{name: randn(B, T, heads, D) for name, heads in (("q", HQ), ("k", HKV), ("v", HKV))},
        "reads": randn(B, T, H, R) if correct else None,
        **{
            f"delta_{name}": randn(heads * D, H * R) if correct else None
            for name, heads in (("q", HQ), ("k", HKV), ("v", HKV))
        },
        **{f"{name}_norm_weight": randn(D) if norm else None for name in "qk"},
        "norm_eps": 1e-3,
        **tables,
        "rotary_interleaved": False,
        "positions": None,
        "cu_seqlens": ints(*packed) if packed else None,
        **options,
    }


def attention_args(B=2, T=6, HQ=4, HKV=2, D=4, *, prologue=False, packed=None, window=(-1, -1), **options):
    prep = prep_args(B, T, HQ, HKV, D, correct=prologue, norm=prologue, half=prologue, packed=packed)
    names = (
        "reads",
        "delta_q",
        "q_norm_weight",
        "norm_eps",
        "rotary_cos",
        "rotary_sin",
        "rotary_interleaved",
    )
    return {
        **{name: prep[name] for name in ("q", "k", "v", *names, "positions", "cu_seqlens")},
        "token_mask": None,
        "max_seqlen": 0,
        "softmax_scale": 0.4,
        "causal": True,
        "window_left": window[0],
        "window_right": window[1],
        "softcap": 0.0,
        **options,
    }


def naive_attention(q, k, v, shown, a):
    """One query and head at a time: [Tq, HQ, D], [Tk, HKV, D], shown [Tk]; also the log-sum-exp."""
    out, lse = torch.zeros_like(q), q.new_full(q.shape[1::-1], -math.inf)
    last, right = k.shape[0] - q.shape[0], 0 if a["causal"] else a["window_right"]
    for i in range(q.shape[0]):
        low = 0 if a["window_left"] < 0 else max(0, i + last - a["window_left"])
        high = k.shape[0] if right < 0 else i + last + right + 1
        keys = [j for j in range(k.shape[0]) if low <= j < high and shown[j]]
        for h in range(q.shape[1] if keys and shown[i + last] else 0):
            kv = h // (q.shape[1] // k.shape[1])
            s = k[keys, kv] @ q[i, h] * a["softmax_scale"]
            s = a["softcap"] * torch.tanh(s / a["softcap"]) if a["softcap"] else s
            out[i, h], lse[h, i] = torch.softmax(s, 0) @ v[keys, kv], torch.log(torch.exp(s).sum())
    return out, lse
