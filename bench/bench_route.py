"""route: a counting sort against torch's stable sort and the one-hot form of older code."""

from __future__ import annotations

import pytest
import torch

from moekernels import ops


def by_argsort(ids, experts):
    flat = ids.flatten()
    slot_of = torch.argsort(flat, stable=True)
    row_of = torch.empty_like(slot_of)
    row_of[slot_of] = torch.arange(len(slot_of))
    counts = torch.bincount(flat, minlength=experts)
    return counts, counts.cumsum(0), row_of, slot_of // ids.shape[1], slot_of


def by_one_hot(ids, experts):
    hot = torch.nn.functional.one_hot(ids.flatten().long(), experts)
    counts = hot.sum(0)
    begins = counts.cumsum(0) - counts
    row_of = ((hot.cumsum(0) - 1 + begins) * hot).sum(-1)
    return counts, row_of


IMPLEMENTATIONS = {"ours": ops.route, "argsort": by_argsort, "one-hot": by_one_hot}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_route(compare, implementation, shape):
    tokens, _, experts, top_k = shape
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k].int().contiguous()
    compare(implementation, lambda: IMPLEMENTATIONS[implementation](ids, experts))
