"""The reference over dense and paged caches, in fp64: against naive attention and the ops without a cache."""

import pytest
import torch
from attention_inputs import defaults, naive_attention, prep_args
from gradients import TIGHT, ints, randn
from torch.testing import assert_close

from deltamem_kernels.reference import delta_attention, delta_decode, delta_prep, delta_scan

NAN = float("nan")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


LEFTPAD, FILLED, NEW = (1, 0, 3), (4, 2, 7), (3, 3, 2)  # row 1 is padding, row 2 has a masked token


def cache_case(layout):
    """Three rows over caches, NaN in unused slots; layout: dense, paged, or packed rows (paged)."""
    prep = prep_args(B=3, T=3)
    names = ("q", "k", "v", "reads", "delta_q", "delta_k", "delta_v", "q_norm_weight", "k_norm_weight")
    case = {name: prep[name] for name in (*names, "rotary_cos", "rotary_sin")}
    dense = {f"{name}_cache": torch.full((3, 12, 2, 6), NAN, dtype=torch.float64) for name in "kv"}
    for b in (0, 2):
        for cache in dense.values():
            cache[b, LEFTPAD[b] : FILLED[b]] = randn(FILLED[b] - LEFTPAD[b], 2, 6)
    case |= {"cache_seqlens": ints(*FILLED), "cache_leftpad": ints(*LEFTPAD), "state_indices": ints(0, -1, 5)}
    case |= {"token_mask": torch.arange(3) < ints(*NEW)[:, None]}
    if layout == "dense":
        return case | {name: cache.transpose(1, 2).clone().transpose(1, 2) for name, cache in dense.items()}
    table = torch.randperm(9, dtype=torch.int32).view(3, 3) + 2
    for name, cache in dense.items():
        case[name] = torch.full((12, 4, 2, 6), NAN, dtype=torch.float64)
        case[name][table.long()] = cache.unflatten(1, (3, 4))
    table[0, 2], table[1] = 2**31 - 1, -7  # never looked up
    case["block_table"] = table
    if layout == "packed":
        rows = {name: case[name] for name in ("q", "k", "v", "reads")}
        flat = {
            name: torch.cat([x[b, : NEW[b]] for b in range(3)] + [x[2, :2] * NAN])[None] for name, x in rows.items()
        }
        case |= {**flat, "token_mask": None, "cu_seqlens": ints(0, 3, 6, 8)}
    return case


def rows_of(x, layout):
    """[3 rows][new tokens, ...] of a result [B, T, ...], padded or packed."""
    return x[0, :8].split(NEW) if layout == "packed" else [x[b, : NEW[b]] for b in range(3)]


def slots_of(cache, case, b, end):
    """[end, heads, D] of a row's first slots."""
    if case.get("block_table") is None:
        return cache[b, :end]
    return torch.stack([cache[case["block_table"][b, s // 4], s % 4] for s in range(end)])


@pytest.mark.parametrize("layout", ["dense", "paged", "packed"])
@pytest.mark.parametrize(
    "softmax",
    [
        {},
        {"causal": False},
        {"window_left": 3, "softcap": 2.0},
        {"causal": False, "window_left": 1, "window_right": 1},
    ],
    ids=lambda options: "_".join(options) or "causal",
)
def test_caches(layout, softmax):
    case = cache_case(layout)
    before = {name: case[name].clone() for name in ("k_cache", "v_cache")}
    delta_prep.delta_prep_with_kvcache(**defaults(delta_prep.delta_prep_with_kvcache, **case))

    # every row's prepared tokens, by the op without a cache at explicit positions
    position = ints(*FILLED)[:, None] + torch.arange(3, dtype=torch.int32)
    flat = torch.cat([position[b, : NEW[b]] for b in range(3)] + [ints(0, 0)])[None]
    prep = defaults(delta_prep.delta_prep_fwd, **case) | {"positions": flat if layout == "packed" else position}
    q_prep, *kv_prep = delta_prep.delta_prep_fwd(**prep)
    for name, x in zip(("k_cache", "v_cache"), kv_prep, strict=True):
        for b in (0, 2):
            end = FILLED[b] + NEW[b]
            expected = torch.cat((slots_of(before[name], case, b, FILLED[b]), rows_of(x, layout)[b]))
            assert_close(slots_of(case[name], case, b, end), expected, **TIGHT, equal_nan=True)
        written = (case[name].isfinite() & ~before[name].isfinite())[..., 0, 0].sum()
        assert written == NEW[0] + NEW[2]

    # appended, then the same keys as a cache that was full before
    softmax = {
        "causal": True,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "softmax_scale": 0.4,
    } | softmax
    heads, tokens = case["q"].shape[2], case["q"].shape[1]
    for appended in (True, False):
        if not appended:
            case["cache_seqlens"] = ints(*(f + n for f, n in zip(FILLED, NEW, strict=True)))
        out = torch.full_like(case["q"], NAN)
        lse = torch.full((case["q"].shape[0], heads, tokens), NAN, dtype=torch.float64)
        args = defaults(delta_attention.delta_attention_with_kvcache, **case, **softmax)
        delta_attention.delta_attention_with_kvcache(**args | {"appended": appended, "out": out, "lse": lse})
        for b in range(3):
            found = rows_of(out, layout)[b], rows_of(lse.transpose(1, 2), layout)[b].T
            if b == 1:
                assert (found[0] == 0).all() and found[1].isneginf().all()
                continue
            end = FILLED[b] + NEW[b]
            keys, values = (slots_of(case[name], case, b, end) for name in ("k_cache", "v_cache"))
            shown = torch.arange(end) >= LEFTPAD[b]
            expected = naive_attention(rows_of(q_prep, layout)[b], keys, values, shown, softmax)
            assert_close(found, expected, **TIGHT)
        past = (out[0, 8:], lse[0, :, 8:]) if layout == "packed" else (out[2, 2:], lse[2, :, 2:])
        assert (past[0] == 0).all() and past[1].isneginf().all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_decode_continues_a_prompt(interleaved):
    """Calls of 5, 1 and 3 tokens are one pass of scan, prep and attention over 9."""
    B, T, H, R = 2, 9, 2, 3
    options = {
        "rotary_interleaved": interleaved,
        "window_left": 4,
        "softcap": 3.0,
        "update_rule": "lambda_outside",
    }
    options |= {"use_qk_activation_in_kernel": True, "use_gate_in_kernel": True, "beta_bias": randn(H, R)}
    tokens = {name: randn(B, T, H, R) for name in ("mem_q", "mem_k", "mem_v", "beta", "lam")}
    args = prep_args(B=B, T=T) | tokens | options
    start = randn(B, H, R, R)
    scan = defaults(delta_scan.delta_scan_fwd, **args | {"initial_state": start, "segment_len": 0, "save_tape": False})
    args["reads"], final_state, _ = delta_scan.delta_scan_fwd(**scan)
    q, k, v = delta_prep.delta_prep_fwd(**defaults(delta_prep.delta_prep_fwd, **args))
    softmax = {name: args[name] for name in ("window_left", "softcap")}
    out, lse = delta_attention.delta_attention_fwd(
        **defaults(delta_attention.delta_attention_fwd, q=q, k=k, v=v, **softmax)
    )

    pool = torch.full((5, H, R, R), NAN, dtype=torch.float64)
    pool[[3, 1]] = start
    caches = {f"{name}_cache": torch.full((B, 12, 2, 6), NAN, dtype=torch.float64) for name in "kv"}
    filled = 0
    for count in (5, 1, 3):
        part = {name: args[name][:, filled : filled + count] for name in ("q", "k", "v", *tokens)}
        results = {name: torch.full_like(part[x], NAN) for name, x in (("out", "q"), ("reads", "mem_q"))}
        results["lse"] = torch.full((B, 4, count), NAN, dtype=torch.float64)
        state = {"state_pool": pool, "state_indices": ints(3, 1), "cache_seqlens": ints(filled, filled)}
        decode = defaults(delta_decode.delta_decode, **args | part | caches | state | results)
        delta_decode.delta_decode(**decode)
        where = slice(filled, filled + count)
        assert_close(results["reads"], args["reads"][:, where], **TIGHT)
        assert_close(results["out"], out[:, where], **TIGHT)
        assert_close(results["lse"], lse[:, :, where], **TIGHT)
        filled += count
    assert_close(pool[[3, 1]], final_state, **TIGHT)
    assert pool[[0, 2, 4]].isnan().all()

    # without memory or new keys: the queries alone, over what is cached
    results = {"out": torch.full_like(q[:, -3:], NAN), "lse": torch.full((B, 4, 3), NAN, dtype=torch.float64)}
    plain = {"q": q[:, -3:], "cache_seqlens": ints(T, T)} | caches | softmax | results
    delta_decode.delta_decode(**defaults(delta_decode.delta_decode, **plain))
    assert_close(results["out"], out[:, -3:], **TIGHT)
