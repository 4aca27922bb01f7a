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
from moekernels.ops._spec import Case, OpSpec, all_specs, randn

ROOT = Path(__file__).parents[1]
SPECS = all_specs()
ACTIVATIONS = {"x", "rows", "drows", "logits", "message", "weights", "ids"}


def each(*, dtypes=None, spec_if=lambda spec: True, case_if=lambda case: True):
    """Parametrises over (spec, dtype, case)."""
    params = [
        pytest.param(spec, dtype, case, id=f"{spec.name}-{str(dtype)[6:]}-{case.name}")
        for spec in SPECS
        if spec_if(spec)
        for dtype in spec.dtypes
        if dtypes is None or dtype in dtypes
        for case in spec.cases(dtype)
        if case_if(case)
    ]
    return pytest.mark.parametrize("spec, dtype, case", params)


def each_spec(spec_if=lambda spec: True):
    chosen = [spec for spec in SPECS if spec_if(spec)]
    return pytest.mark.parametrize("spec", chosen, ids=lambda spec: spec.name)


def tensors(out) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for t in out if t is not None]


def lift(inputs: dict) -> dict:
    """All floating inputs in fp64."""
    return {
        name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in inputs.items()
    }


def strided(t: Tensor) -> Tensor:
    """The same values with gaps between them."""
    apart = t.new_zeros(*t.shape, 2)
    apart[..., 0] = t
    return apart[..., 0]


def copy_of(t: Tensor) -> Tensor:
    """A copy; of a contiguous tensor one that begins at the same place within 16 bytes."""
    if not t.is_contiguous():
        return t.clone()
    off = t.data_ptr() % 16 // t.element_size()
    return t.new_empty(t.numel() + off)[off:].view(t.shape).copy_(t)


def evaluate(fn, spec: OpSpec, inputs: dict, *, gaps: bool = False):
    """(outputs, gradients by input name), with fixed cotangents; `gaps`: nothing is contiguous."""
    inputs = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        value = copy_of(value)
        if gaps and name in ACTIVATIONS:
            value = strided(value)
        if name in spec.differentiable:
            value.requires_grad_()
        inputs[name] = value
    wanted = [n for n in spec.differentiable if inputs.get(n) is not None]
    outputs = tensors(fn(**inputs))
    roots = [t for t in outputs if t.requires_grad]
    gradients = {}
    if roots:
        cotangents = [randn(torch.float32, *t.shape, seed=7).to(t.dtype) for t in roots]
        cotangents = [c.to(t.device, non_blocking=True) for c, t in zip(cotangents, roots)]
        if gaps:
            cotangents = [strided(c) for c in cotangents]
        leaves = [inputs[n] for n in wanted]
        found = torch.autograd.grad(roots, leaves, cotangents, allow_unused=True)
        gradients = dict(zip(wanted, found))
    return [t.detach() for t in outputs], gradients


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same(first, second) -> None:
    for a, b in zip(first[0], second[0], strict=True):
        assert same_bits(a, b)
    for name, a in first[1].items():
        b = second[1][name]
        assert a is None and b is None or same_bits(a, b), name


def assert_close(label: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    assert ours.shape == plain.shape, label
    assert ours.dtype == plain.dtype, label
    if not ours.is_floating_point():
        assert torch.equal(ours, exact), label
        return
    if ours.numel() == 0:
        return
    unit = torch.finfo(ours.dtype).eps
    if ours.dtype == torch.float64:
        unit *= 16  # plain torch in fp64 is the reference itself
    # Errors grow with the elements: where a few outweigh the rest, so few decide the mean, and luck
    # weighs more (seen on another processor, where one of 35 held two thirds of the squares).
    squares = exact.double().square()
    count = float(squares.sum().square() / squares.square().sum()) if squares.any() else 1.0
    spread = 1 + 4 / (count if count > 0 else ours.numel()) ** 0.5

    def rms(t: Tensor) -> float:
        return t.double().square().mean().sqrt().item()

    def worst(t: Tensor) -> float:
        return t.double().abs().max().item()

    # The floor beside torch's own luck: one unit in the last place, and for the worst element as
    # many as an op has steps that each may round by one (product, activation, product, sum).
    for measure, factor, units in (rms, 2 * spread, spread), (worst, 4, 4):
        error, torchs = measure(ours.double() - exact), measure(plain.double() - exact)
        allowed = max(factor * torchs, units * unit * measure(exact), 1e-13)
        text = f"{label}: {measure.__name__} of the error {error:.3g}, plain torch {torchs:.3g}"
        assert error <= allowed, text


def hold(spec: OpSpec, inputs: dict, ours: tuple) -> None:
    """Holds what `evaluate` gave to the reference: outputs and gradients."""
    plain = evaluate(spec.reference, spec, inputs)
    if spec.exact:
        assert_same(ours, plain)
        return
    exact = evaluate(spec.reference, spec, lift(inputs))
    for i, (a, b, c) in enumerate(zip(ours[0], plain[0], exact[0], strict=True)):
        assert_close(f"output {i}", a, b, c)
    for name, gradient in ours[1].items():
        if gradient is None:
            assert plain[1].get(name) is None, name
            continue
        zero = torch.zeros_like(gradient)
        others = plain[1].get(name), exact[1].get(name)
        assert_close(f"d{name}", gradient, *(zero if o is None else o for o in others))


@each()
def test_values_and_gradients(spec, dtype, case):
    before = {n: v.clone() for n, v in case.inputs.items() if isinstance(v, Tensor)}
    ours = evaluate(spec.fn, spec, case.inputs)
    hold(spec, case.inputs, ours)
    for name, value in before.items():
        assert same_bits(case.inputs[name], value), f"{name} was written to"


@each(dtypes=(torch.bfloat16, torch.float32))
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


@each(dtypes=(torch.float32,))
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


def moe_layer(x, w_gate, w1, w2, top_k):
    gate = ops.gate(x @ w_gate, top_k, renormalize=True)
    routing = ops.route(gate.ids, w_gate.shape[1])
    weights = ops.permute_weights(gate.weights, routing)
    rows = ops.experts(
        x, weights, w1, w2, routing.offsets, token_of=routing.token_of, row_of=routing.row_of
    )
    loss = ops.load_balancing_loss(gate.score_sum, gate.counts, top_k)
    return ops.combine(rows, routing.row_of, routing.token_of), loss


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


@each_spec(lambda spec: list(spec.messages()))
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
    helpers = {"load_balancing_loss", "permute_weights"}  # plain torch, and a view of permute
    functions = {name for name in ops.__all__ if name.islower()}
    assert {spec.name for spec in SPECS} == functions - helpers


LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")


def test_isa_is_the_one_asked_for():
    asked = os.environ.get("MOEKERNELS_ISA")
    assert raw._cpu_isa() in ((asked,) if asked else LEVELS)


@pytest.mark.skipif("MOEKERNELS_ISA" in os.environ, reason="runs inside the test of another level")
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_isa_level(level):
    """The kernels of each lower ISA level; above avx512 only the products in bf16 differ."""
    if LEVELS.index(level) >= LEVELS.index(raw._cpu_isa()):
        pytest.skip(f"this machine's own level is {raw._cpu_isa()}")
    files = [f"python_tests/test_{stem}.py" for stem in ("contract", "combine", "gate")]
    chosen = "threads or values and not float64"
    if level.startswith("avx512"):
        chosen = f"({chosen}) and bfloat16 and (grouped_gemm or experts)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", f"isa_is or {chosen}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "MOEKERNELS_ISA": level},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
