"""delta_decode of the native backends against the reference's chain: scan, append, attention over the cache.

Budget: twice the error of the same-dtype eager pipeline, whose scores and weights round to q's dtype, plus one
rounding unit of the result, both against fp64. Whatever a call must not read holds NaN or an absurd page id.
"""

import contextlib

import pytest
import torch
from attention_inputs import defaults
from gradients import ints
from kernel_checks import CUDA, TRITON

from deltamem_kernels import _cpu, ops
from deltamem_kernels.reference import delta_attention as reference_attention
from deltamem_kernels.reference import delta_decode as reference

ISAS = _cpu.supported_isas()
on_backends = pytest.mark.parametrize("backend", ["cpu", CUDA, TRITON])
on_instruction_sets = pytest.mark.parametrize(
    ("backend", "isa_name"),
    [("cpu", name) for name in ISAS] + [pytest.param(*x.values, None, marks=x.marks) for x in (CUDA, TRITON)],
)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAN = float("nan")
MUTATED = ("k_cache", "v_cache", "state_pool", "out", "reads", "lse")


@contextlib.contextmanager
def isa(name):
    before = _cpu.isa()
    _cpu.set_isa(name or before)
    yield
    _cpu.set_isa(before)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


# ---- inputs ---------------------------------------------------------------------------------------------------


def memory_case(B, T, H=1, R=8, dtype=BF16, rule="standard", raw=False, row_gates=False):
    gate = (B, T, H, 1) if row_gates else (B, T, H, R)
    logits = {"beta": torch.randn(gate), "lam": torch.randn(gate)}
    case = {name: torch.randn(B, T, H, R) for name in ("mem_q", "mem_k", "mem_v")} | logits
    if not raw:
        case |= {name: torch.nn.functional.normalize(case[name], dim=-1) for name in ("mem_q", "mem_k")}
        case |= {name: x.sigmoid() for name, x in logits.items()}
    case = {name: x.to(dtype) for name, x in case.items()}
    if rule != "lambda_outside":
        case["lam"] = None
    if raw:
        case["beta_bias"] = torch.randn(gate[2:])
    return case | {"update_rule": rule, "use_qk_activation_in_kernel": raw, "use_gate_in_kernel": raw}


def case_of(filled, T=1, HQ=4, HKV=2, D=64, dtype=BF16, *, memory=None, append=True, page=None, 
            layout="bshd", leftpad=None, prologue=True, valid=None, packed=False, deltas="qkv", interleaved=False,
            **options):  # fmt: skip
    """Rows with `filled` keys in the cache and T more tokens, of which `valid` are not masked."""
    B, rotary, end = len(filled), 2 * (D // 4), max(filled) + T
    valid, leftpad = valid or [T] * B, leftpad or [0] * B
    case = {"q": torch.randn(B, T, HQ, D).to(dtype), "k": None, "v": None}
    if append:
        case |= {name: torch.randn(B, T, HKV, D).to(dtype) for name in "kv"}
    pages = -(-end // (page or end))
    shape = (B, end, HKV, D) if page is None else (B * pages + 3, page, HKV, D)
    table = torch.randperm(B * pages + 3)[: B * pages].view(B, pages).to(torch.int32) if page else None
    for name in ("k_cache", "v_cache"):
        if layout == "bhsd":
            cache = torch.full((shape[0], HKV, shape[1], D), NAN, dtype=dtype).transpose(1, 2)
        else:  # rows farther apart than they are long
            cache = torch.full((*shape[:3], D + 8), NAN, dtype=dtype)[..., :D]
        for b, n in enumerate(filled):
            slots = torch.arange(leftpad[b], n)
            where = (b, slots) if page is None else (table[b, slots // page].long(), slots % page)
            cache[where] = torch.randn(len(slots), HKV, D).to(dtype)
        case[name] = cache
    if page:
        for b, n in enumerate(filled):
            table[b, -(-(n + T) // page) :] = 2**31 - 1
    case |= {"cache_seqlens": ints(*filled), "block_table": table}
    if any(leftpad):
        case["cache_leftpad"] = ints(*leftpad)
    if prologue:
        angle = torch.randn(end + 4, rotary // 2)
        case |= {"q_norm_weight": 1 + 0.1 * torch.randn(D), "k_norm_weight": (1 + 0.1 * torch.randn(D)).to(dtype)}
        case |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "rotary_interleaved": interleaved}
    if memory is not None:
        case |= memory_case(B, T, **memory)
        H, R = case["mem_q"].shape[2:]
        pool = torch.full((B + 4, H, R + 1, R), NAN)[:, :, :R]
        slots = torch.randperm(B + 4)[:B]
        pool[slots] = torch.randn(B, H, R, R)
        case |= {"state_pool": pool, "state_indices": slots.to(torch.int32)}
        heads = {"q": HQ, "k": HKV, "v": HKV}
        case |= {f"delta_{x}": (0.2 * torch.randn(heads[x] * D, H * R)).to(dtype) for x in deltas}
    case |= options
    if not append:
        for name in ("delta_k", "delta_v", "k_norm_weight"):
            case.pop(name, None)
    live = torch.arange(T) < torch.tensor(valid)[:, None]
    if packed:
        for name in ("q", "k", "v", "mem_q", "mem_k", "mem_v", "beta", "lam"):
            if case.get(name) is not None:
                x = case[name]
                case[name] = torch.cat([x[live], torch.full_like(x[0, :1], NAN)])[None]
        case["cu_seqlens"] = ints(0, *torch.tensor(valid).cumsum(0).tolist())
    elif valid != [T] * B:
        case["token_mask"] = live
    return case


def arguments(case, dtype=None):
    """The op's arguments in order, mutated ones fresh; in fp64 if asked."""
    case = {name: clone(x) if name in MUTATED else x for name, x in case.items()}
    if dtype is not None:
        case = {n: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for n, x in case.items()}
    q = case["q"]
    wide = dtype or torch.float32
    results = {"out": torch.full(q.shape, NAN, dtype=q.dtype)}
    results["lse"] = torch.full((q.shape[0], q.shape[2], q.shape[1]), NAN, dtype=wide)
    if case.get("mem_q") is not None:
        results["reads"] = torch.full(case["mem_q"].shape, NAN, dtype=wide)
    return defaults(reference.delta_decode, **case | results)


def clone(x):
    """A copy with the same strides."""
    if x is None:
        return None
    size = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return torch.as_strided(torch.as_strided(x, (size,), (1,)).clone(), x.shape, x.stride())


def run(case, backend):
    args = arguments(case)
    ops.handle("delta_decode", backend)(*args.values())
    return {name: args[name] for name in MUTATED if args[name] is not None}


def expected(case, dtype=None):
    args = arguments(case, dtype)
    reference.delta_decode(**args)
    return {name: args[name] for name in MUTATED if args[name] is not None}


def eager(case, monkeypatch):
    """The same-dtype pipeline: scores and weights round."""
    dtype, exact = case["q"].dtype, reference_attention.attend

    def attend(q, k, v, sees, scale, softcap):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        s = reference_attention.scores(reference_attention.grouped(q, k.shape[1]), k, scale, softcap).float()
        blind = ~sees.any(-1, keepdim=True)
        weights = s.masked_fill(~sees, -torch.inf).masked_fill(blind, 0).softmax(-1).to(dtype)
        out = torch.einsum("hgij,jhd->ihgd", weights, v).flatten(1, 2).masked_fill(blind[..., None], 0)
        return out, exact(*(x.float() for x in (q, k, v)), sees, scale, softcap)[1]

    with monkeypatch.context() as patch:
        patch.setattr(reference_attention, "attend", attend)
        return expected(case)


def check(case, backend, monkeypatch, got=None):
    got = got or run(case, backend)
    want, near = expected(case, torch.float64), eager(case, monkeypatch)
    assert got.keys() == want.keys()
    for name, x in got.items():
        exact, blank = want[name], want[name].isnan() | want[name].isinf()
        assert torch.equal(x.isnan(), exact.isnan()), f"{name}: NaN read or memory touched"
        assert torch.equal(x.isinf(), exact.isinf()), name
        x, exact, close = (t.double().masked_fill(blank, 0) for t in (x, exact, near[name]))
        unit = torch.finfo(got[name].dtype).eps
        # fp32 results are sums: they round in units of their largest terms
        size = 4 * exact.abs().max() if got[name].dtype == torch.float32 else exact.abs()
        allowed = 2 * (close - exact).abs().max() + unit * size
        worst = ((x - exact).abs() - allowed).max()
        assert worst <= 0, f"{name}: {worst.item():.3e} over a budget of {allowed.max().item():.3e}"
    for name in ("k_cache", "v_cache", "state_pool"):  # what the reference leaves alone is the same to the bit
        if name in got:
            same = bits(near[name]) == bits(case[name])
            assert torch.equal(bits(got[name])[same], bits(case[name])[same]), name
    return got


def bits(x):
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def same_bits(a, b):
    return all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


# ---- tests ----------------------------------------------------------------------------------------------------

PLAIN = {"filled": [70, 3, 200], "memory": {}}
CASES = {
    "bare": {"filled": [70, 1, 0], "append": True, "prologue": False},
    "no keys": {"filled": [0, 5], "append": False, "prologue": False, "T": 2},
    "memory": PLAIN,
    "read only keys": PLAIN | {"append": False, "T": 3, "memory": {"rule": "no_lambda"}},
    "q only": PLAIN | {"deltas": "q", "memory": {"H": 4, "R": 8, "rule": "lambda_outside"}},
    "raw memory": PLAIN | {"memory": {"H": 2, "R": 5, "raw": True, "row_gates": True, "dtype": FP32}},
    "draft": PLAIN | {"T": 5, "memory": {"H": 2}},
    "ragged": PLAIN | {"T": 6, "valid": [6, 0, 3], "memory": {}},
    "packed": PLAIN | {"T": 6, "valid": [6, 0, 3], "packed": True},
    "leftpad": PLAIN | {"T": 2, "leftpad": [9, 2, 130]},
    "blind leftpad": {"filled": [9, 4], "append": False, "leftpad": [8, 4], "T": 3},
    "window": PLAIN | {"T": 4, "window_left": 37},
    "window both": PLAIN | {"T": 4, "causal": False, "window_left": 20, "window_right": 1},
    "not causal": PLAIN | {"T": 4, "causal": False},
    "huge window": PLAIN | {"T": 2, "window_left": 2**62, "window_right": 2**62},
    "softcap": PLAIN | {"softcap": 3.0},
    "interleaved": PLAIN | {"interleaved": True, "T": 2},
    "write off": PLAIN | {"T": 3, "write": False},
}


@on_backends
@pytest.mark.parametrize("page", [None, 3, 16])
@pytest.mark.parametrize("name", CASES)
def test_features(backend, name, page, monkeypatch):
    check(case_of(**CASES[name], page=page), backend, monkeypatch)


@on_instruction_sets
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize(("heads", "D"), [((4, 4), 64), ((4, 2), 20), ((8, 2), 128), ((5, 1), 96), ((16, 1), 256),
                                          ((8, 1), 1), ((6, 2), 33)])  # fmt: skip
def test_geometries(backend, dtype, heads, D, isa_name, monkeypatch):
    HQ, HKV = heads
    case = case_of([70, 131], T=2, HQ=HQ, HKV=HKV, D=D, dtype=dtype, memory={"dtype": dtype}, num_splits=2)
    if backend == "cuda" and dtype == FP32:
        with pytest.raises(RuntimeError, match="q must have dtype bfloat16 or float16, got float32"):
            run(case, backend)
        return
    with isa(isa_name):
        check(case, backend, monkeypatch)


@on_backends
@pytest.mark.parametrize("T", range(1, 17))
def test_token_counts(backend, T, monkeypatch):
    check(case_of([66, 0], T=T, HQ=4, HKV=1, memory={}), backend, monkeypatch)


@on_backends
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("page", [None, 1, 3, 16, 64])
def test_layouts(backend, page, layout, monkeypatch):
    case = case_of([130, 5, 64], T=2, page=page, layout=layout, memory={}, num_splits=3)
    for name in ("q", "k", "v"):  # slices of one projection
        x = case[name]
        case[name] = torch.cat([x, x * NAN], 2)[:, :, : x.shape[2]]
    case["mem_q"] = case["mem_q"].transpose(0, 1).contiguous().transpose(0, 1)
    check(case, backend, monkeypatch)


@on_backends
def test_state_slots(backend, monkeypatch):
    """Padding rows, recycled slots, snapshots of every token; nothing else in the pool is touched."""
    case = case_of([40, 9, 30], T=3, memory={"H": 2})
    case["state_indices"][1] = -1
    case["has_initial_state"] = torch.tensor([True, True, False])
    case["state_pool"][case["state_indices"][2].long()] = NAN
    got = check(case, backend, monkeypatch)
    assert not got["out"][1].any() and not got["reads"][1].any() and got["lse"][1].isneginf().all()
    free = [slot for slot in range(7) if slot not in case["state_indices"].tolist()]
    used = case["state_indices"]
    case["output_state_indices"] = ints(used[0], -1, free[0], -1, -1, -1, free[1], free[2], used[2]).view(3, 3)
    check(case, backend, monkeypatch)


@on_backends
def test_splits(backend, monkeypatch):
    """1 to 7 splits agree; a fixed count makes a row independent of its neighbours, and on the CPU 0 does, too."""
    dtype, unit = (BF16, 2**-7) if backend == "cuda" else (FP32, 1e-5)
    case = case_of([900, 700], HQ=8, HKV=2, memory={}, dtype=dtype)
    results = [check(case | {"num_splits": n}, backend, monkeypatch) for n in range(8)]
    for result in results[1:]:
        torch.testing.assert_close(result["out"], results[0]["out"], atol=unit, rtol=unit)
        torch.testing.assert_close(result["lse"], results[0]["lse"], atol=1e-5, rtol=1e-5)
    assert len({tuple(result["out"].flatten().tolist()) for result in results}) >= 6  # they do split
    for n in (0, 1, 5) if backend == "cpu" else (1, 5):
        both = run(case | {"num_splits": n}, backend)
        for b in range(2):
            rows = (
                "q",
                "k",
                "v",
                "k_cache",
                "v_cache",
                "mem_q",
                "mem_k",
                "mem_v",
                "beta",
                "cache_seqlens",
                "state_indices",
            )
            alone = run(case | {"num_splits": n} | {name: case[name][b : b + 1] for name in rows}, backend)
            assert torch.equal(alone["out"][0], both["out"][b])


@on_backends
def test_permuted_batch(backend):
    # left to choose, the CUDA kernel cuts a row where its neighbours end
    case = case_of([300, 5, 700, 64], T=2, page=16, memory={"H": 2}, num_splits=2 if backend == "cuda" else 0)
    order = torch.tensor([2, 0, 3, 1])
    rows = ("q", "k", "v", "mem_q", "mem_k", "mem_v", "beta", "cache_seqlens", "block_table", "state_indices")
    got = run(case, backend)
    permuted = run(case | {name: case[name][order] for name in rows}, backend)
    for name in ("out", "reads", "lse"):
        assert torch.equal(permuted[name], got[name][order])
    for name in ("k_cache", "v_cache", "state_pool"):
        assert torch.equal(bits(permuted[name]), bits(got[name]))


@on_instruction_sets
def test_thread_counts(backend, isa_name):
    case = case_of([1500, 3, 600], T=2, HQ=8, HKV=4, D=96, memory={"H": 4}, page=16)
    with isa(isa_name):
        results = []
        for count in (1, 2, 5):
            with threads(count):
                results.append(run(case, backend))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@on_backends
def test_zero_deltas_are_plain_attention(backend):
    case = case_of([200, 70], T=2, memory={})
    for name in "qkv":
        case[f"delta_{name}"] = torch.zeros_like(case[f"delta_{name}"])
    bare = {name: x for name, x in case.items() if not name.startswith(("mem_", "delta_", "state_", "beta", "lam"))}
    with_memory, without = run(case, backend), run(bare, backend)
    assert torch.equal(with_memory["out"], without["out"]) and torch.equal(with_memory["lse"], without["lse"])


@on_backends
@pytest.mark.parametrize("filled", [[0, 0], [7, 0]])
def test_no_tokens(backend, filled):
    case = case_of(filled, T=2, memory={}, valid=[0, 0])
    got = run(case, backend)
    assert not got["out"].any() and not got["reads"].any() and got["lse"].isneginf().all()
    assert same_bits({"pool": got["state_pool"]}, {"pool": case["state_pool"]})
