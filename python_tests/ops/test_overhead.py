"""On tiny inputs an op takes as long as the Python around its kernel: few functions of ours are
called, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moekernels
from moekernels import ops
from python_tests.support.counting import calls_within

OURS = str(Path(moekernels.__file__).parent)
LOGITS, TOKENS = torch.randn(4, 4), torch.randn(4, 8)
WEIGHTS, W1, W2 = torch.rand(8), torch.randn(4, 16, 8), torch.randn(4, 8, 8)
IDS = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2]])
ROUTING = ops.route(IDS, 4)
ROWS = torch.randn(8, 8)

# Op -> (call of its differentiable arguments, those, most calls forward, most with a backward)
CALLS = {
    "route": (lambda: ops.route(IDS, 4), (), 3, 0),
    "gate": (lambda x: ops.gate(x, 2).weights, (LOGITS,), 3, 9),
    "permute": (lambda x: ops.permute(x, ROUTING.token_of, ROUTING.row_of), (TOKENS,), 3, 8),
    "combine": (lambda x: ops.combine(x, ROUTING.row_of, ROUTING.token_of), (ROWS,), 3, 8),
    "grouped_gemm": (
        lambda x, w: ops.grouped_gemm(x, w, ROUTING.offsets), (ROWS, W2), 7, 19
    ),
    "experts": (
        lambda x, s, a, b: ops.experts(x, s, a, b, ROUTING.offsets),
        (ROWS, WEIGHTS, W1, W2), 24, 35,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_few_functions_are_called(name):
    call, given, forward, both = CALLS[name]
    call(*given)  # what happens once
    assert calls_within(OURS, lambda: call(*given)) <= forward
    if not given:
        return
    leaves = [t.clone().requires_grad_() for t in given]

    def step() -> None:
        y = call(*leaves)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    step()
    assert calls_within(OURS, step) <= both
