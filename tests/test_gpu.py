"""What only a GPU can show: real lengths, offsets beyond 2^31 elements, streams, graphs, and no wait for the device."""

import functools
import inspect

import calls
import pytest
import torch
from kernel_checks import as_fp64, map_tensors, same_bits

import deltamem_kernels as dk

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LONG = 131072  # tokens
WIDE = 2**31 + 2**21  # elements of one tensor
CAPACITY = 100_352  # slots that a captured step may fill
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("triton", "cuda")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-24}


def layer(tokens, batch=1, dtype=torch.bfloat16, HQ=8, HKV=2, D=128, H=1, R=8, positions=None):
    """One call of fused_delta_attention at the shapes of a model: raw projections, gates as logits, every weight."""

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)

    angles = torch.randn(positions or tokens, D // 2, device=DEVICE)
    return {
        **{name: randn(batch, tokens, heads, D) for name, heads in (("q", HQ), ("k", HKV), ("v", HKV))},
        **{name: randn(batch, tokens, H, R) for name in ("mem_q", "mem_k", "mem_v", "beta")},
        "beta_bias": torch.randn(H, R, device=DEVICE),
        "use_qk_activation_in_kernel": True,
        "use_gate_in_kernel": True,
        "delta_q": randn(HQ * D, H * R, scale=0.2),
        "q_norm_weight": 1 + randn(D, scale=0.1),
        "k_norm_weight": 1 + randn(D, scale=0.1),
        "rotary_cos": angles.cos().to(dtype),
        "rotary_sin": angles.sin().to(dtype),
    }


def step(tokens, batch, slots, dtype=torch.bfloat16, filled=None, **sizes):
    """One call of fused_delta_attention_with_kvcache."""
    arguments = layer(tokens, batch, dtype, positions=slots, **sizes)
    shape = (batch, slots, *arguments["k"].shape[2:])
    state = (batch, *arguments["mem_q"].shape[2:], arguments["mem_q"].shape[3])
    return arguments | {
        "k_cache": torch.randn(shape, device=DEVICE, dtype=dtype),
        "v_cache": torch.randn(shape, device=DEVICE, dtype=dtype),
        "state_pool": torch.randn(state, device=DEVICE),
        "cache_seqlens": torch.full((batch,), filled or slots - tokens, dtype=torch.int32, device=DEVICE),
    }


def to_device(arguments):
    return map_tensors(arguments, lambda x: x.to(DEVICE))


def tuple_of(results):
    return results if isinstance(results, tuple) else (results,)


def cotangent(x):
    """The same values for every device and dtype, exact in all of them."""
    return torch.arange(x.numel(), device=x.device).mul(1.7).cos().bfloat16().to(x.dtype).view_as(x)


def trained(function, arguments, backend):
    """Results and the gradients of every floating input but the rotary tables."""
    leaves = {
        name: x.clone().requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point() and not name.startswith("rotary")
    }
    results = tuple_of(function(**arguments | leaves, backend=backend))
    differentiable = [x for x in results if x is not None and x.requires_grad]
    torch.autograd.backward(differentiable, [cotangent(x) for x in differentiable])
    found = {str(i): x.detach() for i, x in enumerate(results) if x is not None}
    return found | {f"d{name}": x.grad for name, x in leaves.items()}


def advanced(function, arguments, backend):
    """Results, and every tensor as the call leaves it, on copies."""
    arguments = calls.clone(arguments)
    results = {str(i): x for i, x in enumerate(tuple_of(function(**arguments, backend=backend))) if x is not None}
    return results | {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}


def run_of(function):
    return advanced if "state_pool" in inspect.signature(function).parameters else trained


def assert_close_as_reference(got, same, want, dtype):
    """|got - want| <= 2 max |same - want| + 8 rounding units of the largest; same: the reference in got's dtypes."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        hidden = exact.isinf() | exact.isnan()
        ours, theirs, exact = (x.double().masked_fill(hidden, 0) for x in (got[name], same[name], exact))
        if exact.numel():
            allowed = 2 * (theirs - exact).abs().max() + 8 * UNIT[dtype] * exact.abs().max()
            error = (ours - exact).abs().max()
            assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


CALLS = {
    **{make.__name__: make for make in calls.FUNCTIONS},
    "long_chunk": functools.partial(calls.fused_delta_attention_with_kvcache, tokens=20),
}


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_public_api(backend, dtype, name):
    """Forward, backward and in place, every feature on; no tensor of the package's own lands on the default device."""
    if backend == "cuda" and dtype == torch.float32 and ("attention" in name or name == "long_chunk"):
        pytest.skip("the CUDA backend has no fp32 attention, and says so")
    with torch.device("cpu"):
        function, arguments = CALLS[name](dtype)
        arguments, run = to_device(arguments), run_of(function)
        got = run(function, arguments, backend)
        assert {x.device.type for x in got.values() if x is not None} == {DEVICE}
        same, want = run(function, arguments, "reference"), run(function, as_fp64(arguments), "reference")
    given = [name for name, x in want.items() if x is not None]
    assert_close_as_reference(*({n: found[n] for n in given} for found in (got, same, want)), dtype)


@pytest.mark.parametrize(
    ("backend", "dtype", "D"),
    [
        *(("triton", dtype, D) for dtype in DTYPES for D in (64, 128, 256)),
        *(("cuda", dtype, D) for dtype in (torch.bfloat16, torch.float16) for D in (64, 128)),
    ],
)
def test_layer_of_a_model(backend, dtype, D):
    arguments = layer(777, 2, dtype, D=D)
    results = [
        trained(dk.fused_delta_attention, *given)
        for given in ((arguments, backend), (arguments, "reference"), (as_fp64(arguments), "reference"))
    ]
    assert_close_as_reference(*results, dtype)


# ---- lengths and sizes ---------------------------------------------------------------------------------------------


def needs(gib):
    if torch.cuda.get_device_properties(DEVICE).total_memory < gib << 30:
        pytest.skip(f"needs {gib} GiB of device memory")


@each_backend
def test_long_scan(backend):
    """Forward and backward of a long sequence, against the CPU kernels."""
    arguments = calls.memory(LONG, 1)
    got = trained(dk.delta_scan, to_device(arguments), backend)
    want = trained(dk.delta_scan, map_tensors(arguments, lambda x: x.cpu()), "cpu")
    for name, x in want.items():
        scale = x.abs().max().item()
        torch.testing.assert_close(
            got[name].cpu(), x, rtol=0, atol=2e-5 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@each_backend
def test_long_attention(backend):
    """Some queries of a long causal sequence, and their gradients, one at a time in fp64."""
    q, k, v = (torch.randn(1, LONG, heads, 64, device=DEVICE).bfloat16() for heads in (2, 1, 1))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = dk.fused_delta_attention(*leaves, backend=backend).out
    dout = torch.randn(out.shape, device=DEVICE).bfloat16()
    dq, _, dv = torch.autograd.grad(out, leaves, dout)
    with torch.no_grad():
        k, v = k[0, :, 0].double(), v[0, :, 0].double()
        for t in (0, 1, LONG // 2 - 1, LONG // 2, LONG - 1):
            weights = torch.softmax(q[0, t].double() @ k[: t + 1].T / 8, -1)  # [HQ, t + 1]
            want = weights @ v[: t + 1]
            along = dout[0, t].double() @ v[: t + 1].T - (dout[0, t].double() * want).sum(-1, keepdim=True)
            want_dq = (weights * along) @ k[: t + 1] / 8
            for x, exact in ((out[0, t], want), (dq[0, t], want_dq)):
                torch.testing.assert_close(x.double(), exact, rtol=0, atol=2e-2 * exact.abs().max().item() + 1e-5)
        # the weights of a query sum to 1; P, dv and dout are rounded one by one
        given, found = (x.double().sum((0, 1, 2)) for x in (dout, dv))
        noise = sum(x.double().square().sum((0, 1, 2)) for x in (dout, dv)).sqrt()
        assert ((found - given).abs() <= 2.0**-5 * noise).all()


@each_backend
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("page", [0, 16])
def test_cache_beyond_2_31_elements(backend, tokens, page):
    """The last slots of a huge cache, alone visible, give what a cache of only those gives; the rest holds NaN."""
    needs(24)
    near = 4096
    arguments = step(tokens, 1, near)
    window = {"window_size": (1000, 0), "rotary_cos": None, "rotary_sin": None, "num_splits": 2}
    start = calls.clone(arguments)
    want = dk.fused_delta_attention_with_kvcache(**arguments | window, backend=backend)

    HKV, D = arguments["k"].shape[2:]
    slots = -(-WIDE // (HKV * D * near)) * near
    huge = start | window | {"cache_seqlens": start["cache_seqlens"] + slots - near}
    for name in ("k_cache", "v_cache"):
        huge[name] = torch.full((1, slots, HKV, D), float("nan"), device=DEVICE, dtype=start[name].dtype)
        huge[name][:, -near:] = start[name]
        if page:
            huge[name] = huge[name].view(slots // page, page, HKV, D)
    if page:
        huge["block_table"] = torch.arange(slots // page, dtype=torch.int32, device=DEVICE)[None]
    got = dk.fused_delta_attention_with_kvcache(**huge, backend=backend)
    for name in ("out", "lse", "reads"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-2, atol=1e-3)
    for name in ("k_cache", "v_cache"):
        tail = huge[name].flatten(0, 1)[-near:]
        assert same_bits(tail, arguments[name][0])


@each_backend
def test_queries_beyond_2_31_elements(backend):
    """q, out and their gradients: the last tokens, seen through a window, against those alone."""
    needs(64)
    HQ, D, near = 64, 128, 4096
    tokens = -(-WIDE // (HQ * D * near)) * near
    q, k, v, dout = (torch.randn(1, near, heads, D, device=DEVICE).bfloat16() for heads in (HQ, 1, 1, HQ))
    results = []
    for length in (near, tokens):
        inputs = [x.repeat(1, length // near, 1, 1).requires_grad_() for x in (q, k, v)]
        out = dk.fused_delta_attention(*inputs, window_size=(512, 0), backend=backend).out
        grads = torch.autograd.grad(out, inputs, dout.repeat(1, length // near, 1, 1))
        results.append([x[:, -near + 1024 :].clone() for x in (out, *grads)])
    assert all(map(same_bits, *results))


@each_backend
def test_memory_beyond_2_31_elements(backend):
    """Many rows, of which the last are the first ones again."""
    needs(64)
    tokens, H, R, rows = 512, 4, 16, 8
    batch = -(-WIDE // (tokens * H * R * rows)) * rows
    inputs = [torch.randn(rows, tokens, H, R, device=DEVICE).bfloat16() for _ in range(4)]
    inputs = [x.repeat(batch // rows, 1, 1, 1) for x in inputs]
    activate = {"use_qk_activation_in_kernel": True, "use_gate_in_kernel": True}
    reads, final_state = dk.delta_scan(*inputs, **activate, backend=backend)
    assert same_bits(reads[-rows:], reads[:rows]) and same_bits(final_state[-rows:], final_state[:rows])


# ---- streams, graphs, compilers ------------------------------------------------------------------------------------


def all_calls(tokens=1000):
    """name -> a call at a model's shapes, to be run by run_of."""
    attn_proj, weight = torch.randn(2, tokens, 640, device=DEVICE), torch.randn(640, 8, device=DEVICE)
    output = {"attn_proj": attn_proj, "reads": torch.randn(2, tokens, 1, 8, device=DEVICE), "delta_o": weight}
    return {
        "attention": (dk.fused_delta_attention, layer(tokens, 2)),
        "decode": (dk.fused_delta_attention_with_kvcache, step(1, 2, 4096)),
        "chunk": (dk.fused_delta_attention_with_kvcache, step(100, 2, 4096)),
        "output": (dk.delta_output, output | {"rms_weight": torch.randn(640, device=DEVICE)}),
    }


NAMES = ("attention", "decode", "chunk", "output")


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_runs_repeat_to_the_bit(backend, name):
    function, arguments = all_calls()[name]
    first, *others = (run_of(function)(function, arguments, backend) for _ in range(4))
    for other in others:
        assert all(same_bits(x, other[key]) for key, x in first.items() if x is not None)


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_streams(backend, name):
    """A call on another stream waits for what is before it there, and for nothing else."""
    function, arguments = all_calls()[name]
    want = run_of(function)(function, arguments, backend)
    stale = map_tensors(arguments, lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else x.clone())
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles
        for key, x in arguments.items():
            if isinstance(x, torch.Tensor):
                stale[key].copy_(x)
        got = run_of(function)(function, stale, backend)
    torch.cuda.synchronize()
    assert all(same_bits(x, got[key]) for key, x in want.items() if x is not None)


@each_backend
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_graph_of_a_short_cache_serves_a_long_one(backend, tokens):
    """Nothing is decided on the host from lengths: captured at length 1, replayed at 1, 100000 and 1 again."""
    arguments = step(tokens, 2, CAPACITY, filled=1)
    start = calls.clone(arguments)
    call = functools.partial(dk.fused_delta_attention_with_kvcache, **arguments, backend=backend)
    with torch.no_grad():
        call()  # compiles, or gets its counters
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for filled in (1, 100_000, 1):
            start["cache_seqlens"].fill_(filled)
            want = calls.clone(start)
            for name in ("k_cache", "v_cache", "state_pool", "cache_seqlens"):
                arguments[name].copy_(start[name])
            graph.replay()
            eager = dk.fused_delta_attention_with_kvcache(**want, backend=backend)
            for name in ("out", "reads", "lse"):
                assert same_bits(getattr(captured, name), getattr(eager, name))
            assert all(same_bits(arguments[n], want[n]) for n in ("k_cache", "v_cache", "state_pool"))


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_compile(backend, name):
    function, arguments = all_calls(200)[name]
    compiled = functools.wraps(function)(torch.compile(function, fullgraph=True))
    run = run_of(function)
    want, got = run(function, arguments, backend), run(compiled, arguments, backend)
    for key, x in want.items():
        if x is not None:
            torch.testing.assert_close(got[key], x, msg=lambda m, key=key: f"{key}: {m}")


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_no_call_waits_for_the_device(backend, name):
    function, arguments = all_calls(200)[name]
    run = run_of(function)
    run(function, arguments, backend)  # compiles
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(function, arguments, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_backend
def test_tensors_of_another_device(backend):
    """Kernels run where the tensors are, whatever the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    function, arguments = all_calls(64)["attention"]
    want = run_of(function)(function, arguments, backend)
    there = map_tensors(arguments, lambda x: x.to("cuda:1"))
    got = function(**there, backend=backend)
    assert got.out.device.index == 1 and same_bits(got.out.cpu(), want["0"].cpu())
