"""A layer's experts in one go between the two ways of an exchange, by threads over the CPU's
kernels: the bits of dispatch, experts and combine, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels.parallel import expert, straight
from moekernels.parallel.mesh import Group
from python_tests.support.exchanges import (
    EXPERTS,
    Threads,
    group_of,
    in_steps,
    in_threads,
    inputs,
    learning,
    parameters,
)


@pytest.mark.parametrize(
    "size, dtype, how, main",
    [
        (2, torch.float32, {}, False),
        (3, torch.bfloat16, {"recompute": True}, True),
        (8, torch.float64, {"activation": "geglu", "interleaved": True}, True),
    ],
)
def test_in_one_go_it_has_the_bits_of_the_steps(size, dtype, how, main):
    results = []
    for layer in (in_steps, straight.experts):
        threads = Threads(size)
        groups = [group_of(threads, rank, size) for rank in range(size)]
        results.append(in_threads(size, learning, groups, layer, dtype, how, main))
    for theirs, mine in zip(*results):
        assert len(theirs) == 2 * 7 and all(map(torch.equal, theirs, mine))


def second(rank: int, groups: list[Group], layer) -> list[Tensor]:
    x, ids, weights = inputs(rank, torch.float64, 2, 1)
    x.requires_grad_(), weights.requires_grad_()
    learnt = parameters(rank, torch.float64, False)
    plan = expert.ExchangePlan.make(ids, EXPERTS, groups[rank])
    out = layer(x, weights, plan, **learnt)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    return list(torch.autograd.grad(dx.square().sum(), [x, weights, *learnt.values()]))


def test_gradients_of_gradients_are_those_of_the_steps():
    results = []
    for layer in (in_steps, straight.experts):
        threads = Threads(2)
        groups = [group_of(threads, rank, 2) for rank in range(2)]
        results.append(in_threads(2, second, groups, layer))
    for theirs, mine in zip(*results):
        for a, b in zip(theirs, mine):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def nothing_kept(rank: int, groups: list[Group]) -> bool:
    x, ids, weights = inputs(rank, torch.float32, 2, 1)
    learnt = parameters(rank, torch.float32, False)
    plan = expert.ExchangePlan.make(ids, EXPERTS, groups[rank])
    with torch.no_grad():
        out = straight.experts(x, weights, plan, **learnt)
        plain = in_steps(x, weights, plan, **learnt)
    return torch.equal(out, plain) and out.grad_fn is None


def test_without_gradients_it_is_the_same():
    threads = Threads(2)
    groups = [group_of(threads, rank, 2) for rank in range(2)]
    assert in_threads(2, nothing_kept, groups) == [True, True]
