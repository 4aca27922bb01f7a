"""The packing of the exchange: against gathers and concatenations, and against split and cat."""

from __future__ import annotations

import pytest
import torch

from moekernels import ops

PEERS, LOCAL_EXPERTS = 8, 8


@pytest.mark.parametrize("implementation", ["ours", "torch"])
def test_pack(compare, implementation, shape, dtype):
    tokens, hidden, experts, top_k = shape
    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k].int()
    routing = ops.route(ids, experts)
    token_of, slot_of = routing.token_of.long(), routing.slot_of.long()

    def plain():
        picked = weights.view(-1, 1).index_select(0, slot_of)
        return torch.cat([x.index_select(0, token_of), picked.view(dtype)], dim=1)

    fns = {"ours": lambda: ops.pack(x, weights, routing.slot_of, top_k), "torch": plain}
    compare(implementation, fns[implementation])


@pytest.mark.parametrize("implementation", ["ours", "split-cat"])
@pytest.mark.parametrize("direction", ["regroup", "ungroup"])
def test_regroup(compare, implementation, direction, shape, dtype):
    tokens, hidden, _, top_k = shape
    share = torch.rand(PEERS, LOCAL_EXPERTS)
    counts = (share / share.sum() * tokens * top_k).long()
    order = range(PEERS * LOCAL_EXPERTS)
    by_expert = [p * LOCAL_EXPERTS + e for e in range(LOCAL_EXPERTS) for p in range(PEERS)]
    back = sorted(order, key=by_expert.__getitem__)
    rows = torch.randn(int(counts.sum()), hidden).to(dtype)
    sizes = counts.flatten().tolist()
    if direction == "ungroup":
        sizes, by_expert = [sizes[i] for i in by_expert], back

    def plain():
        parts = rows.split(sizes)
        return torch.cat([parts[i] for i in by_expert])

    move = {
        "regroup": lambda: ops.regroup(rows, counts, hidden),
        "ungroup": lambda: ops.ungroup(rows, counts),
    }[direction]
    compare(implementation, move if implementation == "ours" else plain)
