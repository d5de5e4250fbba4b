"""The reference prep and attention against naive oracles, autograd and gradcheck, in fp64."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import attention_args, defaults, naive_attention, prep_args
from gradients import TIGHT, autograd, gradcheck, ints, randn, tail_mask
from torch.testing import assert_close

from deltamem_kernels.reference import delta_attention, delta_prep

NAN = float("nan")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- delta_prep --------------------------------------------------------------------------------------------


PREP_CASES = {
    "all": {},
    "full_rotary": {"half": 3},
    "interleaved": {"rotary_interleaved": True},
    "gathered": {"gathered": True},
    "positions": {"positions": torch.randint(0, 40, (2, 5), dtype=torch.int32)},
    "packed": {"packed": (0, 3, 3, 4)},
    "packed_positions": {"packed": (0, 3, 3, 4), "positions": ints(7, 39, 0, 5, 2**30)[None]},
    "packed_gathered_interleaved": {"packed": (0, 3, 3, 4), "gathered": True, "rotary_interleaved": True},
    "no_correction": {"correct": False},
    "no_norm": {"norm": False},
    "no_rotary": {"half": 0},
    "correct_q_only": {"delta_k": None, "delta_v": None},
    "q_only": {"k": None, "v": None, "delta_k": None, "delta_v": None, "k_norm_weight": None},
    "nothing": {"correct": False, "norm": False, "half": 0},
}
PREP_GRADS = ("q", "k", "v", "reads", "delta_q", "delta_k", "delta_v", "q_norm_weight", "k_norm_weight")


@pytest.mark.parametrize("case", PREP_CASES)
def test_prep_gradients(case):
    args = prep_args(**PREP_CASES[case])
    results = delta_prep.delta_prep_fwd(**args)
    cotangents = [None if args[name] is None else randn(*args[name].shape) for name in "qkv"]
    expected = autograd(delta_prep.delta_prep_fwd, args, cotangents)
    *grads, dcos, dsin = delta_prep.delta_prep_bwd(*cotangents, **args, rotary_grad=args["rotary_cos"] is not None)
    for name, grad in zip(PREP_GRADS, grads, strict=True):
        if args[name] is None:
            assert grad.shape == (0,), name
        else:
            assert_close(grad, expected[name], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")
    for name, grad in (("rotary_cos", dcos), ("rotary_sin", dsin)):
        if args[name] is None:
            continue
        if args[name].dim() == 2:  # a table gets the sum over the tokens that used a row of it
            at, live = delta_prep.token_positions(args["q"], args["positions"], args["cu_seqlens"])
            grad = torch.zeros_like(args[name]).index_add(0, at[live], grad[live])
        assert_close(grad, expected[name], **TIGHT)
    for x, y in zip("qkv", results, strict=True):
        assert args[x] is None or y.untyped_storage().data_ptr() != args[x].untyped_storage().data_ptr()
    gradcheck(lambda **a: tuple(y for y in delta_prep.delta_prep_fwd(**a) if y.numel()), args, results=3)


def test_prep_gradient_of_one_cotangent():
    args = prep_args()
    dk = randn(*args["k"].shape)
    expected = autograd(delta_prep.delta_prep_fwd, args, (None, dk, None))
    grads = delta_prep.delta_prep_bwd(None, dk, None, **args, rotary_grad=False)
    for name, grad in zip(PREP_GRADS, grads, strict=False):
        assert_close(grad, expected[name], **TIGHT)
    assert grads[-1].shape == grads[-2].shape == (0,)


def test_prep_steps_are_the_textbook_ones():
    args = prep_args(half=3, packed=(0, 3, 5), T=6)
    position = torch.tensor([0, 1, 2, 0, 1])
    x = args["k"] + (args["reads"].flatten(2) @ args["delta_k"].T).view_as(args["k"])
    x = F.rms_norm(x, (6,), args["k_norm_weight"], 1e-3)[:, :5]
    angle = torch.complex(args["rotary_cos"][position], args["rotary_sin"][position])[:, None]
    neox = torch.complex(x[..., :3], x[..., 3:]) * angle
    pairs = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous()) * angle
    for interleaved, expected in (
        (False, torch.cat((neox.real, neox.imag), -1)),
        (True, torch.view_as_real(pairs)),
    ):
        k = delta_prep.delta_prep_fwd(**args | {"rotary_interleaved": interleaved})[1]
        assert_close(k[:, :5], expected.reshape(1, 5, 2, 6), **TIGHT)
        assert (k[:, 5:] == 0).all()


# ---- delta_attention ---------------------------------------------------------------------------------------


ATTENTION_CASES = {
    "causal": {},
    "full": {"causal": False},
    "one_group": {"HQ": 3, "HKV": 3},
    "many_groups": {"HQ": 6, "HKV": 1},
    "window": {"window": (2, -1)},
    "two_sided_window": {"window": (1, 2), "causal": False},
    "causal_window_right": {"window": (-1, 2)},
    "softcap": {"softcap": 1.5},
    "masked": {"token_mask": tail_mask(2, 6)},
    "masked_full_window": {"token_mask": tail_mask(2, 6), "causal": False, "window": (0, 1)},
    "packed": {"packed": (0, 2, 2, 5)},
    "packed_masked_softcap": {"packed": (0, 2, 2, 5), "token_mask": tail_mask(1, 6), "softcap": 2.0},
}


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(case):
    args = attention_args(**ATTENTION_CASES[case])
    mask = torch.ones(args["q"].shape[:2], dtype=torch.bool) if args["token_mask"] is None else args["token_mask"]
    poisoned = args | {n: torch.where(mask[..., None, None], args[n], NAN) for n in "qkv"}
    out, lse = delta_attention.delta_attention_fwd(**poisoned)
    ends = args["cu_seqlens"]
    spans = [(b, 0, 6) for b in range(2)] if ends is None else [(0, *p) for p in pairwise(ends.tolist())]
    expected, expected_lse = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for b, start, stop in spans:
        row = (args[n][b, start:stop] for n in "qkv")
        found = naive_attention(*row, mask[b, start:stop], args)
        expected[b, start:stop], expected_lse[b, :, start:stop] = found
    assert_close(out, expected, **TIGHT)
    assert_close(lse, expected_lse, **TIGHT)

    dout = randn(*out.shape)
    grads = autograd(delta_attention.delta_attention_fwd, args, (dout,))
    names = (
        "token_mask",
        "cu_seqlens",
        "max_seqlen",
        *("softmax_scale", "causal", "window_left", "window_right", "softcap"),
    )
    back = {n: args[n] for n in names}
    for qkv in (args, poisoned):
        found = delta_attention.delta_attention_bwd(dout, *(qkv[n] for n in "qkv"), out, lse, **back)
        for name, grad in zip("qkv", found, strict=True):
            assert_close(grad, grads[name], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")
    gradcheck(delta_attention.delta_attention_fwd, args)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_torch_attention(causal):
    args = attention_args(T=33, D=16, causal=causal)
    out, _ = delta_attention.delta_attention_fwd(**args)
    heads_first = (args[n].transpose(1, 2) for n in "qkv")
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=0.4, enable_gqa=True)
    assert_close(out, expected.transpose(1, 2), **TIGHT)


def test_attention_prepares_its_queries():
    args = attention_args(prologue=2, packed=(0, 2, 5), D=6)
    out, lse = delta_attention.delta_attention_fwd(**args)
    prologue = {n: args[n] for n in prep_args() if n in args} | {"k": None, "v": None}
    absent = {"delta_k": None, "delta_v": None, "k_norm_weight": None}
    q = delta_prep.delta_prep_fwd(**prologue | absent)[0]
    plain = {
        "q": q,
        "reads": None,
        "delta_q": None,
        "q_norm_weight": None,
        "rotary_cos": None,
        "rotary_sin": None,
    }
    assert_close((out, lse), delta_attention.delta_attention_fwd(**args | plain), rtol=0, atol=0)
    gradcheck(delta_attention.delta_attention_fwd, args)


def test_rounded_once_to_the_dtype_given():
    args = attention_args(prologue=2, D=6)
    low = {n: x.bfloat16() if isinstance(x, torch.Tensor) else x for n, x in args.items()}
    low["reads"] = args["reads"].float()
    wide = {n: x.float() if isinstance(x, torch.Tensor) else x for n, x in low.items()}
    out, lse = delta_attention.delta_attention_fwd(**low)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert_close(out.float(), delta_attention.delta_attention_fwd(**wide)[0], rtol=2e-2, atol=2e-2)
    prep = {n: low[n] for n in prep_args() if n in low}
    q = delta_prep.delta_prep_fwd(**defaults(delta_prep.delta_prep_fwd, **prep))[0]
    expected = delta_prep.delta_prep_fwd(**defaults(delta_prep.delta_prep_fwd, **{n: wide[n] for n in prep}))[0]
    assert torch.equal(q, expected.bfloat16())


@pytest.mark.parametrize("packed", [None, (0,), (0, 0)])
def test_nothing_to_attend(packed):
    args = attention_args(T=0, packed=packed, prologue=2, D=6)
    out, lse = delta_attention.delta_attention_fwd(**args)
    assert out.shape == args["q"].shape and lse.shape == (out.shape[0], 4, 0)
    names = (
        "token_mask",
        "cu_seqlens",
        "max_seqlen",
        "softmax_scale",
        "causal",
        "window_left",
        "window_right",
    )
    back = (args[n] for n in (*names, "softcap"))
    grads = delta_attention.delta_attention_bwd(out, args["q"], args["k"], args["v"], out, lse, *back)
    assert [g.shape for g in grads] == [args[n].shape for n in "qkv"]
