"""Copies of hot experts on other ranks, for what no placement evens: an expert that alone has more
rows than a rank has on average.

A rank has spare slots of a layer behind those of its own experts: where e own experts and r copies
lie, slot s is place s % (e + r) of rank s // (e + r), and places from e on are copies'. Of an
expert's rows every copy has a share, in units: a source deals its tokens to lanes in turn, and each
lane of each source has one place for an expert. So where a row goes hangs on its source and its
position alone.

Legend: E experts, P ranks that share a layer's experts, e = E/P experts of a rank, r spare slots of
a rank and layer, S ranks that send rows (P times the shards of an expert), L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moekernels.balance import placement
from moekernels.balance.replan import LEAST
from moekernels.errors import UsageError

LANES = 16  # of a source: an expert's rows are dealt out in steps of 1/16 of a source's


class Copy(NamedTuple):
    """A copy of an expert in spare slot `place` of `rank`; it has `units` of the S*LANES parts of
    the expert's rows."""

    expert: int
    rank: int
    place: int
    units: int


def units_of(sources: int) -> int:
    """Parts that an expert's rows are dealt out in."""
    return sources * LANES


def rank_loads(
    loads: Tensor, slot_of: Tensor, ranks: int, copies: Sequence[Copy], units: int
) -> Tensor:
    """loads [E] of a layer -> [P] fp64: the rows that each rank computes, as far as sources are
    alike."""
    loads = loads.double()
    rows = placement.rank_loads(loads[None], slot_of[None], ranks)[0]
    owner = slot_of // (len(loads) // ranks)
    for copy in copies:
        part = loads[copy.expert] * copy.units / units
        rows[copy.rank] += part
        rows[owner[copy.expert]] -= part
    return rows


def placement_suffices(loads: Tensor, ranks: int, margin: float = LEAST) -> bool:
    """Whether no expert of a layer, loads [E], has more rows than `margin` above a rank's mean."""
    return bool(loads.amax() <= (1 + margin) * loads.double().sum() / ranks)


def choose(loads: Tensor, slot_of: Tensor, ranks: int, spare: int, units: int) -> list[Copy]:
    """Copies that even the ranks of a layer with loads [E] and slot_of [E]: what a rank has above
    the mean goes to those that are furthest below it, hottest expert first, while that is `LEAST`
    of the mean at least."""
    each, mean = len(loads) // ranks, loads.double().sum().item() / ranks
    rows = rank_loads(loads, slot_of, ranks, (), units).tolist()
    here = [units] * len(loads)  # units that each expert's owner keeps
    owner = (slot_of // each).tolist()
    copies: list[Copy] = []
    used = [0] * ranks
    while mean > 0:
        busiest = max(range(ranks), key=rows.__getitem__)
        free = [rank for rank in range(ranks) if used[rank] < spare and rank != busiest]
        over = rows[busiest] - mean
        if not free or used[busiest] or over < LEAST * mean:
            break
        idlest = min(free, key=rows.__getitem__)
        there = {copy.expert for copy in copies if copy.rank == idlest}
        own = [x for x in range(len(loads)) if owner[x] == busiest and x not in there]
        hottest = max(own, key=lambda x: loads[x].item() * here[x], default=None)
        if hottest is None or not loads[hottest]:
            break
        unit = loads[hottest].item() / units
        part = min(here[hottest], math.ceil(min(over, mean - rows[idlest]) / unit))
        if rows[idlest] + part * unit >= rows[busiest]:  # a unit is more than what there is to even
            part -= 1
        if part <= 0:
            break
        copies.append(Copy(hottest, idlest, used[idlest], part))
        used[idlest] += 1
        here[hottest] -= part
        rows[busiest] -= part * unit
        rows[idlest] += part * unit
    return copies


def anywhere(slot_of: Tensor, ranks: int, spare: int, units: int) -> list[Copy]:
    """Copies in every spare slot, whatever the loads, for slot_of [E]: to compare a layout with."""
    each, expert_at = len(slot_of) // ranks, torch.argsort(slot_of).tolist()
    copies = []
    for rank in range(ranks):
        for place in range(spare):
            number, ahead = divmod(place, ranks - 1)
            owner = (rank + 1 + ahead) % ranks
            expert = expert_at[owner * each + number]
            copies.append(Copy(expert, rank, place, units // ranks))
    return copies


def better(
    loads: Tensor, slot_of: Tensor, ranks: int, spare: int, units: int, now: Sequence[Copy]
) -> list[Copy]:
    """What to copy of a layer that has the copies `now`: none where placement suffices, what `now`
    is where another choice takes less than `LEAST` of the mean off the busiest rank."""
    if placement_suffices(loads, ranks, 0.0 if now else LEAST):
        return []
    mean = loads.double().sum().item() / ranks
    after = choose(loads, slot_of, ranks, spare, units)
    was, then = (
        rank_loads(loads, slot_of, ranks, copies, units).max().item() for copies in (now, after)
    )
    return after if was - then >= LEAST * mean else list(now)


def slots_of_owners(slot_of: Tensor, ranks: int, spare: int) -> Tensor:
    """slot_of [..., E] as `placement` has it -> the same, counted with the spare slots."""
    each = slot_of.shape[-1] // ranks
    return slot_of // each * (each + spare) + slot_of % each


def lanes(
    copies: Sequence[Copy],
    slot_of: Tensor,
    node_of: Sequence[int],
    spare: int,
    source: int,
    etp: int,
) -> Tensor:
    """[LANES, E] int64: the slot, counted with the spare ones, of each expert for the tokens of
    each lane of a source; [1, E] where nothing is copied.

    node_of [P]: the node of each rank. A source's lanes go to itself, to its node, and to others
    last, in rank order.
    """
    ranks = len(node_of)
    each = len(slot_of) // ranks
    owners = slots_of_owners(slot_of, ranks, spare)
    if not copies:
        return owners[None]
    table = owners.repeat(LANES, 1)
    for expert in sorted({copy.expert for copy in copies}):
        slots = {int(slot_of[expert]) // each: int(owners[expert])}
        share = {rank: 0 for rank in slots}
        for copy in copies:
            if copy.expert == expert:
                slots[copy.rank] = copy.rank * (each + spare) + each + copy.place
                share[copy.rank] = copy.units
        share[next(iter(slots))] = units_of(ranks * etp) - sum(share.values())
        dealt = _deal(share, [node_of[s // etp] for s in range(ranks * etp)], etp)[source]
        table[:, expert] = torch.tensor([slots[rank] for rank in dealt])
    return table


def _deal(share: dict[int, int], node_of_source: Sequence[int], etp: int) -> list[list[int]]:
    """share {rank: units} -> the rank of each lane of each source."""
    sources = range(len(node_of_source))
    given: list[list[int]] = [[] for _ in sources]
    for near in (
        lambda s, rank: s // etp == rank,
        lambda s, rank: node_of_source[s] == node_of_source[rank * etp],
        lambda s, rank: True,
    ):
        for rank in sorted(share):
            close = [s for s in sources if near(s, rank)]
            while share[rank] and (open_ := [s for s in close if len(given[s]) < LANES]):
                for s in open_[: share[rank]]:
                    given[s].append(rank)
                share[rank] -= min(share[rank], len(open_))
    return given


def from_facts(
    value: object, slot_of: Tensor, ranks: int, units: int, where: str
) -> list[list[Copy]]:
    """[L] lists of copies that a checkpoint at `where` tells; UsageError where they are none of
    slot_of [L, E]."""
    layers, experts = slot_of.shape
    try:
        copies = [[Copy(*map(int, copy)) for copy in layer] for layer in value]  # type: ignore[attr-defined]
        fine = len(copies) == layers and all(
            0 <= c.expert < experts
            and 0 <= c.rank < ranks
            and c.place >= 0
            and c.units > 0
            and int(slot_of[number, c.expert]) // (experts // ranks) != c.rank
            for number, layer in enumerate(copies)
            for c in layer
        )
        for layer in copies:
            fine &= len({(c.rank, c.place) for c in layer}) == len(layer)
            fine &= len({(c.rank, c.expert) for c in layer}) == len(layer)
            fine &= all(
                sum(c.units for c in layer if c.expert == x) <= units for x in range(experts)
            )
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise UsageError(
            f"{where}: its copies of experts are not those of {layers} layers with {experts} "
            f"experts on {ranks} ranks; the checkpoint was changed"
        )
    return copies
