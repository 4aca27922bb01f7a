"""How an op is held to its contract: its cases as parameters, one evaluation, comparisons.

Tolerance: the error against the reference in fp64 is at most twice that of plain torch in the same
dtype, as a root mean square (with the spread that so few numbers have), and nowhere four times
plain torch's worst. Where plain torch happens to be exact, one unit in the last place is allowed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels import ops
from python_tests.support.spec import OpSpec, all_specs, randn

SPECS, EVERY = all_specs(), all_specs(private=True)
ACTIVATIONS = {"x", "rows", "drows", "logits", "message", "weights", "ids"}


def each(*, dtypes=None, spec_if=lambda spec: True, case_if=lambda case: True, private=False):
    """Parametrises over (spec, dtype, case)."""
    params = [
        pytest.param(spec, dtype, case, id=f"{spec.name}-{str(dtype)[6:]}-{case.name}")
        for spec in (EVERY if private else SPECS)
        if spec_if(spec)
        for dtype in spec.dtypes
        if dtypes is None or dtype in dtypes
        for case in spec.cases(dtype)
        if case_if(case)
    ]
    return pytest.mark.parametrize("spec, dtype, case", params)


def each_spec(spec_if=lambda spec: True, *, private=False):
    chosen = [spec for spec in (EVERY if private else SPECS) if spec_if(spec)]
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
    if not a.numel():
        return True  # and no strides that a view of bytes could take
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


def hold(spec, inputs: dict, ours: tuple) -> None:
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


def agree(spec, inputs: dict, one: tuple, other: tuple) -> None:
    """Two machines' results of one source: alike where the op is exact; else both as close to fp64
    as the contract asks, since right results may lie further apart than any fixed tolerance."""
    if spec.exact:
        assert_same(one, other)
        return
    hold(spec, inputs, one)
    hold(spec, inputs, other)


def spec_of(name: str) -> OpSpec:
    return next(spec for spec in SPECS if spec.name == name)


def moe_layer(x, w_gate, w1, w2, top_k):
    gate = ops.gate(x @ w_gate, top_k, renormalize=True)
    routing = ops.route(gate.ids, w_gate.shape[1])
    weights = ops.permute_weights(gate.weights, routing)
    rows = ops.experts(
        x, weights, w1, w2, routing.offsets, token_of=routing.token_of, row_of=routing.row_of
    )
    loss = ops.load_balancing_loss(gate.score_sum, gate.counts, top_k)
    return ops.combine(rows, routing.row_of, routing.token_of), loss
