"""Experts move between steps: masters and moments of all that move, of all layers, in one message
a peer and dtype. Gradients are zero then, and weights are made from their masters.

Legend: L layers of this rank with experts, E experts, e experts of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.parcels import swap


class Moved(NamedTuple):
    experts: int  # that came to another rank, of this rank's layers
    bytes: int  # that this rank sent
    messages: int  # that this rank sent, one a peer and dtype


def expert_state(optimizer: Optimizer) -> dict[str, list[list[list[Tensor]]]]:
    """By layer (`layers.<n>`), in order: of each of its experts' masters and moments, in the order
    of their keys, the flat parts of each of its e experts."""
    layers: dict[str, list[tuple[str, list[list[Tensor]]]]] = {}
    for key, experts in optimizer.expert_state():
        layer = ".".join(key.split(".")[1:3])
        layers.setdefault(layer, []).append((key, experts))
    return {
        layer: [experts for _, experts in sorted(layers[layer], key=lambda entry: entry[0])]
        for layer in sorted(layers, key=_number)
    }


def _number(layer: str) -> int:
    return int(layer.split(".")[1])


def migrate(
    chunks: Sequence[StageModel],
    optimizer: Optimizer,
    mesh: Mesh,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> Moved:
    """Bring experts from where `before` has them to where `after` does: slot_of [L, E] of each
    chunk, see `balance.placement`. Ranks call it together; placements of layers that a rank has
    not are not asked for. Tell the optimiser with `moved` afterwards."""
    was, now = (torch.cat(list(x)) for x in (before, after))
    moved = _exchange(optimizer, mesh, was, now)
    for chunk, slots in zip(chunks, after, strict=True):
        chunk.place(slots)
    return moved


def _exchange(optimizer: Optimizer, mesh: Mesh, was: Tensor, now: Tensor) -> Moved:
    group, each = mesh.exchange, was.shape[1] // mesh.layout.ep
    homes = was // each, now // each  # [L, E] expert-parallel ranks
    stay = homes[0] == homes[1]
    if not torch.equal(was[stay], now[stay]):
        raise RuntimeError("migrate: an expert that stays on its rank must keep its slot")
    moves = (~stay).nonzero().tolist()
    if not moves:
        return Moved(0, 0, 0)
    state = list(expert_state(optimizer).values())
    out: dict[torch.dtype, dict[int, list[Tensor]]] = {}
    into: dict[torch.dtype, dict[int, list[Tensor]]] = {}
    for experts in (experts for layer in state for experts in layer):
        for part in experts[0]:
            out.setdefault(part.dtype, {}), into.setdefault(part.dtype, {})
    for layer, expert in moves:  # in one order on all ranks
        source, target = (int(home[layer, expert]) for home in homes)
        for mine, peer, slots, parts in (
            (source, target, was, out),
            (target, source, now, into),
        ):
            if mine == mesh.ep_index:
                there = peer * mesh.layout.etp + mesh.etp_index
                place = int(slots[layer, expert]) % each
                for experts in state[layer]:
                    for flat in experts[place]:
                        parts[flat.dtype].setdefault(there, []).append(flat)
    size = messages = 0
    for dtype in sorted(out, key=str):
        like = torch.empty(0, dtype=dtype, device=mesh.device)
        size += sum(x.numel() for peer in out[dtype].values() for x in peer) * like.element_size()
        for own, came in swap(out[dtype], into[dtype], group, like):
            own.copy_(came)
        messages += len(out[dtype])
    return Moved(len(moves), size, messages)
