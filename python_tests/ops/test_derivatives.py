"""Derivatives beside the ordinary gradient: right, or refused by an error that names the op.

Walks every OpSpec: second derivatives, forward mode, `torch.func`, and main gradients of a backward
that leaves the weight out.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from moekernels import ops
from python_tests.support.contract import SPECS, each, each_spec, tensors
from python_tests.support.spec import OpSpec, randn

DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]


# Routings that add nothing to those that remain.
PASSED_OVER = ("odd", "one_token", "all_to_one", "k_is_e", "capacity", "all_dropped")


def leaves_of(spec: OpSpec, inputs: dict) -> dict[str, Tensor]:
    names = [n for n in spec.differentiable if inputs.get(n) is not None]
    return {n: inputs[n].clone().requires_grad_() for n in names}


def floating(out) -> list[Tensor]:
    return [t for t in tensors(out) if t.is_floating_point()]


def twice(fn, spec: OpSpec, inputs: dict) -> dict[str, Tensor]:
    """The gradients of one number made of all gradients, cotangents included."""
    leaves = leaves_of(spec, inputs)
    outputs = [t for t in floating(fn(**{**inputs, **leaves})) if t.requires_grad]
    if not outputs:
        return {}
    for i, t in enumerate(outputs):
        leaves[f"cotangent {i}"] = randn(t.dtype, *t.shape, seed=7 + i).requires_grad_()
    cotangents = [leaves[f"cotangent {i}"] for i in range(len(outputs))]
    first = torch.autograd.grad(
        outputs,
        [v for n, v in leaves.items() if n in spec.differentiable],
        cotangents,
        create_graph=True,
        allow_unused=True,
    )
    number = sum((randn(g.dtype, *g.shape, seed=3) * g).sum() for g in first if g is not None)
    if not isinstance(number, Tensor):
        return {}
    found = torch.autograd.grad(number, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(leaves.items(), found)}


def assert_alike(got: dict, wanted: dict) -> None:
    for name in {*got, *wanted}:
        like = got.get(name, wanted.get(name))
        pair = [values.get(name, torch.zeros_like(like)) for values in (got, wanted)]
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-11)


@each(
    dtypes=(torch.float64,),
    spec_if=lambda spec: spec.differentiable,
    case_if=lambda case: case.gradcheck and not case.name.startswith(PASSED_OVER),
)
def test_second_derivatives(spec, dtype, case):
    assert_alike(twice(spec.fn, spec, case.inputs), twice(spec.reference, spec, case.inputs))


def tangent(fn, spec: OpSpec, inputs: dict) -> list[Tensor | None]:
    with forward_ad.dual_level():
        duals = {
            n: forward_ad.make_dual(v.detach(), randn(v.dtype, *v.shape, seed=11))
            for n, v in leaves_of(spec, inputs).items()
        }
        out = floating(fn(**{**inputs, **duals}))
        return [forward_ad.unpack_dual(t).tangent for t in out]


@each(
    dtypes=(torch.float64,),
    spec_if=lambda spec: spec.differentiable,
    case_if=lambda case: case.gradcheck and case.name in ("ordinary", "softmax", "sigmoid"),
)
def test_forward_mode(spec, dtype, case):
    """By `forward_ad` and `torch.func.jvp`; forward over reverse, and a vector of gradients."""
    got, wanted = tangent(spec.fn, spec, case.inputs), tangent(spec.reference, spec, case.inputs)
    assert any(t is not None for t in got)
    assert_alike(dict(enumerate(got)), dict(enumerate(wanted)))
    leaves = {n: v.detach() for n, v in leaves_of(spec, case.inputs).items()}
    name, value = next(iter(leaves.items()))

    def number(fn):
        def of(value: Tensor) -> Tensor:
            out = floating(fn(**{**case.inputs, **leaves, name: value}))
            return sum(t.square().sum() for t in out)

        return of

    along = randn(value.dtype, *value.shape, seed=5)
    products = []
    for fn in (spec.fn, spec.reference):
        (plain, product) = torch.func.jvp(torch.func.grad(number(fn)), (value,), (along,))
        slope = torch.func.jvp(number(fn), (value,), (along,))[1]
        mapped = torch.vmap(torch.func.grad(number(fn)))(torch.stack([value, value * 0.9]))
        products.append({0: plain, 1: product, 2: slope, 3: mapped})
    assert_alike(*products)
    assert products[0][1].any() or spec.name == "combine" and not case.inputs["weights"].any()


@each_spec(lambda spec: spec in DIFFERENTIABLE)
def test_tangents_and_batches_of_cotangents(spec):
    """A backward of a graph that was made before the transform began."""
    case = next(c for c in spec.cases(torch.float64) if c.gradcheck)
    results = []
    for fn in (spec.fn, spec.reference):
        leaves = leaves_of(spec, case.inputs)
        y = next(t for t in floating(fn(**{**case.inputs, **leaves})) if t.requires_grad)
        wanted, cotangent = list(leaves.values()), randn(y.dtype, *y.shape, seed=1)
        batch = torch.stack([cotangent, 2 - cotangent])
        batched = torch.autograd.grad(y, wanted, batch, retain_graph=True, is_grads_batched=True)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(cotangent, 1 - cotangent)
            along = torch.autograd.grad(y, wanted, dual, create_graph=True)
            along = [forward_ad.unpack_dual(t).tangent for t in along]
        results.append(dict(enumerate([*batched, *along])))
    assert_alike(*results)


@each_spec(lambda spec: not spec.differentiable)
def test_what_is_not_differentiable_says_so(spec):
    """Or its outputs are integers alone."""
    case = next(iter(spec.cases(torch.float32)))
    inputs = {
        n: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in ((n, v.clone() if isinstance(v, Tensor) else v) for n, v in case.inputs.items())
    }
    plain = {n: v.detach() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    if not floating(spec.fn(**plain)):
        assert not any(t.requires_grad for t in tensors(spec.fn(**inputs)))
        return
    with pytest.raises(RuntimeError, match=f"^{spec.name}: not differentiable"):
        spec.fn(**inputs)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"^{spec.name}: not diff"):
        spec.fn(**plain)


def test_mapped_indices_are_refused_where_derivatives_are_taken():
    x, routing = torch.randn(3, 4), ops.route(torch.tensor([[0], [1], [0]]).int(), 2)
    rows = torch.vmap(lambda token_of: ops.permute(x, token_of, routing.row_of))
    assert torch.equal(rows(routing.token_of[None])[0], x[routing.token_of.long()])

    def mapped(x: Tensor) -> Tensor:
        rows = torch.vmap(lambda token_of: ops.permute(x, token_of, routing.row_of))
        return rows(routing.token_of[None]).sum()

    with pytest.raises(RuntimeError, match="^permute: token_of must not be mapped by torch.vmap"):
        torch.func.grad(mapped)(x)


def weights_with_main_grad(dtype=torch.float32) -> dict[str, Tensor]:
    shapes = {"w1": (2, 6, 4), "w2": (2, 4, 3), "b1": (2, 6), "b2": (2, 4)}
    weights = {
        n: randn(dtype, *s, seed=i).requires_grad_() for i, (n, s) in enumerate(shapes.items())
    }
    for w in weights.values():
        w.main_grad = torch.zeros(w.shape)
    return weights


def run_experts(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Both ops that add to main gradients: [6, 4] -> [6, 6]."""
    own, offsets = dict(weights), torch.tensor([0, 2, 6])
    y = ops.experts(x, None, own.pop("w1"), own.pop("w2"), offsets, **own)
    return ops.grouped_gemm(y, weights["w1"], offsets)


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("wanted", ["x", "b1", "w1"])
def test_main_grad_is_left_alone_where_the_weight_is(wanted, cast):
    weights, x = weights_with_main_grad(), randn(torch.float32, 6, 4, seed=9).requires_grad_()
    leaves = {"x": x, **weights}
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        y = run_experts(x, weights).float().square().sum()
    y.backward(inputs=[leaves[wanted]], retain_graph=True)
    for name, w in weights.items():
        assert w.main_grad.any() == (name == wanted) and w.grad is None
        w.main_grad.zero_()
    found = torch.autograd.grad(y, list(leaves.values()), retain_graph=True)
    assert not any(w.main_grad.any() for w in weights.values())
    y.backward()
    for w, gradient in zip(weights.values(), found[1:]):
        apart = (w.main_grad - gradient).norm() / gradient.norm()
        assert w.grad is None and apart < (1e-2 if cast else 1e-6)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_main_grad_of_a_backward_that_can_be_differentiated():
    """`create_graph` changes how gradients are made, not where they go."""
    weights, x = weights_with_main_grad(), randn(torch.float32, 6, 4, seed=9).requires_grad_()
    found = []
    for create_graph in (False, True):
        run_experts(x, weights).square().sum().backward(create_graph=create_graph)
        assert all(w.grad is None for w in weights.values())
        found.append([w.main_grad.clone() for w in weights.values()])
        for w in weights.values():
            w.main_grad.zero_()
        x.grad = None
    for plain, differentiable in zip(*found):
        torch.testing.assert_close(plain, differentiable)


def test_main_grad_takes_a_gradient_penalty():
    """What a penalty's gradient adds goes where the loss's goes."""
    weights, x = weights_with_main_grad(), randn(torch.float32, 6, 4, seed=9).requires_grad_()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        y = run_experts(x, weights).square().sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        return y + slope.square().sum()

    loss(weights).backward()
    assert all(w.grad is None for w in weights.values())
    plain = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
    loss(plain).backward()
    for name, w in weights.items():
        torch.testing.assert_close(w.main_grad, plain[name].grad, rtol=1e-4, atol=1e-5)


def test_forward_mode_of_a_compiled_op_is_not_lost():
    routing = ops.route(torch.tensor([[0], [1], [0]]).int(), 2)

    def rows(x: Tensor) -> Tensor:
        return ops.permute(x, routing.token_of, routing.row_of)

    x = torch.randn(3, 4)
    for fullgraph in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(rows, backend="aot_eager", fullgraph=fullgraph)
        compiled(x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, 1 - x)
            if fullgraph:
                with pytest.raises(RuntimeError, match="permute: is not compiled under torch.func"):
                    compiled(dual)
            else:
                tangent = forward_ad.unpack_dual(compiled(dual)).tangent
                assert torch.equal(tangent, rows(1 - x))
