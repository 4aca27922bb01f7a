"""gate, with the sums of both losses: one kernel against the chain of torch ops."""

from __future__ import annotations

import pytest
import torch
from conftest import backward_of

from moekernels import ops


def plain(logits, top_k):
    """What router code does, with the sums that the balancing and z-losses need."""
    scores = torch.softmax(logits.float(), dim=-1)
    weights, ids = scores.topk(top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    counts = torch.bincount(ids.flatten(), minlength=logits.shape[1])
    z_sum = torch.logsumexp(logits.float(), dim=-1).square().sum()
    return weights, scores.sum(0), z_sum, ids, counts


def ours(logits, top_k):
    out = ops.gate(logits, top_k, renormalize=True)
    return out.weights, out.score_sum, out.z_sum, out.ids, out.counts


IMPLEMENTATIONS = {"ours": ours, "torch": plain}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gate_forward(compare, implementation, shape, dtype):
    tokens, _, experts, top_k = shape
    logits = torch.randn(tokens, experts).to(dtype)
    compare(implementation, lambda: IMPLEMENTATIONS[implementation](logits, top_k))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gate_forward_backward(compare, implementation, shape, dtype):
    tokens, _, experts, top_k = shape
    fn = IMPLEMENTATIONS[implementation]

    def loss(logits):
        weights, score_sum, z_sum, _, _ = fn(logits, top_k)
        return weights.sum() + score_sum.sum() + z_sum.sum()

    compare(implementation, backward_of(loss, torch.randn(tokens, experts).to(dtype)))
