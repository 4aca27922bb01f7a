"""permute against torch's gathers; its backward, a sum of rows, against index_add."""

from __future__ import annotations

import pytest
import torch
from conftest import backward_of

from moekernels import ops

IMPLEMENTATIONS = ["ours", "index_select", "indexing"]


def build(implementation, shape, dtype):
    tokens, hidden, experts, top_k = shape
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k].int()
    routing = ops.route(ids, experts)
    token_of = routing.token_of.long()
    fn = {
        "ours": lambda x: ops.permute(x, routing.token_of, routing.row_of),
        "index_select": lambda x: x.index_select(0, token_of),
        "indexing": lambda x: x[token_of],
    }[implementation]
    return fn, torch.randn(tokens, hidden).to(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_permute_forward(compare, implementation, shape, dtype):
    fn, x = build(implementation, shape, dtype)
    compare(implementation, lambda: fn(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_permute_forward_backward(compare, implementation, shape, dtype):
    fn, x = build(implementation, shape, dtype)
    compare(implementation, backward_of(fn, x))
