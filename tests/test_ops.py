"""The op boundary: schemas and fakes tell the truth, compilers see through it, kernels do their own work."""

import subprocess
import sys

import calls
import pytest
import torch
from kernel_checks import CUDA, TRITON
from torch.utils._python_dispatch import TorchDispatchMode

import deltamem_kernels as dk
from deltamem_kernels import ops, plans

BACKENDS = ["reference", "cpu", CUDA, TRITON]
SCAN, POOL, FUSED, CACHE, OUTPUT = calls.FUNCTIONS


def long_cache_call(dtype=None):
    """More new tokens than one decode call takes: the chain of three ops."""
    return calls.fused_delta_attention_with_kvcache(dtype, tokens=20)


def output_into(dtype=None):
    function, arguments = calls.delta_output(dtype)
    return function, arguments | {"out": torch.empty_like(arguments["attn_proj"])}


MAKERS = [*calls.FUNCTIONS, long_cache_call, output_into]


class Record(TorchDispatchMode):
    """Keeps the deltamem ops that run, with copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "deltamem":
            self.seen.append((func, [x.clone() if isinstance(x, torch.Tensor) else x for x in args]))
        return func(*args, **(kwargs or {}))


def recorded(make, backend):
    function, arguments = make()
    trains = function in (dk.delta_scan, dk.fused_delta_attention) or make is OUTPUT
    if trains:
        for x in arguments.values():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.requires_grad_()
    with Record() as record:
        results = function(**arguments, backend=backend)
        if trains:
            results = results if isinstance(results, tuple) else (results,)
            sum(x.sum() for x in results if x.requires_grad).backward()
    return record.seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", MAKERS)
def test_opcheck(make, backend):
    """Schema, fakes and mutation of every op that the call runs, forward and backward."""
    seen = recorded(make, backend)
    assert seen
    for op, args in seen:
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(op, tuple(args))


ALLOWED = (
    "empty new_empty empty_like empty_strided new_empty_strided detach view slice select as_strided unsqueeze squeeze "
    "expand t transpose permute alias"
).split()


class Forbid(TorchDispatchMode):
    """Lets a kernel allocate and view, and nothing else."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and func._schema.name.removeprefix("aten::") not in ALLOWED:
            raise AssertionError(f"a kernel called {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("make", MAKERS)
def test_kernels_do_their_own_work(make, backend):
    # filling fresh memory with NaN would itself be an op
    torch.utils.deterministic.fill_uninitialized_memory = False
    for op, args in recorded(make, backend):
        with Forbid():
            op(*args)


@pytest.fixture
def fresh_compiler():
    """A function is compiled anew for each backend, and torch counts that."""
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", MAKERS)
def test_compile_fullgraph(make, backend):
    function, arguments = make()
    other = calls.clone(arguments)
    results = function(**arguments, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(**other, backend=backend)
    for want, got in zip(_tuple(results), _tuple(compiled), strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(other[name], x, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [SCAN, FUSED, OUTPUT])
def test_compile_backward(make, backend):
    grads = []
    for compiles in (False, True):
        torch.manual_seed(1)
        function, arguments = make()
        leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for x in leaves:
            x.requires_grad_()
        run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiles else function
        results = _tuple(run(**arguments, backend=backend))
        sum(x.square().sum() for x in results if x.requires_grad).backward()
        grads.append([x.grad for x in leaves])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def _tuple(results):
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", MAKERS)
def test_explain_names_the_ops_that_run(make, backend, capsys):
    function, arguments = make()
    dk.explain(function, **arguments, backend=backend)
    told = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  deltamem::")]
    with Record() as record:
        function(**arguments, backend=backend)
    ran = [f"{op._schema.name}.{op._overloadname}" for op, _ in record.seen]
    assert told == ran


def test_explain_gives_a_reason_for_each_other_backend(capsys):
    function, arguments = FUSED()
    dk.explain(function, **arguments, backend="reference")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fused_delta_attention on cpu, float32, R = 4:"
    assert "  not cpu: would run it; backend='reference' was asked for" in lines
    assert any(line.startswith("  not cuda: ") for line in lines)
    with pytest.raises(ValueError, match=r"^explain: function must be one of delta_scan, .*, got sum$"):
        dk.explain(sum)


@pytest.mark.parametrize("make", calls.FUNCTIONS)
def test_direct_launch_equals_the_op(make):
    """The second call of a signature skips validation and dispatcher; its bits are the same."""
    function, arguments = make()
    first, second, third = (calls.clone(arguments) for _ in range(3))
    with torch.no_grad():
        a = function(**first)
        b = function(**second)
        with Record() as record:
            c = function(**third)
    assert record.seen
    for x, y, z in zip(_tuple(a), _tuple(b), _tuple(c), strict=True):
        if x is not None:
            assert torch.equal(x, y) and torch.equal(x, z)


def test_a_plan_serves_only_its_own_signature():
    """A call that differs in any one tensor's metadata from a remembered one is checked anew."""
    function, arguments = FUSED()
    function(**arguments)
    for name in ("mem_k", "delta_q", "rotary_sin", "v"):
        x = arguments[name]
        with pytest.raises(TypeError):
            function(**arguments | {name: x.int()})
        with pytest.raises(ValueError):
            function(**arguments | {name: x[..., :-1]})
    with pytest.raises(ValueError):
        function(**arguments | {"softcap": -1.0})


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(plans, "_MOST_PLANS", 3)
    for tokens in range(1, 9):
        x = torch.randn(1, tokens, 1, 4)
        dk.delta_scan(x, x, x, x)
    assert len(plans._plans) <= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_op_of_a_chain_has_a_launcher(backend):
    assert {op for op in ops.SCHEMAS if backend in ops.JOINED.get(op, ops.ROOMS)} == ops.LAUNCHERS[backend].keys()
    for op in ops.LAUNCHERS[backend]:
        assert str(ops.handle(op, backend)) == f"deltamem.{op}.{backend}"


COLD = """
import os, sys
import torch
for name in [n for n in sys.modules if n.split(".")[0] == "triton"]:
    del sys.modules[name]
sys.modules["triton"] = sys.modules["deltamem_kernels._cpu"] = None  # importing either fails
before = set(os.listdir("."))
import deltamem_kernels as dk
x = torch.randn(1, 3, 1, 4)
assert dk.delta_scan(x, x, x, x).reads.shape == (1, 3, 1, 4)
try:
    dk.delta_scan(x, x, x, x, backend="cpu")
except RuntimeError as error:
    assert "backend 'cpu' must be installed, got no native module" in str(error), error
else:
    raise SystemExit("cpu ran without its module")
assert set(os.listdir(".")) == before
assert sys.modules["triton"] is None
"""


def test_cold_import_without_triton_and_native_module(tmp_path):
    """The package imports, prints nothing, writes nothing, and serves the reference."""
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


OLD_TRITON = """
import sys
import torch
for name in [n for n in sys.modules if n.split(".")[0] == "triton"]:
    del sys.modules[name]
sys.path.insert(0, ".")
import deltamem_kernels as dk
x = torch.randn(1, 3, 1, 4)
try:
    dk.delta_scan(x, x, x, x, backend="triton")
except RuntimeError as error:
    print(error, end="")
assert "triton" not in sys.modules
"""


@pytest.mark.parametrize("version", ("3.5.1", "2.10.0+git0123"))
def test_a_triton_too_old(version, tmp_path):
    """Refused by its version, read and not imported."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f"__version__ = '{version}'\nraise SystemExit('imported')\n")
    done = subprocess.run([sys.executable, "-c", OLD_TRITON], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == (
        f"delta_scan: backend 'triton' must be installed, got Triton {version} (pip install 'triton>=3.6'); "
        "backend='reference' does it"
    )


def test_import_is_light():
    """Importing the package loads no kernel module and no Triton."""
    code = (
        "import sys, torch; before = set(sys.modules); import deltamem_kernels; new = set(sys.modules) - before; "
        "heavy = ('triton', 'sympy', 'deltamem_kernels.native.', 'deltamem_kernels.reference.'); "
        "assert not [n for n in new if n.startswith(heavy)]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
