"""Random calls of each public function against the reference in fp64, features drawn at random."""

import math

import pytest
import torch
from kernel_checks import CUDA, TRITON

import deltamem_kernels as dk

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

BACKENDS = ["cpu", CUDA, TRITON]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}

HEAD_SIZES = (8, 20, 64, 96)
# Of attention, what a backend covers: dtypes and head sizes.
COVERED = {"cuda": (DTYPES[1:], (64, 128))}

SCAN_STEPS = 200

examples = hypothesis.settings(
    max_examples=10 if torch.cuda.is_available() else 100,  # Triton compiles for nearly every one
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


def double(arguments):
    """The same call in fp64: rounded inputs are exact there."""
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def assert_close(got, want, dtype, steps, name):
    """``steps`` roundings of ``dtype``, behind a scan of ``SCAN_STEPS`` fp32 roundings; of the largest value."""
    if want is None or want.numel() == 0:
        assert got is None or got.shape == want.shape
        return
    hidden = want == -math.inf  # lse of a token that sees nothing
    assert torch.equal(got.double() == -math.inf, hidden), name
    got, want = got.double().masked_fill(hidden, 0), want.masked_fill(hidden, 0)
    assert torch.isfinite(got).all(), name
    error = (got - want).abs().max().item()
    bound = (steps * ROUNDING[dtype] + SCAN_STEPS * 2.0**-24) * max(1.0, want.abs().max().item())
    assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}"


@st.composite
def lengths(draw):
    """(B, T, cu_seqlens or None): dense rows, or sequences packed into one, some empty, the last tokens unused."""
    if draw(st.booleans()):
        return draw(st.integers(1, 3)), draw(st.integers(0, 40)), None
    pieces = draw(st.lists(st.integers(0, 17), min_size=1, max_size=4))
    cu = torch.tensor([0, *torch.tensor(pieces).cumsum(0).tolist()], dtype=torch.int32)
    return 1, sum(pieces) + draw(st.integers(0, 3)), cu


@st.composite
def memories(draw, B, T):
    H, R = draw(st.integers(1, 3)), draw(st.sampled_from((1, 3, 4, 8, 11, 16, 32, 64)))
    torch.manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape):
        return torch.randn(*shape).to(draw(st.sampled_from(DTYPES)))

    rule = draw(st.sampled_from(("standard", "lambda_outside", "no_lambda")))
    gate_width = R if draw(st.booleans()) else 1
    arguments = {
        "mem_q": randn(B, T, H, R),
        "mem_k": randn(B, T, H, R),
        "mem_v": randn(B, T, H, R),
        "beta": randn(B, T, H, gate_width),
        "lam": None if rule == "no_lambda" or draw(st.booleans()) else randn(B, T, H, gate_width),
        "update_rule": rule,
        "write": draw(st.sampled_from((True, True, False))),
        "use_qk_activation_in_kernel": True,
        "use_gate_in_kernel": True,
        "beta_bias": torch.randn(H, gate_width) if draw(st.booleans()) else None,
    }
    if draw(st.booleans()):
        arguments["token_mask"] = torch.rand(B, T) > 0.3
    return arguments, H, R


@pytest.mark.parametrize("backend", BACKENDS)
@examples
@given(data=st.data())
def test_delta_scan(backend, data):
    B, T, cu = data.draw(lengths())
    arguments, H, R = data.draw(memories(B, T))
    N = B if cu is None else cu.shape[0] - 1
    arguments |= {"cu_seqlens": cu, "initial_state": torch.randn(N, H, R, R)}
    leaves = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    wanted = double(arguments)
    for name, x in leaves.items():
        x.requires_grad_()
        wanted[name].detach_().requires_grad_()
    got, want = dk.delta_scan(**arguments, backend=backend), dk.delta_scan(**wanted, backend="reference")
    assert_close(got.reads, want.reads, torch.float32, 1, "reads")
    assert_close(got.final_state, want.final_state, torch.float32, 1, "final_state")
    cotangents = [torch.randn_like(x) for x in got]
    torch.autograd.backward(list(got), cotangents)
    torch.autograd.backward(list(want), [x.double() for x in cotangents])
    for name, x in leaves.items():
        grad = wanted[name].grad
        if grad is not None and grad.numel() > 0:
            got_grad = torch.zeros_like(x) if x.grad is None else x.grad
            scale = max(1.0, grad.abs().max().item())
            error = (got_grad.double() - grad).abs().max().item()
            # raw queries and keys near 0 make l2norm steep: relative to the largest gradient
            assert error <= scale * (2e-4 + 2 * ROUNDING[x.dtype]), f"d{name}: {error:.3g} of {scale:.3g}"


@st.composite
def attentions(draw, B, T, dtype, head_sizes, H, R):
    G, HKV = draw(st.sampled_from((1, 2, 3, 5))), draw(st.integers(1, 2))
    D = draw(st.sampled_from(head_sizes))
    HQ = G * HKV

    def randn(*shape):
        return torch.randn(*shape).to(dtype)

    def maybe(x):
        return x if draw(st.booleans()) else None

    rotary_dim = 2 * draw(st.integers(1, D // 2))
    angles = torch.randn(128, rotary_dim // 2)
    rotates = draw(st.booleans())
    arguments = {
        "delta_q": maybe(0.2 * torch.randn(HQ * D, H * R)),
        "delta_k": maybe(0.2 * torch.randn(HKV * D, H * R)),
        "delta_v": maybe(0.2 * torch.randn(HKV * D, H * R)),
        "q_norm_weight": maybe(1 + 0.1 * torch.randn(D)),
        "k_norm_weight": maybe(1 + 0.1 * torch.randn(D)),
        "rotary_cos": angles.cos() if rotates else None,
        "rotary_sin": angles.sin() if rotates else None,
        "rotary_interleaved": draw(st.booleans()),
        "positions": maybe(torch.randint(0, 128, (B, T), dtype=torch.int32)) if rotates else None,
        "causal": draw(st.booleans()),
        "window_size": draw(st.sampled_from(((-1, -1), (3, 0), (5, 2), (0, -1)))),
        "softcap": draw(st.sampled_from((0.0, 5.0))),
    }
    return arguments, randn, HQ, HKV, D


@pytest.mark.parametrize("backend", BACKENDS)
@examples
@given(data=st.data())
def test_fused_delta_attention(backend, data):
    B, T, cu = data.draw(lengths())
    memory, H, R = data.draw(memories(B, T))
    dtypes, head_sizes = COVERED.get(backend, (DTYPES, HEAD_SIZES))
    dtype = data.draw(st.sampled_from(dtypes))
    arguments, randn, HQ, HKV, D = data.draw(attentions(B, T, dtype, head_sizes, H, R))
    arguments |= memory | {
        "q": randn(B, T, HQ, D),
        "k": randn(B, T, HKV, D),
        "v": randn(B, T, HKV, D),
        "cu_seqlens": cu,
    }
    got = dk.fused_delta_attention(**arguments, backend=backend)
    want = dk.fused_delta_attention(**double(arguments), backend="reference")
    assert_close(got.out, want.out, dtype, 24, "out")
    assert_close(got.lse, want.lse, dtype, 64, "lse")
    assert_close(got.reads, want.reads, torch.float32, 1, "reads")
    assert_close(got.final_state, want.final_state, torch.float32, 1, "final_state")


@pytest.mark.parametrize("backend", BACKENDS)
@examples
@given(data=st.data())
def test_fused_delta_attention_with_kvcache(backend, data):
    B, T = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 1, 2, 5, 16, 17, 23)))
    memory, H, R = data.draw(memories(B, T))
    dtypes, head_sizes = COVERED.get(backend, (DTYPES, HEAD_SIZES))
    dtype = data.draw(st.sampled_from(dtypes))
    arguments, randn, HQ, HKV, D = data.draw(attentions(B, T, dtype, head_sizes, H, R))
    seqlens = torch.randint(0, 60, (B,), dtype=torch.int32)
    valid = torch.randint(0, T + 1, (B, 1)) if "token_mask" in memory else torch.full((B, 1), T)
    capacity = 60 + T
    arguments |= memory | {
        "q": randn(B, T, HQ, D),
        "k": randn(B, T, HKV, D),
        "v": randn(B, T, HKV, D),
        "state_pool": torch.randn(B + 2, H, R, R),
        "state_indices": torch.randperm(B + 2)[:B].to(torch.int32),
        "cache_seqlens": seqlens,
        "cache_leftpad": (seqlens * torch.rand(B)).to(torch.int32) if data.draw(st.booleans()) else None,
        "token_mask": torch.arange(T) < valid if "token_mask" in memory else None,
        "num_splits": data.draw(st.integers(0, 4)),
    }
    if data.draw(st.booleans()):
        page = data.draw(st.sampled_from((1, 3, 16)))
        pages = math.ceil(capacity / page)
        arguments["block_table"] = torch.randperm(B * pages).reshape(B, pages).to(torch.int32)
        shape = (B * pages, page, HKV, D)
    else:
        shape = (B, capacity, HKV, D)
    arguments |= {"k_cache": randn(*shape), "v_cache": randn(*shape)}
    wanted = double(arguments)
    got = dk.fused_delta_attention_with_kvcache(**arguments, backend=backend)
    want = dk.fused_delta_attention_with_kvcache(**wanted, backend="reference")
    assert_close(got.out, want.out, dtype, 24, "out")
    assert_close(got.lse, want.lse, dtype, 64, "lse")
    assert_close(got.reads, want.reads, torch.float32, 1, "reads")
    for name in ("k_cache", "v_cache"):
        assert_close(arguments[name], wanted[name], dtype, 8, name)
    assert_close(arguments["state_pool"], wanted["state_pool"], torch.float32, 1, "state_pool")


@pytest.mark.parametrize("backend", BACKENDS)
@examples
@given(data=st.data())
def test_delta_output(backend, data):
    B, T, hidden = (data.draw(st.integers(1, n)) for n in (3, 9, 200))
    H, R = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 4, 8, 13)))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(DTYPES))
    arguments = {
        "attn_proj": torch.randn(B, T, hidden).to(dtype),
        "reads": torch.randn(B, T, H, R),
        "delta_o": torch.randn(hidden, H * R).to(data.draw(st.sampled_from(DTYPES))),
        "rms_weight": torch.randn(hidden) if data.draw(st.booleans()) else None,
        "residual": torch.randn(B, T, hidden).to(dtype) if data.draw(st.booleans()) else None,
    }
    want = dk.delta_output(**double(arguments), backend="reference")
    assert_close(dk.delta_output(**arguments, backend=backend), want, dtype, 4, "y")
    assert dk.delta_output(**arguments, out=arguments["attn_proj"], backend=backend) is arguments["attn_proj"]
    assert_close(arguments["attn_proj"], want, dtype, 4, "y in place")
