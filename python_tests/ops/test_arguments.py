"""Arguments that are no tensors, and tensors that hold no data, through every op."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from moekernels import ops
from python_tests.support.contract import each, each_spec, evaluate, tensors
from python_tests.support.spec import randn


@pytest.mark.parametrize("kind", ["list", "ndarray", "str"])
@each_spec()
def test_an_argument_that_is_no_tensor_is_named(spec, kind):
    case = next(c for c in spec.cases(torch.float32) if c.inputs.get("weights", 0) is not None)
    given = {n: v for n, v in case.inputs.items() if isinstance(v, Tensor)}
    for name, value in given.items():
        wrong = {"list": value.tolist(), "ndarray": value.numpy(), "str": "x"}[kind]
        with pytest.raises(TypeError) as caught:
            spec.fn(**{**case.inputs, name: wrong})
        assert re.fullmatch(
            rf"{spec.name}: {name} must be a tensor( or None)?, got {kind}; "
            "torch.as_tensor makes one",
            str(caught.value),
        )


def test_numbers_and_names_of_a_wrong_kind_are_named():
    ids, x = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 4)
    for bad_call, text in (
        (lambda: ops.route(ids, "4"), "route: num_experts must be an int, got str"),
        (lambda: ops.route(ids, 4.0), "route: num_experts must be an int, got float"),
        (lambda: ops.gate(x, None), "gate: top_k must be an int, got NoneType"),
        (lambda: ops.gate(x, 2, scale="1"), "gate: scale must be a number, got str"),
        (
            lambda: ops.load_balancing_loss([1.0], x, 2),
            "load_balancing_loss: score_sum must be a tensor, got list; torch.as_tensor makes one",
        ),
    ):
        with pytest.raises(TypeError) as caught:
            bad_call()
        assert str(caught.value) == text


@each(dtypes=(torch.bfloat16,))
def test_meta_tensors(spec, dtype, case):
    """Shapes and dtypes of outputs and gradients, with no data anywhere."""
    real = evaluate(spec.fn, spec, case.inputs)
    on_meta = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in case.inputs.items()}
    leaves = {n: on_meta[n] for n in spec.differentiable if on_meta.get(n) is not None}
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = tensors(spec.fn(**on_meta))
    roots = [t for t in outputs if t.requires_grad]
    found = []
    if roots:
        cotangents = [randn(t.dtype, *t.shape).to("meta") for t in roots]
        found = torch.autograd.grad(roots, list(leaves.values()), cotangents, allow_unused=True)
    for a, b in zip([*outputs, *found], [*real[0], *real[1].values()], strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)
