"""Each word of csrc/cuda/ptx.cuh against numpy, to the bit, emulated and on a device: so both agree to the bit, too.

Where a device rounds in a way of its own (ex2.approx, rcp.approx, the sums of a tensor core) a bound stands instead.
"""

import re
from pathlib import Path

import emulated
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
NAN16 = 0x7FFF  # the NaN that conversions make


@pytest.fixture(params=["order", "random:1", "priority:1", pytest.param("device", marks=pytest.mark.gpu)])
def run(request, monkeypatch):
    """run(name, rows, threads): what the probe of a word makes of uint32 rows, one per thread."""
    on_device = request.param == "device"
    if not on_device:
        monkeypatch.setenv("DELTAMEM_EMULATION_SCHEDULE", request.param)
    probe = emulated.load("_probe", "_probe", ROOT / "build" / "gpu" if on_device else emulated.FOLDER)
    if probe is None:
        pytest.skip("needs make emulated, or make gpu")
    assert probe.emulated == (not on_device)

    def call(name, rows, threads=32):
        device = "cuda" if on_device else "cpu"
        rows = np.ascontiguousarray(rows, dtype=np.uint32)
        given = torch.from_numpy(rows.view(np.int32)).to(device)
        out = torch.full((len(rows), probe.words()[name][1]), -1, dtype=torch.int32, device=device)
        memory = torch.zeros(1 << 16, dtype=torch.int32, device=device)
        torch.cuda.synchronize() if on_device else None
        probe.run(name, given, out, memory, threads)
        torch.cuda.synchronize() if on_device else None
        return out.cpu().numpy().view(np.uint32)

    return call


def random_words(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)


def floats(words):
    return np.ascontiguousarray(words, dtype=np.uint32).view(np.float32)


def words(x):
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


# ---- numbers -------------------------------------------------------------------------------------------------

ALL16 = np.arange(1 << 16, dtype=np.uint32)[:, None]


def bf16_bits(x):
    """fp32 bits to bf16 bits, to nearest even."""
    wide = x.astype(np.uint64)
    rounded = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint32)
    return np.where(np.isnan(floats(x)), NAN16, rounded)


def f16_bits(x):
    with np.errstate(over="ignore"):
        rounded = floats(x).astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.where(np.isnan(floats(x)), NAN16, rounded)


def around(halves_as_fp32):
    """fp32 bits at, just off and half way between neighbouring 16-bit numbers, and others."""
    near = [halves_as_fp32 + np.uint32(i) for i in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    return np.concatenate([*near, random_words(1 << 16, 1)])


def f16_as_fp32(bits):
    return words(bits.astype(np.uint16).view(np.float16).astype(np.float32))


def test_bf16_to_float(run):
    assert np.array_equal(run("to_float<bf16>", ALL16, 256), ALL16 << 16)


def test_f16_to_float(run):
    got, want = run("to_float<f16>", ALL16, 256), f16_as_fp32(ALL16)
    number = ~np.isnan(floats(want))
    assert np.array_equal(got[number], want[number]) and np.isnan(floats(got)[~number]).all()


@pytest.mark.parametrize("name, bits", [("bf16", bf16_bits), ("f16", f16_bits)])
def test_from_float(run, name, bits):
    x = around(ALL16 << 16 if name == "bf16" else f16_as_fp32(ALL16))
    assert np.array_equal(run(f"from_float<{name}>", x, 256), bits(x))
    pairs = np.concatenate([x, x[::-1]], 1)
    assert np.array_equal(run(f"pack<{name}>", pairs, 256)[:, 0], bits(pairs[:, 0]) | bits(pairs[:, 1]) << 16)


def test_exp2(run):
    x = np.concatenate([np.linspace(-125.9, 127.9, 1 << 14), np.linspace(-1, 1, 1 << 14)]).astype(np.float32)
    got = floats(run("exp2", words(x)[:, None], 256))[:, 0]
    assert (np.abs(got / np.exp2(x.astype(np.float64)) - 1) <= 2.0**-22).all()
    special = np.float32([-np.inf, -1e30, -126.5, -150, 0, 1e-40, np.inf, 128, np.nan] + [0] * 23)
    got = floats(run("exp2", words(special)[:, None]))[:, 0]
    assert np.array_equal(got[:9], [0, 0, 0, 0, 1, 1, np.inf, np.inf, np.nan], equal_nan=True)


def test_reciprocal(run):
    x = floats((random_words(1 << 14, 1) % (252 << 23)) + (1 << 23))  # 1 / x is normal, too
    x = np.concatenate([x, -x])
    got = floats(run("reciprocal", words(x), 256))
    assert (np.abs(got.astype(np.float64) * x - 1) <= 2.0**-22.9).all()
    special = np.float32([np.inf, -np.inf, 0, np.nan] * 8)[:, None]
    got = floats(run("reciprocal", words(special)))
    assert np.array_equal(got, np.float32([0, 0, np.inf, np.nan] * 8)[:, None], equal_nan=True)


def test_first_bit(run):
    bits = np.arange(32, dtype=np.uint32)[:, None]
    assert np.array_equal(run("first_bit", np.uint32(0xA5A5A5A5) << bits | np.uint32(1) << bits), bits)


# ---- threads -------------------------------------------------------------------------------------------------


def test_place(run):
    got = run("place", np.zeros((3 * 96, 0)), 96)
    i = np.arange(3 * 96)
    assert np.array_equal(got, np.stack([i % 96, i % 32, i % 96 // 32, i // 96, np.full_like(i, 3)], 1))


@pytest.mark.parametrize("name, group", [("sync_block", 128), ("sync_warp", 32), ("sync_named", 64)])
def test_barriers(run, name, group):
    x = random_words(5 * 128, 2)
    want = np.roll(x.reshape(-1, group, 2), -5, axis=1).reshape(-1, 2)
    assert np.array_equal(run(name, x, 128), want)


def test_shuffles(run):
    x = random_words(64 * 64, 2)
    lane, bits = np.arange(len(x)) % 32, (x[:, 1] & 31).astype(int)
    sources = {
        "shfl": bits,
        "shfl_xor": lane ^ bits,
        "shfl_up": np.where(lane >= bits, lane - bits, lane),
    }
    for name, source in sources.items():
        for limit in (32, 1 << 20):  # the five lowest bits count
            rows = np.stack([x[:, 0], x[:, 1] % limit], 1)
            want = np.take_along_axis(x[:, 0].reshape(-1, 32), source.reshape(-1, 32), 1).reshape(-1, 1)
            assert np.array_equal(run(name, rows, 64), want), name


def test_ballot(run):
    votes = random_words(256, 1) & 1
    want = (votes.reshape(-1, 32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
    assert np.array_equal(run("ballot", votes * 5, 64)[:, 0], np.repeat(want, 32))


# ---- memory --------------------------------------------------------------------------------------------------


def test_atomics(run):
    ones = np.ones((4 * 64, 1))
    assert np.array_equal(np.sort(run("atomic_add", 3 * ones, 64)[:, 0]), 3 * np.arange(256))
    assert np.array_equal(np.sort(run("atomic_inc", 9 * ones, 64)[:, 0]), np.sort(np.arange(256) % 10))


def test_fence(run):
    """One block comes last, and sees what all have stored."""
    x = random_words(7 * 64, 1) % 1000
    got = run("fence", x, 64).reshape(7, 64, 2)
    last = got.any((1, 2))
    assert last.sum() == 1
    assert np.array_equal(got[last][0], np.repeat(x.reshape(7, 64).sum(0)[:, None], 2, 1))


def test_prefetch(run):
    x = random_words(64, 1)
    assert np.array_equal(run("prefetch", x), x)


def test_shared_memory(run):
    """Addresses are in bytes; an array starts at a multiple of 1024."""
    got = run("shared_memory", np.zeros((128, 0)), 128)
    assert np.array_equal(got, np.stack([16 * np.arange(128), np.zeros(128)], 1))


def test_cp_async(run):
    x = random_words(4 * 96, 12)
    x[:, 8:] &= 1
    want = x[:, :8] * np.repeat(x[:, 8:10], 4, 1)
    assert np.array_equal(run("cp_async", x, 96), want)


def test_dependent_launch(run):
    x = random_words(6 * 64, 1)
    assert np.array_equal(run("dependent_launch", x, 64), x)


# ---- matrices ------------------------------------------------------------------------------------------------

G, C = np.arange(32) // 4, 2 * (np.arange(32) % 4)


def split(x):
    """[..., n] words to [..., 2 n] numbers of 16 bits, the lower first."""
    return np.ascontiguousarray(x, dtype=np.uint32).view(np.uint16)


def join(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def test_ldmatrix(run):
    x = random_words(3 * 64, 4)
    matrices = split(x).reshape(-1, 4, 8, 8)  # [warp, matrix, row, column]
    want = join(matrices[:, :, G, C], matrices[:, :, G, C + 1]).transpose(0, 2, 1).reshape(-1, 4)
    assert np.array_equal(run("ldmatrix", x, 64), want)
    want = join(matrices[:, :, C, G], matrices[:, :, C + 1, G]).transpose(0, 2, 1).reshape(-1, 4)
    assert np.array_equal(run("ldmatrix_transposed", x, 64), want)


def test_movmatrix(run):
    x = random_words(3 * 64, 1)
    matrices = split(x).reshape(-1, 8, 8)
    want = join(matrices[:, C, G], matrices[:, C + 1, G]).reshape(-1, 1)
    assert np.array_equal(run("movmatrix", x, 64), want)


def fragments(a, b, d):
    """[16, 16], [16, 8] as bits, [16, 8] as fp32: the rows of a warp."""
    pairs = [a[G, C], a[G, C + 1], a[G + 8, C], a[G + 8, C + 1]]
    pairs += [a[G, C + 8], a[G, C + 9], a[G + 8, C + 8], a[G + 8, C + 9]]
    pairs += [b[C, G], b[C + 1, G], b[C + 8, G], b[C + 9, G]]
    sums = [words(d[G, C]), words(d[G, C + 1]), words(d[G + 8, C]), words(d[G + 8, C + 1])]
    return np.stack(sums + [join(low, high) for low, high in zip(pairs[::2], pairs[1::2], strict=True)], 1)


def products(run, name, a, b, d):
    """d + a b as the device sums it, over warps."""
    bits = bf16_bits if name == "bf16" else f16_bits
    rows = [fragments(*(bits(words(x)) for x in (a[i], b[i])), d[i]) for i in range(len(a))]
    got = floats(run(f"mma<{name}>", np.concatenate(rows), 64)).reshape(-1, 32, 4)
    result = np.empty_like(d)
    result[:, G, C], result[:, G, C + 1] = got[:, :, 0], got[:, :, 1]
    result[:, G + 8, C], result[:, G + 8, C + 1] = got[:, :, 2], got[:, :, 3]
    return result


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_mma_of_whole_numbers(run, name):
    """Every sum is a number of fp32, whatever the order: layout and bits."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-64, 65, (6, 16, 16)), rng.integers(-64, 65, (6, 16, 8))
    d = rng.integers(-(2**20), 2**20, (6, 16, 8)).astype(np.float32)
    got = products(run, name, a.astype(np.float32), b.astype(np.float32), d)
    assert np.array_equal(words(got), words((d + a @ b).astype(np.float32)))


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_mma_bound(run, name):
    """Of sums that round: 16 units of fp32 at the sum of magnitudes, since a tensor core may cut each term."""
    rng = np.random.default_rng(1)
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    a, b = (
        torch.from_numpy(rng.standard_normal((64, 16, n)).astype(np.float32)).to(dtype).float().numpy() for n in (16, 8)
    )
    d = rng.standard_normal((64, 16, 8)).astype(np.float32)
    want = d + a.astype(np.float64) @ b.astype(np.float64)
    magnitude = np.abs(d) + np.abs(a).astype(np.float64) @ np.abs(b)
    assert (np.abs(products(run, name, a, b, d) - want) <= 16 * 2.0**-24 * magnitude).all()


# ---- coverage ------------------------------------------------------------------------------------------------


def test_every_word_has_a_probe():
    device_form = (ROOT / "csrc" / "cuda" / "ptx.cuh").read_text().split("#else\n#include")[0]
    names = set(re.findall(r"^DELTAMEM_DEVICE [\w ]+[ *&](\w+)(?:<\w+>)?\(", device_form, re.MULTILINE))
    probed = (ROOT / "tests" / "emulation" / "probe.cu").read_text()
    assert len(names) > 30
    assert {name for name in names if not re.search(rf"ptx::{name}\b", probed)} == set()
