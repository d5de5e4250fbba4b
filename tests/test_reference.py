"""The reference scan and output in fp64: against the official scans, autograd and gradcheck."""

import importlib
import inspect
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gradients import TIGHT, autograd, gradcheck, ints, randn, tail_mask
from safetensors import safe_open
from torch.testing import assert_close

from deltamem_kernels.ops import SCHEMAS
from deltamem_kernels.reference import delta_output, delta_scan

GOLDEN = sorted((Path(__file__).parent / "data" / "golden" / "scan").glob("*.safetensors"))
RULES = ("standard", "lambda_outside", "no_lambda")
NAN = float("nan")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("op", SCHEMAS)
def test_arguments_are_those_of_the_schema(op):
    module, arguments, _ = SCHEMAS[op]
    function = getattr(importlib.import_module(f"deltamem_kernels.reference.{module}"), op)
    assert list(inspect.signature(function).parameters) == [a.split()[-1] for a in arguments.split(", ")]


# ---- delta_scan --------------------------------------------------------------------------------------------


def scan_args(B=2, T=7, H=2, R=3, *, gate=None, free=False, state=True, packed=None, bias=False, **options):
    """Arguments of delta_scan_fwd; packed: the ends of the sequences."""
    B, N = (1, len(packed) - 1) if packed else (B, B)
    gate = gate or R
    gates_are_logits = options.get("use_gate_in_kernel", False)
    tokens = {name: 0.7 * randn(B, T, H, R) for name in ("mem_q", "mem_k", "mem_v")}
    for name in ("beta", "lam"):
        logits = randn(B, T, H, gate)
        tokens[name] = logits if gates_are_logits else torch.sigmoid(logits)
    tokens["lam"] = tokens["lam"] if free else None
    return {
        **tokens,
        "initial_state": randn(N, H, R, R) if state else None,
        "token_mask": None,
        "cu_seqlens": ints(*packed) if packed else None,
        "beta_bias": randn(H, gate) if bias else None,
        "lam_bias": randn(H, gate) if bias and free else None,
        "update_rule": "standard",
        "write": True,
        "use_qk_activation_in_kernel": False,
        "use_gate_in_kernel": False,
        "segment_len": 3,
        "save_tape": True,
        **options,
    }


SCAN_CASES = {
    **{f"{rule}_{lam}": {"update_rule": rule, "free": lam == "free"} for rule in RULES for lam in ("free", "coupled")},
    **{f"{rule}_shared_gates": {"update_rule": rule, "free": True, "gate": 1} for rule in RULES},
    "coupled_shared_gates": {"gate": 1, "update_rule": "lambda_outside"},
    "zero_start": {"state": False},
    "one_segment": {"segment_len": 0},
    "masked": {"token_mask": tail_mask(2, 7), "free": True, "update_rule": "lambda_outside"},
    "activations": {"use_qk_activation_in_kernel": True, "free": True},
    "logits": {"use_gate_in_kernel": True, "update_rule": "lambda_outside"},
    "logits_biases": {"use_gate_in_kernel": True, "bias": True, "free": True},
    "logits_biases_shared": {
        "use_gate_in_kernel": True,
        "bias": True,
        "gate": 1,
        "token_mask": tail_mask(2, 7),
    },
    "read_only": {"write": False, "token_mask": tail_mask(2, 7), "use_qk_activation_in_kernel": True},
    "read_only_zero_start": {"write": False, "state": False},
    "packed": {"packed": (0, 4, 4, 7), "free": True},
    "packed_everything": {
        "packed": (0, 1, 1, 6),
        "T": 8,
        "free": True,
        "bias": True,
        "gate": 1,
        "update_rule": "lambda_outside",
        "token_mask": tail_mask(1, 8),
        "use_qk_activation_in_kernel": True,
        "use_gate_in_kernel": True,
    },
    "packed_read_only": {"packed": (0, 0, 3, 6), "write": False},
}
SCAN_GRADS = ("mem_q", "mem_k", "mem_v", "beta", "lam", "initial_state", "beta_bias", "lam_bias")


def scan_bwd(args, dreads, dfinal_state, tape):
    inputs = {name: x for name, x in args.items() if name != "save_tape"}
    return dict(zip(SCAN_GRADS, delta_scan.delta_scan_bwd(dreads, dfinal_state, **inputs, tape=tape), strict=True))


@pytest.mark.parametrize("segment_len", [0, 7])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_scan_is_the_official_one(path, segment_len):
    with safe_open(path, "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rule = file.metadata()["state_update_mode"]
    free = "grad_decay" in golden
    args = scan_args() | {name: golden[name] for name in ("mem_q", "mem_k", "mem_v", "beta")}
    args |= {"lam": golden["decay"] if free else None, "initial_state": golden["state"], "update_rule": rule}
    args |= {"token_mask": golden.get("token_mask"), "segment_len": segment_len}
    reads, final_state, tape = delta_scan.delta_scan_fwd(**args)
    assert_close(reads, golden["reads"], **TIGHT)
    assert_close(final_state, golden["final_state"], **TIGHT)
    grads = scan_bwd(args, golden["d_reads"], golden["d_final_state"], tape)
    for ours, theirs in {"lam": "decay", "initial_state": "state"}.items():
        grads[theirs] = grads.pop(ours)
    for name in ("mem_q", "mem_k", "mem_v", "beta", "state", *(("decay",) if free else ())):
        assert_close(grads[name], golden[f"grad_{name}"], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", SCAN_CASES)
def test_scan_gradients(case):
    args = scan_args(**SCAN_CASES[case])
    reads, final_state, tape = delta_scan.delta_scan_fwd(**args)
    for cotangents in ((randn(*reads.shape), randn(*final_state.shape)), (randn(*reads.shape), None)):
        grads = scan_bwd(args, *cotangents, tape)
        expected = autograd(delta_scan.delta_scan_fwd, args, cotangents)
        for name, grad in grads.items():
            if args[name] is None:
                assert grad.shape == (0,), name
            else:
                assert_close(grad, expected[name], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")
    gradcheck(delta_scan.delta_scan_fwd, args, results=2)


def test_scan_gradient_of_the_final_state_alone():
    args = scan_args(free=True)
    _, final_state, tape = delta_scan.delta_scan_fwd(**args)
    dfinal_state = randn(*final_state.shape)
    expected = autograd(delta_scan.delta_scan_fwd, args, (None, dfinal_state))
    for name, grad in scan_bwd(args, None, dfinal_state, tape).items():
        if args[name] is not None:
            assert_close(grad, expected[name], **TIGHT)


def test_activation_of_a_zero_vector():
    x, dy = torch.zeros(1, 4, dtype=torch.float64), randn(1, 4)
    leaf = x.clone().requires_grad_()
    y = F.normalize(torch.tanh(leaf), dim=-1, eps=1e-6)
    y.backward(dy)
    assert_close(delta_scan.activate(x), y.detach())
    assert_close(delta_scan.activate_bwd(dy, x), leaf.grad)


@pytest.mark.parametrize("rule", RULES)
def test_packed_scan_is_each_sequence_alone(rule):
    ends = (0, 4, 4, 5, 9)
    args = scan_args(T=11, packed=ends, free=True, update_rule=rule, segment_len=2)
    for name in ("mem_q", "mem_k", "mem_v", "beta", "lam"):
        args[name][:, ends[-1] :] = NAN  # rows past the end
    reads, final_state, tape = delta_scan.delta_scan_fwd(**args)
    assert tape.shape[0] == 11 // 2 + 4
    for n, (start, stop) in enumerate(pairwise(ends)):
        part = {
            name: x[:, start:stop] if isinstance(x, torch.Tensor) and x.dim() == 4 else x for name, x in args.items()
        }
        part |= {"initial_state": args["initial_state"][n : n + 1], "cu_seqlens": None}
        alone = delta_scan.delta_scan_fwd(**part)
        assert_close(reads[:, start:stop], alone[0], **TIGHT)
        assert_close(final_state[n : n + 1], alone[1], **TIGHT)
        first = start // 2 + n
        assert_close(tape[first : first + -(-(stop - start) // 2)], alone[2], **TIGHT)
    assert (reads[:, ends[-1] :] == 0).all()
    grads = scan_bwd(args, torch.full_like(reads, NAN).index_copy(1, torch.arange(9), reads[:, :9]), None, tape)
    for name in ("mem_q", "mem_k", "mem_v", "beta", "lam"):
        assert grads[name].isfinite().all() and (grads[name][:, 9:] == 0).all()


def test_masked_tokens_do_not_exist():
    mask = tail_mask(1, 9)
    args = scan_args(B=1, T=9, free=True, token_mask=mask)
    for name in ("mem_q", "mem_k", "mem_v", "beta", "lam"):
        args[name][~mask] = NAN
    kept = {name: x[mask][None] if isinstance(x, torch.Tensor) and x.shape[1] == 9 else x for name, x in args.items()}
    reads, final_state, tape = delta_scan.delta_scan_fwd(**args)
    expected = delta_scan.delta_scan_fwd(**kept | {"token_mask": None})
    assert_close(reads[mask][None], expected[0], **TIGHT)
    assert (reads[~mask] == 0).all()
    assert_close(final_state, expected[1], **TIGHT)
    grads = scan_bwd(args, torch.where(mask[..., None, None], reads, NAN), final_state, tape)
    assert all(grad.isfinite().all() for grad in grads.values())


def pool_args(args, pool, reads=None, **indices):
    kept = {name: x for name, x in args.items() if name not in ("initial_state", "segment_len", "save_tape")}
    found = {"state_indices": None, "output_state_indices": None, "has_initial_state": None}
    reads = torch.full_like(args["mem_q"], NAN) if reads is None else reads
    return kept | {"state_pool": pool, "reads": reads} | found | indices


@pytest.mark.parametrize("write", [True, False])
def test_pool_keeps_each_row_in_its_slots(write):
    args = scan_args(B=4, T=5, free=True, write=write, token_mask=tail_mask(4, 5))
    pool = randn(9, 2, 2, 3, 3)[:, 0]  # strided over slots
    pool[5] = NAN  # a recycled slot
    before = pool.clone()
    pooled = pool_args(
        args,
        pool,
        state_indices=ints(3, -1, 5, 0),
        output_state_indices=ints(3, 2, 7, -1),
        has_initial_state=torch.tensor([True, True, False, True]),
    )
    delta_scan.delta_scan_with_state_pool(**pooled)
    start = torch.stack([before[3], before[1], torch.zeros_like(before[5]), before[0]])
    reads, final_state, _ = delta_scan.delta_scan_fwd(**args | {"initial_state": start})
    reads[1] = 0
    assert_close(pooled["reads"], reads, rtol=0, atol=0)
    expected = before.clone()
    expected[3], expected[7] = final_state[0], final_state[2]
    assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("packed", [None, (0, 3, 3, 5)])
def test_pool_takes_the_state_after_each_token(packed):
    args = scan_args(B=3, T=6, packed=packed)
    rows, shape = 3, args["mem_q"].shape[:2]
    pool = randn(24, 2, 3, 3)
    before = pool.clone()
    slots = torch.randperm(20, dtype=torch.int32)[: shape.numel()].view(shape) + 4
    slots[0, 0], slots[0, 1] = 0, -1  # row 0's own start slot; a state that is not kept
    pooled = pool_args(args, pool, state_indices=torch.arange(rows, dtype=torch.int32), output_state_indices=slots)
    delta_scan.delta_scan_with_state_pool(**pooled)
    expected = before.clone()
    spans = [(b, 0, 6, b) for b in range(3)] if packed is None else [(0, 0, 3, 0), (0, 3, 5, 2)]
    for b, start, stop, row in spans:
        for t in range(start, stop):
            part = {
                n: x[b : b + 1, start : t + 1] for n, x in args.items() if n[:3] in ("mem", "bet") and x is not None
            }
            part |= {"initial_state": before[row : row + 1], "cu_seqlens": None}
            if slots[b, t] >= 0:
                expected[slots[b, t]] = delta_scan.delta_scan_fwd(**args | part)[1][0]
    assert_close(pool, expected, **TIGHT)
    assert_close(pooled["reads"], delta_scan.delta_scan_fwd(**args | {"initial_state": before[:3]})[0], **TIGHT)


# ---- delta_output ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_output(normed, residual):
    args = {"attn_proj": randn(2, 3, 5), "reads": randn(2, 3, 2, 4), "delta_o": randn(5, 8)}
    args |= {"rms_weight": randn(5) if normed else None, "rms_eps": 1e-3}
    args |= {"residual": randn(2, 3, 5) if residual else None}
    y = delta_output.delta_output_fwd(**args)
    u = args["reads"].flatten(2) @ args["delta_o"].T
    u = F.rms_norm(u, (5,), args["rms_weight"], 1e-3) if normed else u
    assert_close(y, args["attn_proj"] + u + (args["residual"] if residual else 0), **TIGHT)

    dy = randn(2, 3, 5)
    expected = autograd(delta_output.delta_output_fwd, args, (dy,))
    grads = delta_output.delta_output_bwd(dy, *(args[n] for n in ("reads", "delta_o", "rms_weight", "rms_eps")))
    for name, grad in zip(("reads", "delta_o", "rms_weight"), grads, strict=True):
        assert grad.shape == (0,) if args[name] is None else not assert_close(grad, expected[name], **TIGHT)
    gradcheck(delta_output.delta_output_fwd, args)

    for name in ("attn_proj", "residual") if residual else ("attn_proj",):
        own = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in args.items()}
        delta_output.delta_output_out(**own, out=own[name])
        assert_close(own[name], y, rtol=0, atol=0)


# ---- dtypes ------------------------------------------------------------------------------------------------


def test_low_precision_in_fp32_arithmetic():
    args = scan_args(free=True, segment_len=0)
    low = {n: x.bfloat16() if isinstance(x, torch.Tensor) else x for n, x in args.items()}
    low["initial_state"] = args["initial_state"].float()
    wide = {n: x.float() if isinstance(x, torch.Tensor) else x for n, x in low.items()}
    results = delta_scan.delta_scan_fwd(**low)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = delta_scan.delta_scan_fwd(**low)
    for y, same, expected in zip(results, under_autocast, delta_scan.delta_scan_fwd(**wide), strict=True):
        assert y.dtype == torch.float32
        assert torch.equal(y, expected) and torch.equal(same, expected)
    for name, grad in scan_bwd(low, results[0], results[1], results[2]).items():
        assert low[name] is None or (grad.dtype, grad.shape) == (low[name].dtype, low[name].shape)


@pytest.mark.parametrize("packed", [None, (0,), (0, 0, 0)])
def test_nothing_to_scan(packed):
    args = scan_args(T=0, packed=packed)
    reads, final_state, tape = delta_scan.delta_scan_fwd(**args)
    assert reads.shape == args["mem_q"].shape and torch.equal(final_state, args["initial_state"])
    assert not final_state.numel() or final_state.data_ptr() != args["initial_state"].data_ptr()
    grads = scan_bwd(args, reads, final_state, tape)
    assert torch.equal(grads["initial_state"], final_state)
