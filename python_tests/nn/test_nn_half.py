"""The halves of a layer in one function each, against their steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moekernels.model.layout import Layout
from moekernels.model.rotary import RotarySpec, frequencies
from moekernels.nn.attention import Attention
from moekernels.nn.choice import Chosen
from moekernels.nn.home import Home
from moekernels.nn.norm import RMSNorm
from moekernels.nn.rotary import Packing
from moekernels.nn.router import Router
from moekernels.parallel.mesh import Mesh
from python_tests.support.layouts import variant

DOUBLE = Home(torch.float64)
ANGLES = frequencies(RotarySpec(rope_theta=100.0), 4)
POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1, 2])
VALID = torch.tensor([True, True, False, True, True, True, True])
PACKING = Packing.make(POSITIONS, [0, 4, 7], ANGLES, torch.float64)


def layer(**changes) -> nn.ModuleList:
    config = variant(**changes)
    torch.manual_seed(0)
    norm = RMSNorm(config.d_model, 1e-5, DOUBLE, partial=False)
    attention = Attention(config, Mesh(Layout()), 1, DOUBLE, name="attention")
    for parameter in [*norm.parameters(), *attention.parameters()]:
        nn.init.normal_(parameter)
    return nn.ModuleList([norm, attention])


def accumulate(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None
        parameter.main_grad = torch.zeros_like(parameter)


def total(parameter: Tensor) -> Tensor:
    """Wherever it went."""
    return parameter.main_grad + (0 if parameter.grad is None else parameter.grad)


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"out_bias": True}], ids=str)
def test_the_half_is_its_steps(changes: dict, again: bool) -> None:
    norm, attention = module = layer(**changes)
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    found = []
    for whole in (False, True):
        accumulate(module)
        x.grad = None
        y = attention.behind(norm, x, PACKING) if whole else attention(norm(x), PACKING)
        names = {y.grad_fn.name(), *(node.name() for node, _ in y.grad_fn.next_functions if node)}
        assert ("_HalfBackward" in names) == whole
        if again:
            (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            slope.square().sum().backward()
        else:
            y.square().sum().backward()
        found.append([y.detach(), x.grad, *map(total, module.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


def test_weights_that_are_not_reached_stay() -> None:
    norm, attention = module = layer()
    accumulate(module)
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    y = attention.behind(norm, x, PACKING).square().sum()
    y.backward(inputs=[x], retain_graph=True)
    assert not any(total(p).any() for p in module.parameters())
    wanted = torch.autograd.grad(y, attention.qkv)[0]
    assert wanted.any() and not attention.qkv.main_grad.any()


def test_what_the_half_does_not_know_goes_by_steps() -> None:
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    for changes in ({"qkv_bias": True}, {"window": 2}, {"sinks": True}):
        norm, attention = module = layer(**changes)
        accumulate(module)
        y = attention.behind(norm, x, PACKING)
        assert y.grad_fn.name() != "_HalfBackward"
        torch.testing.assert_close(y, attention(norm(x), PACKING))
    norm, attention = layer()  # without main gradients
    assert attention.behind(norm, x, PACKING).grad_fn.name() != "_HalfBackward"


def chosen(router: Router, norm: RMSNorm, x: Tensor, added: Tensor, whole: bool) -> Chosen:
    if whole:
        return router.behind(norm, x, added, VALID)
    normed, stream = norm.behind(x, added)
    return Chosen(normed, stream, router.gate(router.logits(normed), VALID))


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("changes", [{}, {"score": "sigmoid", "bias_update_rate": 0.1}], ids=str)
def test_the_choice_is_its_steps(changes: dict, again: bool) -> None:
    config = variant(renormalize=True, **changes)
    torch.manual_seed(0)
    norm = RMSNorm(config.d_model, 1e-5, DOUBLE, partial=False)
    router = Router(config, Mesh(Layout()), 1, DOUBLE, name="router")
    module = nn.ModuleList([norm, router])
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if router.selection_bias is not None:
        router.selection_bias.copy_(torch.linspace(-1, 1, config.num_experts))
    given = torch.randn(2, 7, 16, dtype=torch.float64)
    found = []
    for whole in (False, True):
        accumulate(module)
        x, added = (t.clone().requires_grad_() for t in given)
        normed, stream, gate = chosen(router, norm, x, added, whole)
        assert (normed.grad_fn.name() == "_ChoiceBackward") == whole
        weights = (t * torch.linspace(1, 2, t.shape[-1]).to(t) for t in (gate.weights, gate.z_sum))
        y = normed.square().sum() + stream.pow(3).sum() + gate.score_sum.square().sum()
        y = y + sum(t.sum() for t in weights)
        if again:
            (slope,) = torch.autograd.grad(y, x, create_graph=True)
            slope.square().sum().backward()
        else:
            y.backward()
        grads = [x.grad, added.grad, *map(total, module.parameters())]
        found.append([normed.detach(), stream.detach(), *(t.detach() for t in gate), *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


def test_a_choice_that_nobody_weighs() -> None:
    """Gradients of the stream alone, of the norm alone, of the weights alone."""
    config = variant()
    norm = RMSNorm(config.d_model, 1e-5, DOUBLE, partial=False)
    router = Router(config, Mesh(Layout()), 1, DOUBLE, name="router")
    accumulate(nn.ModuleList([norm, router]))
    given = torch.randn(2, 7, 16, dtype=torch.float64)
    for part in (lambda c: c.total, lambda c: c.normed, lambda c: c.gate.weights):
        slopes = []
        for whole in (False, True):
            x, added = (t.clone().requires_grad_() for t in given)
            y = part(chosen(router, norm, x, added, whole)).square().sum()
            slopes.append(torch.autograd.grad(y, (x, added)))
        for one, other in zip(*slopes):
            torch.testing.assert_close(one, other)
