"""delta_scan_with_state_pool: slots that advance in place, against the fp64 reference and the plain scan."""

import pytest
import torch
from kernel_checks import CUDA, ISAS, TRITON, as_fp64, call, instruction_set, map_tensors, same_bits, threads
from scan_inputs import BF16, INPUTS, assert_close_as_eager, ints, scan_args

BACKENDS = ["cpu", CUDA, TRITON]
NAN = float("nan")
OPTIONS = ("update_rule", "write", "use_qk_activation_in_kernel", "use_gate_in_kernel")


def pool_args(P=7, indices=None, outputs=None, fresh=None, write=True, **scan):
    """Arguments of delta_scan_with_state_pool. fresh: rows without an initial state."""
    args = scan_args(**scan) | {"write": write}
    B, T, H, R = args["mem_q"].shape
    rows = len(args["cu_seqlens"]) - 1 if args["cu_seqlens"] is not None else B
    has_state = None if fresh is None else torch.tensor([row not in fresh for row in range(rows)])
    return {
        **{n: args[n] for n in INPUTS[:5]},
        "state_pool": torch.randn(P, H, R, R),
        "state_indices": None if indices is None else ints(*indices),
        "output_state_indices": None if outputs is None else torch.tensor(outputs, dtype=torch.int32),
        "has_initial_state": has_state,
        **{n: args[n] for n in ("token_mask", "cu_seqlens", "beta_bias", "lam_bias", *OPTIONS)},
        "reads": torch.full((B, T, H, R), NAN),
    }


def run(backend, args, **changes):
    """(reads, pool) after the call, on copies."""
    args = map_tensors(args | changes, torch.clone)
    assert not call("delta_scan_with_state_pool", backend, args)
    return args["reads"], args["state_pool"]


def check_pool(backend, args):
    """Against the reference; slots that no row stores to keep their bits."""
    got, plain, want = run(backend, args), run("reference", args), run("reference", as_fp64(args))
    for name, *values in zip(("reads", "state_pool"), got, plain, want, strict=True):
        assert_close_as_eager(*values, name)
    untouched = [slot for slot in range(len(args["state_pool"])) if same_bits(plain[1][slot], args["state_pool"][slot])]
    assert same_bits(got[1][untouched], args["state_pool"][untouched])
    return got


CASES = {
    "slots_of_rows": {"P": 3},
    "indices": {"B": 3, "indices": (5, 0, 2)},
    "padding": {"B": 4, "indices": (5, -1, 2, -7)},
    "other_outputs": {"B": 3, "indices": (5, 0, 2), "outputs": (1, 0, -1)},
    "outputs_alone": {"B": 2, "outputs": (4, 6)},
    "fresh": {"B": 3, "indices": (5, 0, 2), "fresh": (0, 2)},
    "each_token": {"T": 3, "indices": (5, 0), "outputs": ((1, 5, 6), (-1, 2, 0))},
    "each_token_padding": {"T": 2, "indices": (-1, 0), "outputs": ((1, 3), (2, -1)), "mask": 0.5},
    "packed": {"packed": (0, 1, 1, 30, 70), "T": 72, "indices": (5, 0, 2, -1), "raw": True},
    "packed_each_token": {"packed": (0, 1, 1, 3), "T": 4, "indices": (5, 0, 2), "outputs": ((1, 2, 3, 6),)},
    "masked": {"mask": 0.3, "indices": (5, 3), "rule": "lambda_outside", "free": True},
    "raw_bf16": {"raw": True, "free": True, "dtypes": (BF16,), "T": 3},
    "one_token": {"T": 1, "B": 5, "H": 1, "raw": True},
    "wide": {"T": 5, "R": 24},
    "narrow": {"T": 2, "R": 3},
    "read_only": {"write": False, "indices": (5, 3), "outputs": (4, 3)},
    "no_tokens": {"T": 0, "indices": (5, 3), "outputs": (4, -1), "fresh": (0,)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cases(backend, case):
    check_pool(backend, pool_args(**CASES[case]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("R", (4, 8, 13, 16, 32))
def test_instruction_sets(isa, R):
    with instruction_set(isa):
        check_pool("cpu", pool_args(R=R, T=5, raw=True, free=True, indices=(5, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_slots_are_not_read(backend):
    args = pool_args(B=4, T=5, indices=(5, -1, 2, 0), fresh=(0,), mask=0.2)
    pool = args["state_pool"].clone()
    pool[[1, 3, 4, 5, 6]] = NAN  # 5 belongs to a row that starts fresh
    reads, after = run(backend, args, state_pool=pool)
    want_reads, want = run(backend, args)
    assert same_bits(reads, want_reads) and not reads[1].any()
    assert same_bits(after[[0, 2, 5]], want[[0, 2, 5]])
    assert same_bits(after[[1, 3, 4, 6]], pool[[1, 3, 4, 6]])


@pytest.mark.parametrize("raw", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_is_prefill_and_steps(backend, raw):
    T, steps = 75, 6
    args = pool_args(T=T, raw=raw, free=True, indices=(5, 3))

    def tokens(start, stop):
        cut = {n: args[n][:, start:stop] for n in (*INPUTS[:5], "reads")}
        return args | cut

    whole_reads, whole_pool = run(backend, args)
    reads, pool = run(backend, tokens(0, T - steps))
    parts = [reads]
    for t in range(T - steps, T):
        reads, pool = run(backend, tokens(t, t + 1), state_pool=pool)
        parts.append(reads)
    torch.testing.assert_close((torch.cat(parts, 1), pool), (whole_reads, whole_pool))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_tokens_state_is_what_single_steps_leave(backend):
    args = pool_args(T=4, P=12, indices=(5, 3), outputs=((0, 1, 2, 5), (6, 7, 8, 9)), raw=True)
    reads, pool = run(backend, args)
    stepped = args["state_pool"]
    for t in range(4):
        cut = {n: None if args[n] is None else args[n][:, t : t + 1] for n in (*INPUTS[:5], "reads")}
        step, stepped = run(backend, args | cut, state_pool=stepped, output_state_indices=None)
        assert same_bits(step, reads[:, t : t + 1])
        assert same_bits(pool[args["output_state_indices"][:, t].long()], stepped[[5, 3]])
    assert same_bits(pool[3], args["state_pool"][3])  # the second row keeps its start


@pytest.mark.parametrize("backend", BACKENDS)
def test_pool_equals_scan(backend):
    args = scan_args(T=130, raw=True, mask=0.1)
    reads, final_state, _ = call("delta_scan_fwd", backend, args)
    pool = pool_args(T=130) | {n: x for n, x in args.items() if n in (*INPUTS[:5], "token_mask", *OPTIONS)}
    pool |= {n: args[n] for n in ("beta_bias", "lam_bias")} | {"state_pool": args["initial_state"]}
    got = run(backend, pool)
    assert same_bits(got[0], reads) and same_bits(got[1], final_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_pool_and_reads(backend):
    args = pool_args(T=9, B=3, indices=(5, 0, 2), raw=True)
    want = run(backend, args)
    pages = torch.full((7, 3, 2, 2, 8, 8), NAN)  # this layer's states inside a page of several layers
    pool = pages[:, 1].transpose(1, 2)[:, 0]
    pool.copy_(args["state_pool"])
    wide = torch.full((9, 3, 2, 11), NAN)
    reads = wide[..., :8].transpose(0, 1)
    call("delta_scan_with_state_pool", backend, args | {"state_pool": pool, "reads": reads})
    assert same_bits(reads, want[0]) and same_bits(pool, want[1])
    assert wide[..., 8:].isnan().all() and pages[:, 0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_thread_counts_and_batch_order(backend):
    args = pool_args(B=5, T=3, P=9, indices=(5, 0, 8, 2, 7))
    with threads(1):
        want = run(backend, args)
    with threads(5):
        got = run(backend, args)
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    order = torch.tensor((3, 1, 4, 0, 2))
    permuted = {n: args[n][order] for n in (*INPUTS[:4], "state_indices")}
    got = run(backend, args | permuted)
    assert same_bits(got[0], want[0][order]) and same_bits(got[1], want[1])
