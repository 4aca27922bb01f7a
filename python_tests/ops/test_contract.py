"""Every op against its contract: walks `all_specs()`, so that a new op is held to all of it.

Tolerance: the error against the reference in fp64 is at most twice that of plain torch in the same
dtype, as a root mean square (with the spread that so few numbers have), and nowhere four times
plain torch's worst. Where plain torch happens to be exact, one unit in the last place is allowed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekernels import ops
from moekernels.ops._library import raw
from python_tests.support.contract import (
    SPECS,
    agree,
    assert_same,
    each,
    each_spec,
    evaluate,
    hold,
    moe_layer,
    same_bits,
    spec_of,
    tensors,
)
from python_tests.support.products import ffn
from python_tests.support.spec import Case, OpSpec, randn

ROOT = Path(__file__).parents[2]


@each(private=True)
def test_values_and_gradients(spec, dtype, case):
    before = {n: v.clone() for n, v in case.inputs.items() if isinstance(v, Tensor)}
    ours = evaluate(spec.fn, spec, case.inputs)
    hold(spec, case.inputs, ours)
    for name, value in before.items():
        assert same_bits(case.inputs[name], value), f"{name} was written to"


@each(dtypes=(torch.bfloat16, torch.float32), private=True)
def test_twice_and_with_gaps(spec, dtype, case):
    """Two runs have the same bits, and so has a run on activations and gradients with gaps."""
    first = evaluate(spec.fn, spec, case.inputs)
    assert_same(first, evaluate(spec.fn, spec, case.inputs))
    assert_same(first, evaluate(spec.fn, spec, case.inputs, gaps=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_spec(lambda spec: spec.large is not None)
def test_threads(spec, dtype):
    """One thread and two give the same bits, at a size where two are used."""
    inputs = spec.large(dtype)
    torch.set_num_threads(1)
    one = evaluate(spec.fn, spec, inputs)
    torch.set_num_threads(2)
    assert_same(one, evaluate(spec.fn, spec, inputs))


@each(
    dtypes=(torch.float64,),
    spec_if=lambda spec: spec.differentiable,
    case_if=lambda case: case.gradcheck,
)
def test_gradcheck(spec, dtype, case):
    names = [n for n in spec.differentiable if case.inputs.get(n) is not None]
    values = [case.inputs[n].clone().requires_grad_() for n in names]

    def fn(*values):
        outputs = tensors(spec.fn(**{**case.inputs, **dict(zip(names, values))}))
        return tuple(t for t in outputs if t.is_floating_point())

    assert torch.autograd.gradcheck(fn, values, fast_mode=True)


class RawCalls(TorchDispatchMode):
    """Notes every call of a raw op."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moekernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def raw_calls(spec: OpSpec, case: Case) -> list:
    with RawCalls() as mode:
        evaluate(spec.fn, spec, case.inputs)
    assert mode.calls, "no kernel was called"
    return mode.calls


@each(dtypes=(torch.float32,), case_if=lambda case: case.again, private=True)
def test_opcheck(spec, dtype, case):
    """Schema and fake of every raw op, forward and backward; the compiled cases also traced."""
    checks = ["test_schema", "test_faketensor"]
    if case.compile:
        checks += ["test_aot_dispatch_dynamic"]
    seen = set()
    for op, args, kwargs in raw_calls(spec, case):
        if op not in seen:  # what runs inside an autograd.Function asks for no gradient
            args = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, args)
            torch.library.opcheck(op, args, kwargs, test_utils=checks)
        seen.add(op)


@each(dtypes=(torch.float32,), case_if=lambda case: case.compile)
def test_compile(spec, dtype, case):
    """One whole graph with dynamic shapes, forward and backward, and the bits of eager."""
    torch._dynamo.reset()
    compiled = torch.compile(spec.fn, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(evaluate(compiled, spec, case.inputs), evaluate(spec.fn, spec, case.inputs))


def test_inductor_compiles_a_whole_layer():
    torch._dynamo.reset()
    tokens, hidden, experts, ffn = 33, 16, 6, 24
    shapes = [
        (tokens, hidden),
        (hidden, experts),
        (experts, 2 * ffn, hidden),
        (experts, hidden, ffn),
    ]
    values = [randn(torch.float32, *shape, seed=i, scale=0.3) for i, shape in enumerate(shapes)]
    compiled = torch.compile(moe_layer, fullgraph=True)
    results = []
    for fn in (compiled, moe_layer):
        inputs = [v.clone().requires_grad_() for v in values]
        y, loss = fn(*inputs, 2)
        (y.square().sum() + loss).backward()
        results.append([y, loss, *(v.grad for v in inputs)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@each_spec(lambda spec: list(spec.messages()), private=True)
def test_messages(spec):
    for bad_call, text in spec.messages():
        with pytest.raises((RuntimeError, ValueError)) as caught:
            bad_call()
        assert str(caught.value) == text


@each(
    dtypes=(torch.bfloat16,),
    spec_if=lambda spec: spec.saved is not None and spec.differentiable,
)
def test_saved_for_backward(spec, dtype, case):
    """What autograd keeps, each storage counted once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = max(kept.get(t.data_ptr(), 0), t.numel() * t.element_size())
        return t

    inputs = dict(case.inputs)
    for name in spec.differentiable:
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = spec.fn(**inputs)
    assert sum(kept.values()) == spec.saved(inputs)
    del out


def test_every_public_op_has_a_spec():
    helpers = {"load_balancing_loss", "permute_weights", "release_memory"}
    functions = {name for name in ops.__all__ if name.islower()}
    assert {spec.name for spec in SPECS} == functions - helpers


LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")


def test_isa_is_the_one_asked_for():
    asked = os.environ.get("MOEKERNELS_ISA")
    assert raw._cpu_isa() in ((asked,) if asked else LEVELS)


@pytest.mark.skipif("MOEKERNELS_ISA" in os.environ, reason="runs inside the test of another level")
def test_right_results_agree_however_far_apart_and_a_wrong_element_does_not():
    """What the tests on a GPU ask of two machines: a fixed tolerance would raise false alarms."""
    spec, inputs = spec_of("experts"), ffn(torch.float16, 24, 40, 9, 2, 2)
    ours, plain = (evaluate(fn, spec, inputs) for fn in (spec.fn, spec.reference))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours[0][0], plain[0][0])
    agree(spec, inputs, ours, plain)
    for wrong in (ours[0][0], ours[1]["w1"]):
        right = wrong.clone()
        wrong.view(-1)[7] += 0.2 * wrong.abs().max()
        for one, other in ((ours, plain), (plain, ours)):
            with pytest.raises(AssertionError, match="of the error"):
                agree(spec, inputs, one, other)
        wrong.copy_(right)


@pytest.mark.parametrize("level", LEVELS)
def test_isa_level(level):
    """The kernels of each lower ISA level; above avx512 only the products in bf16 differ. AMX's run
    with tiles in memory (_C_amx), wherever there is avx512_bf16."""
    here = LEVELS.index(raw._cpu_isa())
    environment = {**os.environ, "MOEKERNELS_ISA": level}
    if level == "amx":
        library = ROOT / "moekernels" / "_C_amx.so"
        if not library.exists():
            pytest.skip("the build has no _C_amx, MOEKERNELS_EMULATED=1 makes it")
        if here < LEVELS.index("avx512_bf16"):
            pytest.skip(f"this machine's own level is {raw._cpu_isa()}")
        environment["MOEKERNELS_LIBRARY"] = str(library)
    elif LEVELS.index(level) >= here:
        pytest.skip(f"this machine's own level is {raw._cpu_isa()}")
    files = [f"python_tests/ops/test_{stem}.py" for stem in ("contract", "combine", "gate", "fuzz")]
    chosen = "threads or values and not float64"
    if level.startswith(("avx512", "amx")):
        chosen = f"({chosen}) and bfloat16 and (grouped_gemm or experts)"
    if level == "amx":
        files.append("python_tests/ops/test_grouped_gemm.py")
        chosen += " or every_row_count and bfloat16"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", f"isa_is or fuzz or {chosen}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
