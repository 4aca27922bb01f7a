"""`torch.compile` in training: one graph serves any number of tokens, for every op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moekernels import ops
from python_tests.support.contract import each_spec, moe_layer, tensors

SIZES = (33, 7, 12, 50, 64, 100, 21, 5, 80, 17)  # more than torch recompiles for


def sized_inputs(spec, tokens: int) -> dict:
    inputs = spec.sized(tokens)
    for name in spec.differentiable:
        if inputs.get(name) is not None:
            inputs[name].requires_grad_()
    return inputs


def varying(one: dict, other: dict) -> dict[str, list[int]]:
    """The dimensions of each tensor that differ from size to size."""
    return {
        name: [i for i in range(value.dim()) if value.shape[i] != other[name].shape[i]]
        for name, value in one.items()
        if isinstance(value, Tensor)
    }


def graphs(fn, inputs_of, *, marked: bool) -> int:
    """How many graphs all SIZES take, forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    dynamic = varying(inputs_of(SIZES[0]), inputs_of(SIZES[1]))
    for tokens in SIZES:
        inputs = inputs_of(tokens)
        if marked:
            for name, dimensions in dynamic.items():
                torch._dynamo.mark_dynamic(inputs[name], dimensions)
        roots = [t.sum() for t in tensors(compiled(**inputs)) if t.requires_grad]
        if roots:
            sum(roots).backward()
    return counter.frame_count


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
@each_spec()
def test_graphs_of_ten_sizes(spec, marked):
    """The first size, and one for all others: or at once for all, where it is said."""
    few = graphs(spec.fn, lambda tokens: sized_inputs(spec, tokens), marked=marked)
    # An int that differs (capacity) is no tensor to mark.
    varies = any(
        spec.sized(7)[name] != value
        for name, value in spec.sized(12).items()
        if isinstance(value, int)
    )
    assert few <= (1 if marked and not varies else 2)


def test_graphs_of_a_layer():
    shapes = {"w_gate": (16, 6), "w1": (6, 48, 16), "w2": (6, 16, 24)}
    weights = {n: torch.randn(shape).requires_grad_() for n, shape in shapes.items()}

    def inputs_of(tokens: int) -> dict:
        return {"x": torch.randn(tokens, 16).requires_grad_(), "top_k": 2, **weights}

    assert graphs(moe_layer, inputs_of, marked=False) <= 2


def main_grad_of_a_layer(fn, inputs: list[str] | None) -> list[Tensor]:
    w1 = torch.ones(2, 6, 4).requires_grad_()
    w2 = torch.ones(2, 4, 3).requires_grad_()
    b1 = torch.ones(2, 6).requires_grad_()
    leaves = {"w1": w1, "w2": w2, "b1": b1, "x": torch.ones(6, 4).requires_grad_()}
    for w in (w1, w2, b1):
        w.main_grad = torch.zeros(w.shape)
    y = fn(leaves["x"], None, w1, w2, torch.tensor([0, 2, 6]), b1=b1).square().sum()
    y.backward(inputs=None if inputs is None else [leaves[name] for name in inputs])
    assert all(w.grad is None for w in (w1, w2, b1))
    return [w.main_grad for w in (w1, w2, b1)]


@pytest.mark.parametrize("inputs", [None, ["x"], ["w1"], ["x", "b1"]], ids=str)
def test_main_grad_of_what_a_compiled_backward_reaches(inputs):
    torch._dynamo.reset()
    compiled = torch.compile(ops.experts, fullgraph=True, backend="aot_eager")
    got, wanted = (main_grad_of_a_layer(fn, inputs) for fn in (compiled, ops.experts))
    for a, b, name in zip(got, wanted, ("w1", "w2", "b1")):
        assert torch.equal(a, b)
        assert a.any() == (inputs is None or name in inputs)
