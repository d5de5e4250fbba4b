"""Each bad input: its exception, its exact text, and nothing written."""

import calls
import pytest
import torch

import deltamem_kernels as dk
from deltamem_kernels import backends, debug, plans

SCAN, POOL, FUSED, CACHE, OUTPUT = calls.FUNCTIONS
i32 = torch.int32


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


def column_major(*shape):
    return torch.ones(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


# (call, changed arguments, exception, text behind the function's name)
CASES = [
    # rank, shape
    (SCAN, {"mem_q": ones(2, 4)}, ValueError, "mem_q must have shape (B, T, H, R) or (B, T, R), got shape (2, 4)"),
    (SCAN, {"mem_k": ones(2, 5, 2, 3)}, ValueError, "mem_k must have shape (2, 5, 2, 4), got (2, 5, 2, 3)"),
    (SCAN, {"mem_v": ones(2, 5, 8)}, ValueError, "mem_v must have shape (2, 5, 2, 4), got (2, 5, 8)"),
    (
        SCAN,
        {"beta": ones(2, 5, 2, 2)},
        ValueError,
        "beta must have shape (2, 5, 2, 4) or (2, 5, 2, 1), got (2, 5, 2, 2)",
    ),
    (SCAN, {"beta_bias": ones(2, 1)}, ValueError, "beta_bias must have shape (2, 4), got (2, 1)"),
    (SCAN, {"initial_state": ones(2, 4, 4)}, ValueError, "initial_state must have shape (2, 2, 4, 4), got (2, 4, 4)"),
    (SCAN, {"token_mask": ones(2, 4) > 0}, ValueError, "token_mask must have shape (2, 5), got (2, 4)"),
    (FUSED, {"q": ones(2, 5, 64)}, ValueError, "q must have shape (B, T, HQ, D), got shape (2, 5, 64)"),
    (FUSED, {"k": ones(2, 4, 2, 16)}, ValueError, "k must have shape (2, 5, 2, 16), got (2, 4, 2, 16)"),
    (FUSED, {"v": ones(2, 5, 1, 16)}, ValueError, "v must have shape (2, 5, 2, 16), got (2, 5, 1, 16)"),
    (
        FUSED,
        {"k": ones(2, 5, 3, 16), "v": ones(2, 5, 3, 16)},
        ValueError,
        "q must have a multiple of k's 3 heads, got 4 heads",
    ),
    (FUSED, {"delta_q": ones(64, 4)}, ValueError, "delta_q must have shape (64, 8), got (64, 4)"),
    (FUSED, {"q_norm_weight": ones(8)}, ValueError, "q_norm_weight must have shape (16,), got (8,)"),
    (
        FUSED,
        {"rotary_cos": ones(4, 8), "rotary_sin": ones(4, 8)},
        ValueError,
        "rotary_cos must hold the 5 positions of this call, got 4 rows",
    ),
    (
        FUSED,
        {"rotary_cos": ones(64, 9), "rotary_sin": ones(64, 9)},
        ValueError,
        "rotary_cos must have 1 to D/2 = 8 columns, got shape (64, 9)",
    ),
    (FUSED, {"rotary_sin": None}, ValueError, "rotary_sin must be given together with rotary_cos, got None"),
    (FUSED, {"mem_q": ones(2, 4, 2, 4)}, ValueError, "mem_k must have shape (2, 4, 2, 4), got (2, 5, 2, 4)"),
    (OUTPUT, {"delta_o": ones(24, 4)}, ValueError, "delta_o must have shape (24, 8), got (24, 4)"),
    (OUTPUT, {"attn_proj": ones(5, 24)}, ValueError, "attn_proj must have shape (B, T, hidden), got shape (5, 24)"),
    (OUTPUT, {"out": ones(2, 5, 23)}, ValueError, "out must have shape (2, 5, 24), got (2, 5, 23)"),
    # layout
    (
        SCAN,
        {"mem_q": column_major(2, 5, 2, 4)},
        ValueError,
        "mem_q must be contiguous in its last dimension, got strides (40, 8, 1, 2)",
    ),
    (
        POOL,
        {"state_pool": column_major(4, 2, 4, 4)},
        ValueError,
        "state_pool must be contiguous in its last dimension, got strides (32, 16, 1, 4)",
    ),
    (
        POOL,
        {"state_pool": ones(4, 2, 4, 8)[..., :4]},
        ValueError,
        "state_pool must be contiguous in its last two dimensions, got strides (64, 32, 8, 1)",
    ),
    # dtype
    (SCAN, {"mem_k": ones(2, 5, 2, 4, dtype=i32)}, TypeError, "mem_k must be float32 or bfloat16 or float16, got int32"),
    (SCAN, {"mem_k": 3}, TypeError, "mem_k must be a tensor, got int"),
    (
        SCAN,
        {"initial_state": ones(2, 2, 4, 4, dtype=torch.float16)},
        TypeError,
        "initial_state must be float32, got float16",
    ),
    (SCAN, {"token_mask": ones(2, 5)}, TypeError, "token_mask must be bool, got float32"),
    (POOL, {"state_indices": ones(2)}, TypeError, "state_indices must be int32, got float32"),
    (FUSED, {"k": ones(2, 5, 2, 16, dtype=torch.float16)}, TypeError, "k must be float32, got float16"),
    (CACHE, {"k_cache": ones(2, 40, 2, 16, dtype=torch.float16)}, TypeError, "k_cache must be float32, got float16"),
    (CACHE, {"cache_seqlens": ones(2, dtype=torch.int64)}, TypeError, "cache_seqlens must be int32, got int64"),
    (FUSED, {"positions": ones(2, 5, dtype=torch.int64)}, TypeError, "positions must be int32, got int64"),
    (OUTPUT, {"reads": ones(2, 5, 2, 4, dtype=torch.float16)}, TypeError, "reads must be float32, got float16"),
    # device
    (SCAN, {"mem_k": ones(2, 5, 2, 4).to("meta")}, ValueError, "mem_k must be on cpu, got meta"),
    # packing
    (
        SCAN,
        {"cu_seqlens": torch.tensor([0, 5], dtype=i32), "initial_state": None},
        ValueError,
        "cu_seqlens must come with batch size 1 (packed sequences), got batch size 2",
    ),
    # memory options
    (SCAN, {"update_rule": "gated"}, ValueError, "update_rule must be one of standard, lambda_outside, no_lambda, got 'gated'"),
    (SCAN, {"update_rule": "no_lambda"}, ValueError, "lam must be None with update_rule 'no_lambda', got a tensor"),
    (SCAN, {"mem_v": None}, ValueError, "mem_v must be given when write is true, got None"),
    (SCAN, {"use_gate_in_kernel": False}, ValueError, "beta_bias must be None unless use_gate_in_kernel, got a tensor"),
    (SCAN, {"lam": None}, ValueError, "lam_bias must be None without lam, got a tensor"),
    (FUSED, {"mem_q": None}, ValueError, "mem_k must be None without mem_q, got a tensor"),
    # softmax options
    (FUSED, {"window_size": (-2, 0)}, ValueError, "window_size must be two integers >= -1, got (-2, 0)"),
    (FUSED, {"softcap": -1.0}, ValueError, "softcap must be >= 0, got -1.0"),
    (FUSED, {"softmax_scale": "1"}, TypeError, "softmax_scale must be a number or None, got str"),
    (FUSED, {"max_seqlen": -3}, ValueError, "max_seqlen must be an integer >= 0 or None, got -3"),
    # caches and pools
    (CACHE, {"initial_state": ones(2, 2, 4, 4)}, ValueError, "initial_state must be None with a cache (state_pool holds the state), got a tensor"),
    (CACHE, {"state_pool": None}, TypeError, "state_pool must be a tensor, got NoneType"),
    (CACHE, {"cache_seqlens": None}, ValueError, "cache_seqlens must be given when k or block_table is, got None"),
    (CACHE, {"v": None}, ValueError, "v must be given together with k, got None"),
    (CACHE, {"k_cache": ones(3, 40, 2, 16), "v_cache": ones(3, 40, 2, 16)}, ValueError, "k_cache must have a row for each of 2 rows, got shape (3, 40, 2, 16)"),
    (CACHE, {"block_table": ones(3, 4, dtype=i32)}, ValueError, "block_table must have shape (2, 4), got (3, 4)"),
    (CACHE, {"num_splits": -1}, ValueError, "num_splits must be an integer >= 0, got -1"),
    (CACHE, {"k_descale": ones(1)}, NotImplementedError, "k_descale and v_descale must be None (no backend covers fp8), got a tensor"),
    (POOL, {"state_indices": None, "state_pool": ones(1, 2, 4, 4)}, ValueError, "state_pool must have a slot for each of 2 rows without state_indices, got (1, 2, 4, 4)"),
    (POOL, {"output_state_indices": ones(2, 4, dtype=i32)}, ValueError, "output_state_indices must have shape (2, 5), got (2, 4)"),
    (POOL, {"reads_out": ones(2, 5, 8)}, ValueError, "reads_out must have shape (2, 5, 2, 4), got (2, 5, 8)"),
    # backends
    (SCAN, {"backend": "numpy"}, ValueError, "backend must be one of auto, reference, cpu, triton, cuda, got 'numpy'"),
]  # fmt: skip


def expect(make, changed, error, text):
    function, arguments = make()
    arguments = arguments | changed
    before = calls.clone(arguments)
    with pytest.raises(error) as raised:
        function(**arguments)
    assert type(raised.value) is error
    assert str(raised.value) == f"{function.__name__}: {text}"
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and x.device.type == "cpu":
            assert torch.equal(x, before[name]), name


@pytest.mark.parametrize(
    "make, changed, error, text", CASES, ids=[f"{c[0].__name__}-{next(iter(c[1]))}" for c in CASES]
)
def test_bad_input(make, changed, error, text):
    expect(make, changed, error, text)


def test_lam_alone_is_refused_for_no_lambda():
    expect(
        FUSED, {"update_rule": "no_lambda"}, ValueError, "lam must be None with update_rule 'no_lambda', got a tensor"
    )


def test_delta_weights_need_memory():
    function, arguments = calls.fused_delta_attention()
    only = {name: arguments[name] for name in ("q", "k", "v", "delta_q")}
    with pytest.raises(ValueError, match=r"^fused_delta_attention: delta_q must be None without mem_q, got a tensor$"):
        function(**only)


# (call, changed arguments, text): checks that read values
VALUES = [
    (SCAN, {"cu_seqlens": torch.tensor([0, 3, 2], dtype=i32)}, "cu_seqlens must start at 0, never decrease and end at or before 5, got [0, 3, 2]"),
    (POOL, {"state_indices": torch.tensor([1, 1], dtype=i32)}, "state_indices must be unique among active rows, got slot 1 twice"),
    (POOL, {"state_indices": torch.tensor([1, 4], dtype=i32)}, "state_indices must be below the pool's 4 slots, got 4"),
    (CACHE, {"cache_seqlens": torch.tensor([7, 36], dtype=i32)}, "k_cache must hold cache_seqlens and the appended tokens, 41 slots, got 40"),
    (CACHE, {"cache_leftpad": torch.tensor([8, 0], dtype=i32)}, "cache_leftpad must be at most cache_seqlens, got [8, 0]"),
    (CACHE, {"k": None, "v": None, "cache_seqlens": torch.tensor([7, 3], dtype=i32)}, "cache_seqlens must count the row's own tokens when k is None, got [7, 3]"),
    (CACHE, {"token_mask": torch.tensor([[True] * 5, [False] + [True] * 4])}, "token_mask must mask only the tail of a row with a cache, got a hole or a masked head"),
    (CACHE, {"positions": torch.full((2, 5), 64, dtype=i32)}, "positions must be within the rotary table's 64 rows, got 64"),
    (CACHE, {"rotary_cos": ones(15, 8), "rotary_sin": ones(15, 8)}, "rotary_cos must hold 16 positions, got 15"),
]  # fmt: skip


@pytest.mark.parametrize("make, changed, text", VALUES, ids=[f"{c[0].__name__}-{next(iter(c[1]))}" for c in VALUES])
def test_bad_values_in_debug_mode(monkeypatch, make, changed, text):
    monkeypatch.setattr(debug, "ENABLED", True)
    if "cu_seqlens" in changed:
        _, arguments = make()
        one_row = {
            n: x[:1] if isinstance(x, torch.Tensor) and x.shape[:2] == (2, 5) else x for n, x in arguments.items()
        }
        changed = one_row | changed
    expect(make, changed, ValueError, text)


def test_bad_page_in_debug_mode(monkeypatch):
    monkeypatch.setattr(debug, "ENABLED", True)
    pages = {"k_cache": ones(6, 4, 2, 16), "v_cache": ones(6, 4, 2, 16)}
    table = torch.tensor([[0, 1, 2, 10**9], [3, 4, 5, 6]], dtype=i32)
    text = "block_table must name pages 0 to 5 where a row has tokens, got 6"
    expect(CACHE, pages | {"block_table": table}, ValueError, text)


@pytest.mark.parametrize("make", [POOL, CACHE])
def test_in_place_functions_refuse_gradients(make):
    function, arguments = make()
    arguments["mem_v"].requires_grad_()
    instead = "delta_scan" if make is POOL else "fused_delta_attention"
    text = f"inputs must not require grad in grad mode, got one that does; {instead} trains"
    expect(make, {"mem_v": arguments["mem_v"]}, RuntimeError, text)
    with torch.no_grad():
        function(**arguments)


def test_output_out_refuses_gradients():
    function, arguments = calls.delta_output()
    arguments["reads"].requires_grad_()
    with pytest.raises(RuntimeError) as raised:
        function(**arguments, out=torch.empty(2, 5, 24))
    assert str(raised.value) == (
        "delta_output with out: inputs must not require grad in grad mode, got one that does; "
        "delta_output without it trains"
    )


def test_double_is_for_the_reference_alone():
    _, arguments = calls.delta_scan()
    double = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    assert dk.delta_scan(**double, backend="reference").reads.dtype == torch.float64
    assert dk.delta_scan(**double).reads.dtype == torch.float64  # auto
    with pytest.raises(NotImplementedError) as raised:
        dk.delta_scan(**double, backend="cpu")
    assert str(raised.value) == "delta_scan: float64 is covered by backend='reference' only, got 'cpu'"


@pytest.mark.parametrize("backend", ("cpu", "triton"))
def test_large_ranks_are_for_the_reference_alone(backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else the device is refused first
    x = torch.randn(1, 3, 1, 65)
    assert dk.delta_scan(x, x, x, x).reads.shape == (1, 3, 1, 65)
    with pytest.raises(NotImplementedError) as raised:
        dk.delta_scan(x, x, x, x, backend=backend)
    text = f"delta_scan: ranks above 64 are covered by backend='reference' only, got 65 on '{backend}'"
    assert str(raised.value) == text


@pytest.mark.parametrize("make", calls.FUNCTIONS)
def test_triton_takes_no_cpu_tensors_unless_it_interprets(make, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(plans, "_plans", {})  # where an interpreted call of the same signature may be remembered
    function, arguments = make()
    with pytest.raises(ValueError) as raised:
        function(**arguments, backend="triton")
    assert str(raised.value) == (
        f"{function.__name__}: tensors must be on cuda for backend 'triton', got cpu; backend='cpu' does it there"
    )


@pytest.mark.parametrize("make", (FUSED, CACHE))
def test_wide_heads_are_not_for_triton(make, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.randn(1, 2, 2, 257)
    function, _ = make()
    caches = {"k_cache": x, "v_cache": x, "cache_seqlens": torch.tensor([2], dtype=i32)}
    given = caches if make is CACHE else {"k": x, "v": x}
    with pytest.raises(NotImplementedError) as raised:
        function(x, **given, backend="triton")
    assert str(raised.value) == (
        f"{function.__name__}: head sizes above 256 are not covered by backend 'triton', got 257; "
        "backend='reference' does it"
    )


@pytest.mark.parametrize("make", calls.FUNCTIONS)
def test_missing_backends_say_why(make, monkeypatch):
    monkeypatch.setitem(backends.MISSING, "cuda", "no CUDA module (left out)")
    function, arguments = make()
    with pytest.raises(RuntimeError) as raised:
        function(**arguments, backend="cuda")
    assert str(raised.value) == (
        f"{function.__name__}: backend 'cuda' must be installed, got no CUDA module (left out); "
        "backend='reference' does it"
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "tail"),
    [
        ((1, 2, 2, 64), torch.float32, "float32 attention is not covered by backend 'cuda'; backend='triton' does it"),
        (
            (1, 2, 2, 96),
            torch.bfloat16,
            "head sizes other than 64, 128 are not covered by backend 'cuda' here, got 96; backend='triton' does it",
        ),
        (
            (1, 20, 2, 256),
            torch.bfloat16,
            "head sizes other than 64, 128 are not covered by backend 'cuda' here, got 256; backend='triton' does it",
        ),
    ],
)
def test_attention_that_cuda_does_not_cover(shape, dtype, tail):
    if backends.MISSING["cuda"]:
        pytest.skip(backends.MISSING["cuda"])
    x = torch.zeros(shape, dtype=dtype)
    with pytest.raises(NotImplementedError) as raised:
        dk.fused_delta_attention(x, x, x, backend="cuda")
    assert str(raised.value) == f"fused_delta_attention: {tail}"
