"""delta_output on Triton, at sizes that the interpreter finishes; the cases beyond are test_delta_output.py's."""

import pytest
import torch
from kernel_checks import call, check_against_reference, same_bits

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def output_args(B=2, T=3, hidden=140, H=1, R=4, dtype=FP32, weights=None, rms=False, residual=False):
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
    "bf16": {"dtype": BF16, "residual": True, "R": 8},
    "fp16_rms": {"dtype": FP16, "weights": FP32, "rms": True},
    "many_states": {"H": 3, "R": 4, "rms": True, "residual": True},
    "narrow": {"hidden": 7, "R": 3, "rms": True},
    "one_channel": {"B": 1, "T": 1, "hidden": 1, "R": 1},
    "prefill_tile": {"B": 1, "T": 35, "hidden": 300, "rms": True, "R": 2},
    "wide_prefill_tile": {"B": 1, "T": 35, "hidden": 150, "H": 3, "R": 4},
    "no_tokens": {"T": 0, "rms": True},
}


@pytest.mark.parametrize("case", CASES)
def test_against_reference(case):
    args = output_args(**CASES[case])
    check_against_reference("delta_output_fwd", "triton", args)
    check_against_reference("delta_output_bwd", "triton", bwd_args(args))


def test_bf16_rounds_to_nearest_even():
    """Sums of two bf16, exact in fp32: only the rounding of the result counts, on a GPU and where tests interpret."""
    args = output_args(B=1, T=8, hidden=256, dtype=BF16, residual=True)
    args["delta_o"].zero_()
    (got,) = call("delta_output_fwd", "triton", args)
    assert same_bits(got, (args["attn_proj"].float() + args["residual"].float()).bfloat16())


def test_chunks_of_tokens_add_up_in_order(monkeypatch):
    from deltamem_kernels.triton_ops import delta_output

    monkeypatch.setattr(delta_output, "CHUNK_TOKENS", 8)
    args = bwd_args(output_args(B=1, T=37, hidden=20, rms=True))
    first = check_against_reference("delta_output_bwd", "triton", args)
    assert all(map(same_bits, first, call("delta_output_bwd", "triton", args)))


@pytest.mark.parametrize("target", ("attn_proj", "residual", "fresh"))
def test_out_may_be_an_input(target):
    args = output_args(dtype=BF16, rms=True, residual=True)
    (want,) = call("delta_output_fwd", "triton", args)
    out = torch.empty_like(args["attn_proj"]) if target == "fresh" else args[target]
    call("delta_output_out", "triton", {**args, "out": out})
    assert same_bits(out, want)


def test_any_outer_strides():
    args = output_args(H=2, rms=True, residual=True)
    turned = {
        **args,
        "attn_proj": args["attn_proj"].transpose(0, 1).contiguous().transpose(0, 1),
        "reads": args["reads"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        "delta_o": torch.nn.functional.pad(args["delta_o"], (1, 2))[:, 1:-2],
        "residual": torch.nn.functional.pad(args["residual"], (5, 3))[..., 5:-3],
    }
    (want,) = call("delta_output_fwd", "triton", args)
    padded = torch.full((2, 5, 160), 7.0)
    call("delta_output_out", "triton", {**turned, "out": padded[:, 1:4, 11:151]})
    assert same_bits(padded[:, 1:4, 11:151], want)
    padded[:, 1:4, 11:151] = 7.0
    assert (padded == 7).all()
    backward = bwd_args(args)
    backward["dy"] = backward["dy"][:1].expand(2, -1, -1)
    check_against_reference("delta_output_bwd", "triton", backward | {"reads": turned["reads"]})
