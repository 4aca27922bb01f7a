"""Where each expert lies, and where it had better lie.

A layer's experts lie in slots: slot s is place s % e of the expert-parallel rank s // e, so that
`slot_of` [L, E] says it for all layers. Without moves expert x lies in slot x. Every rank holds
equally many experts of a layer, and so equally many bytes.

Legend: L layers, E experts, P ranks that share a layer's experts, E/P = e, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekernels.errors import UsageError


def unmoved(layers: int, experts: int) -> Tensor:
    """slot_of [L, E] int64 where nothing was moved."""
    return torch.arange(experts).repeat(layers, 1)


def rank_loads(loads: Tensor, slot_of: Tensor, ranks: int) -> Tensor:
    """loads [L, E] -> [L, P]: the rows that each rank computes, under a placement."""
    by_slot = torch.zeros_like(loads).scatter_(1, slot_of.to(loads.device), loads)
    return by_slot.view(len(loads), ranks, -1).sum(-1)


def solve(
    loads: Tensor,
    node_of: Sequence[int],
    coactivation: Tensor | None = None,
    beta: float = 1.0,
    slot_of: Tensor | None = None,
) -> Tensor:
    """The rank [E] int64 of each expert of a layer for a low

        rows of the busiest rank / mean  +  beta * nodes of a token beyond its first.

    loads [E] rows of each expert; node_of [P] each rank's node, numbered from 0; coactivation
    [E, E] tokens that chose both, the diagonal the tokens that chose one, or None: nodes do not
    matter. Nodes are counted by pairs, exact for two choices per token. slot_of [E]: a placement to
    improve by few moves; None: from scratch.
    """
    experts, ranks = len(loads), len(node_of)
    if experts % ranks:
        raise UsageError(f"placement: {ranks} ranks do not divide {experts} experts")
    if sorted(set(node_of)) != list(range(len(set(node_of)))):
        raise UsageError(f"placement: nodes are numbered from 0 without a gap, got {node_of}")
    from moekernels import _host

    parting = _parting(node_of, coactivation, beta)
    start = [] if slot_of is None else (slot_of // (experts // ranks)).tolist()
    costs = [] if parting is None else parting.flatten().tolist()
    return torch.tensor(_host.place_experts(loads.double().tolist(), list(node_of), costs, start))


def _parting(node_of: Sequence[int], coactivation: Tensor | None, beta: float) -> Tensor | None:
    """What it costs [E, E] that two experts' nodes differ; None where it costs nothing."""
    if coactivation is None or beta <= 0 or len(set(node_of)) == 1:
        return None
    pairs = coactivation.double()
    chosen = pairs.diagonal().sum()
    # A token of K choices has K*(K-1)/2 pairs and, if all are apart, K-1 nodes beyond its first: a
    # pair apart counts 2/K of one. The diagonal sums to K a token.
    return beta * 2 / chosen * pairs if chosen > 0 else None


def cost(
    loads: Tensor,
    rank_of: Tensor,
    node_of: Sequence[int],
    coactivation: Tensor | None = None,
    beta: float = 1.0,
) -> float:
    """What `solve` makes low, for any ranks [E]; 0 where nothing was routed."""
    sums = torch.zeros(len(node_of), dtype=torch.float64).index_add_(0, rank_of, loads.double())
    if not sums.any():
        return 0.0
    total = (sums.max() / sums.mean()).item()
    parting = _parting(node_of, coactivation, beta)
    if parting is not None:
        nodes = torch.tensor(list(node_of))[rank_of]
        total += parting[nodes[:, None] != nodes].sum().item() / 2
    return total


def put(rank_of: Tensor, slot_of: Tensor, ranks: int) -> Tensor:
    """Slots [E] for the ranks [E] that experts shall lie on: who stays on its rank [under slot_of
    [E]] keeps its slot, others take the free ones in the order of their numbers."""
    each = len(rank_of) // ranks
    if rank_of.bincount(minlength=ranks).tolist() != [each] * ranks:
        raise UsageError(f"placement: not {each} experts on each of {ranks} ranks")
    stays = slot_of // each == rank_of
    free = torch.ones(len(rank_of), dtype=torch.bool)
    free[slot_of[stays]] = False
    slots = slot_of.clone()
    for rank in range(ranks):
        coming = ((rank_of == rank) & ~stays).nonzero()[:, 0]
        places = free[rank * each : (rank + 1) * each].nonzero()[:, 0]
        slots[coming] = rank * each + places
    return slots


def from_facts(value: object, layers: int, experts: int, where: str) -> Tensor:
    """The placement that a checkpoint at `where` tells; UsageError where it does not fit."""
    every = list(range(experts))
    if (
        not isinstance(value, list)
        or len(value) != layers
        or any(not isinstance(row, list) or {type(x) for x in row} != {int} for row in value)
        or any(sorted(row) != every for row in value)
    ):
        raise UsageError(
            f"{where}: its placement is not one of {layers} layers with {experts} experts; the "
            f"checkpoint is of another model, or was changed"
        )
    return torch.tensor(value)


def nodes_of_exchange(node_of: Sequence[int], ranks: Sequence[int], etp: int) -> list[int]:
    """The node of each expert-parallel rank of one exchange group [P], numbered from 0 in the
    order of their first rank.

    node_of [world]; ranks: the group's, ep after ep, etp neighbours each. An expert whose shards
    lie on several nodes counts for the first.
    """
    names: dict[int, int] = {}
    return [names.setdefault(node_of[r], len(names)) for r in ranks[::etp]]
