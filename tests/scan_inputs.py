"""Arguments of the scan ops, and the error budget of their recurrences."""

import torch
from kernel_checks import as_fp64, call

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RULES = ("standard", "lambda_outside", "no_lambda")
INPUTS = ("mem_q", "mem_k", "mem_v", "beta", "lam", "initial_state", "beta_bias", "lam_bias")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def scan_args(
    B=2, T=70, H=2, R=8, rule="standard", free=False, gate=None, raw=False, dtypes=(FP32,), state=True, packed=None,
    mask=None, segment_len=0,
):  # fmt: skip
    """Arguments of delta_scan_fwd. raw: activations and gates are the op's; dtypes: of q, k, v, beta, lam in turns;
    packed: the ends of the sequences; mask: the share of masked tokens."""
    B, N = (1, len(packed) - 1) if packed else (B, B)
    q, k, v = (torch.randn(B, T, H, R) for _ in range(3))
    # Gates that remember: what a state still holds of the first token, and its gradient, stay far above rounding.
    beta, lam = torch.randn(B, T, H, gate or R) - 2, torch.randn(B, T, H, gate or R) + 3
    if not raw:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        beta, lam = beta.sigmoid(), lam.sigmoid()
    tokens = [x.to(dtypes[i % len(dtypes)]) for i, x in enumerate((q, k, v, beta, lam))]
    return {
        **dict(zip(INPUTS, tokens, strict=False)),
        "lam": tokens[4] if free else None,
        "initial_state": torch.randn(N, H, R, R) if state else None,
        "token_mask": None if mask is None else torch.rand(B, T) >= mask,
        "cu_seqlens": ints(*packed) if packed else None,
        "beta_bias": torch.randn(H, gate or R) if raw else None,
        "lam_bias": torch.randn(H, gate or R) if raw and free else None,
        "update_rule": rule,
        "write": True,
        "use_qk_activation_in_kernel": raw,
        "use_gate_in_kernel": raw,
        "segment_len": segment_len,
        "save_tape": True,
    }


def bwd_args(args, tape, dreads=True, dfinal_state=True):
    """Arguments of delta_scan_bwd, with random cotangents."""
    B, _, H, R = args["mem_q"].shape
    N = B if args["cu_seqlens"] is None else len(args["cu_seqlens"]) - 1
    cotangents = {
        "dreads": torch.randn(args["mem_q"].shape) if dreads else None,
        "dfinal_state": torch.randn(N, H, R, R) if dfinal_state else None,
    }
    return cotangents | {n: x for n, x in args.items() if n != "save_tape"} | {"tape": tape}


def assert_close_as_eager(got, plain, want, name=""):
    """max |got - want| <= 2 max |plain - want| + one rounding unit of the largest value; want: fp64, plain: the
    reference in the inputs' own dtypes."""
    assert got.shape == plain.shape and got.dtype == plain.dtype, (name, got.shape, got.dtype, plain.dtype)
    if want.numel():
        error, eager = (got.double() - want).abs().max(), (plain.double() - want).abs().max()
        allowed = 2 * eager + torch.finfo(got.dtype).eps * want.abs().max()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def check_scan(backend, args, **cotangents):
    """Forward and backward against the reference in fp64; returns all results."""
    results = {}
    forward = {
        "got": call("delta_scan_fwd", backend, args),
        "plain": call("delta_scan_fwd", "reference", args),
        "want": call("delta_scan_fwd", "reference", as_fp64(args)),
    }
    backward = bwd_args(args, forward["got"][2], **cotangents)
    for kind, (reads, final_state, tape) in forward.items():
        exact = kind == "want"
        gradients = call(
            "delta_scan_bwd",
            backend if kind == "got" else "reference",
            (as_fp64(backward) if exact else backward) | {"tape": tape},
        )
        used = () if args["cu_seqlens"] is not None else (tape,)  # a packed tape has slots of no segment
        results[kind] = (reads, final_state, *gradients, *used)
    names = ("reads", "final_state", *(f"d{n}" for n in INPUTS), "tape")
    for name, *values in zip(names, *results.values(), strict=False):
        assert_close_as_eager(*values, name)
    return results["got"]
