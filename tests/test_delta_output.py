"""delta_output: forward, in place and backward, against the fp64 reference."""

import pytest
import torch
from kernel_checks import CUDA, ISAS, TRITON, call, check_against_reference, instruction_set, same_bits, threads

BACKENDS = ["cpu", CUDA, TRITON]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def output_args(B=2, T=5, hidden=256, H=1, R=8, dtype=FP32, weights=None, rms=False, residual=False):
    weights = weights or dtype
    return {
        "attn_proj": torch.randn(B, T, hidden).to(dtype),
        "reads": torch.randn(B, T, H, R),
        "delta_o": (0.3 * torch.randn(hidden, H * R)).to(weights),
        "rms_weight": (1 + 0.3 * torch.randn(hidden)).to(weights) if rms else None,
        "rms_eps": 1e-6,
        "residual": torch.randn(B, T, hidden).to(dtype) if residual else None,
    }


def bwd_args(args):
    dy = torch.randn(args["attn_proj"].shape).to(args["attn_proj"].dtype)
    return {"dy": dy, **{n: args[n] for n in ("reads", "delta_o", "rms_weight", "rms_eps")}}


CASES = {
    "fp32": {},
    "bf16": {"dtype": BF16, "residual": True},
    "fp16": {"dtype": FP16, "weights": FP32, "rms": True},
    "wide": {"hidden": 2560, "dtype": BF16, "residual": True},
    "pieces": {"hidden": 1000, "rms": True, "residual": True, "weights": BF16},
    "narrow": {"hidden": 7, "R": 3, "rms": True},
    "one_channel": {"hidden": 1, "R": 1},
    "many_states": {"H": 4, "R": 16, "rms": True},
    "one_token": {"B": 1, "T": 1, "hidden": 1030, "dtype": BF16},
    "one_token_rms": {"B": 1, "T": 1, "hidden": 1030, "rms": True, "residual": True},
    "many_tokens": {"T": 71, "hidden": 300, "rms": True, "H": 2, "R": 6},
    # the CUDA backward's parts have two chunks of tokens each
    "long": {"B": 1, "T": 8300, "hidden": 8, "rms": True},
    "long_generic": {"B": 1, "T": 8300, "hidden": 5, "R": 2},
    "no_tokens": {"T": 0, "rms": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, case):
    check_against_reference("delta_output_fwd", backend, output_args(**CASES[case]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward(backend, case):
    check_against_reference("delta_output_bwd", backend, bwd_args(output_args(**CASES[case])))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("rms", (False, True))
def test_instruction_sets(isa, dtype, rms):
    args = output_args(hidden=523, dtype=dtype, rms=rms, residual=True, R=12)
    with instruction_set(isa):
        check_against_reference("delta_output_fwd", "cpu", args)
        check_against_reference("delta_output_bwd", "cpu", bwd_args(args))


@pytest.mark.parametrize("rms", (False, True))
@pytest.mark.parametrize("T", (1, 3, 200))
def test_threads_do_not_change_bits(T, rms):
    args = output_args(B=1, T=T, hidden=40000 if T < 10 else 700, dtype=BF16, rms=rms, residual=True)
    backward = bwd_args(args)
    with threads(1):
        one = (*call("delta_output_fwd", "cpu", args), *call("delta_output_bwd", "cpu", backward))
    with threads(5):
        five = (*call("delta_output_fwd", "cpu", args), *call("delta_output_bwd", "cpu", backward))
    assert all(map(same_bits, one, five))


@pytest.mark.parametrize("rms", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_does_not_see_its_neighbours(backend, rms):
    args = output_args(B=1, T=30, hidden=700, rms=rms)
    (whole,) = call("delta_output_fwd", backend, args)
    for t in (0, 13, 29):
        tokens = {n: args[n][:, t : t + 1] for n in ("attn_proj", "reads")}
        assert same_bits(call("delta_output_fwd", backend, {**args, **tokens})[0], whole[:, t : t + 1])


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("rms", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_weights_add_nothing(backend, rms, dtype):
    args = output_args(rms=rms, dtype=dtype)
    args["delta_o"] = torch.zeros_like(args["delta_o"])
    assert same_bits(call("delta_output_fwd", backend, args)[0], args["attn_proj"])


@pytest.mark.parametrize("rms", (False, True))
@pytest.mark.parametrize("target", ("attn_proj", "residual", "fresh"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_may_be_an_input(backend, target, rms):
    args = output_args(hidden=600, dtype=BF16, rms=rms, residual=True)
    (want,) = call("delta_output_fwd", backend, args)
    out = torch.empty_like(args["attn_proj"]) if target == "fresh" else args[target]
    call("delta_output_out", backend, {**args, "out": out})
    assert same_bits(out, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_outer_strides(backend):
    args = output_args(B=3, T=4, H=2, rms=True, residual=True)
    turned = {
        **args,
        "attn_proj": args["attn_proj"].transpose(0, 1).contiguous().transpose(0, 1),
        "reads": args["reads"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        "delta_o": torch.nn.functional.pad(args["delta_o"], (1, 2))[:, 1:-2],
        "residual": torch.nn.functional.pad(args["residual"], (5, 3))[..., 5:-3],
    }
    assert same_bits(*(call("delta_output_fwd", backend, x)[0] for x in (args, turned)))
    padded = torch.full((3, 6, 300), 7.0)
    call("delta_output_out", backend, {**turned, "out": padded[:, 1:5, 11:267]})
    assert same_bits(padded[:, 1:5, 11:267], call("delta_output_fwd", backend, args)[0])
    padded[:, 1:5, 11:267] = 7.0
    assert (padded == 7).all()

    backward = bwd_args(args)
    backward["dy"] = backward["dy"][:1].expand(3, -1, -1)
    check_against_reference("delta_output_bwd", backend, backward | {"reads": turned["reads"]})
