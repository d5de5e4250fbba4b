"""Attention kernels over dense and paged caches."""

import pytest
import torch
from attention_checks import BACKENDS, CASES, NAN, cache_inputs, cases, check_cache
from gradients import ints


def head_size(backend):
    return {"D": 64, "dtype": torch.bfloat16} if backend == "cuda" else {}


DTYPES = [torch.float32, torch.bfloat16]
PAGE_SIZES = [0, 1, 3, 16, 64]


@pytest.mark.parametrize(("backend", "dtype", "page_size"), cases(DTYPES, PAGE_SIZES, PAGE_SIZES))
@pytest.mark.parametrize("appended", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_cache(backend, page_size, appended, packed, dtype):
    case = {"page_size": page_size, "appended": appended, "packed": packed, "prologue": True}
    case |= head_size(backend) | {"dtype": dtype}
    check_cache(backend, cache_inputs([150, 61, 97], [31, 1, 20], **case))
    check_cache(backend, cache_inputs([150, 61, 97], [31, 1, 20], leftpad=[70, 0, 3], window_left=40, **case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("page_size", [0, 16])
def test_cache_softmax_options(backend, options, page_size):
    options = head_size(backend) | options
    check_cache(backend, cache_inputs([130, 0, 40], [40, 25, 0], page_size=page_size, HQ=5, HKV=1, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_cache_padding_rows(backend, packed):
    args = cache_inputs([30, 9, 12], [20, 20, 20], packed=packed, state_indices=ints(4, -1, 0), **head_size(backend))
    args["k_cache"][1] = args["v_cache"][1] = NAN
    args["cache_seqlens"][1] = 2**30  # a padding row's arguments mean nothing
    out, lse = check_cache(backend, args)
    padding = (out[0, 20:40], lse[0, :, 20:40]) if packed else (out[1], lse[1])
    assert (padding[0] == 0).all() and padding[1].isneginf().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_queries_than_keys(backend):
    """Keys already appended, but fewer than queries: the first queries stand before slot 0 and see nothing."""
    size = head_size(backend)
    for causal in (True, False):
        check_cache(backend, cache_inputs([7, 40], [20, 20], appended=False, prologue=True, causal=causal, **size))
    check_cache(backend, cache_inputs([3, 30], [20, 20], leftpad=[5, 45], **size))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_strides(backend):
    """Heads-first caches, and pages that are slices of wider ones."""
    for page_size in (0, 16, 64):
        args = cache_inputs([60, 33], [20, 18], page_size=page_size, **head_size(backend))
        args["k_cache"] = args["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
        D = args["v_cache"].shape[3]
        wider = torch.full((*args["v_cache"].shape[:3], 100), NAN, dtype=args["v_cache"].dtype)
        wider[..., 21 : 21 + D] = args["v_cache"]
        args["v_cache"] = wider[..., 21 : 21 + D]
        check_cache(backend, args)
