"""combine, plain and weighted, against index_add and against a gather and a sum."""

from __future__ import annotations

import pytest
import torch
from conftest import backward_of

from moekernels import ops

IMPLEMENTATIONS = ["ours", "index_add", "gather-sum"]


def build(implementation, shape, dtype):
    tokens, hidden, experts, top_k = shape
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k].int()
    routing = ops.route(ids, experts)
    token_of, row_of, slot_of = (
        t.long() for t in (routing.token_of, routing.row_of, routing.slot_of)
    )

    def ours(rows, weights=None):
        return ops.combine(rows, routing.row_of, routing.token_of, weights)

    def index_add(rows, weights=None):
        if weights is not None:
            rows = rows * weights.flatten()[slot_of, None].to(rows.dtype)
        return torch.zeros(tokens, hidden, dtype=rows.dtype).index_add_(0, token_of, rows)

    def gather_sum(rows, weights=None):
        picked = rows[row_of]
        if weights is not None:
            picked = picked * weights[:, :, None].to(rows.dtype)
        return picked.sum(1)

    fn = {"ours": ours, "index_add": index_add, "gather-sum": gather_sum}[implementation]
    return fn, torch.randn(tokens * top_k, hidden).to(dtype), torch.rand(tokens, top_k)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_combine_forward(compare, implementation, shape, dtype):
    fn, rows, _ = build(implementation, shape, dtype)
    compare(implementation, lambda: fn(rows))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_combine_forward_backward(compare, implementation, shape, dtype):
    fn, rows, _ = build(implementation, shape, dtype)
    compare(implementation, backward_of(fn, rows))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_combine_weighted_forward_backward(compare, implementation, shape, dtype):
    fn, rows, weights = build(implementation, shape, dtype)
    compare(implementation, backward_of(fn, rows, weights))
