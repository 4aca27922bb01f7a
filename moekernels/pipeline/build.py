"""Schedules by name: what each stands for, and the order in which a rank computes."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from moekernels.errors import UsageError

from . import greedy
from .messages import Entry, production_order, with_communication
from .schedule import Action, Kind, Schedule


@dataclass(frozen=True)
class ScheduleKind:
    """What a schedule's name stands for. warmup(rank, stages, groups, virtual_stages): forward
    passes that a rank does before it alternates. several: whether a rank holds several virtual
    stages, or one; None: either. offered: worth running; the planner searches it and `verify --all`
    proves it. owed(rank): where backward is I and W, how many W a rank puts off, if it holds one
    virtual stage (`greedy` says what several do); None: backward is one."""

    warmup: Callable[[int, int, list[int], int], int]
    several: bool | None = False
    offered: bool = True
    owed: Callable[[int], int] | None = None
    pairs: bool = False  # a forward and the backward behind it run together, piece by piece


SCHEDULES = {
    "gpipe": ScheduleKind(lambda rank, stages, groups, virtual: sum(groups), offered=False),
    "1f1b": ScheduleKind(lambda rank, stages, groups, virtual: stages - 1 - rank),
    "interleaved": ScheduleKind(
        lambda rank, stages, groups, virtual: 2 * (stages - 1 - rank) + (virtual - 1) * max(groups),
        several=True,
    ),
    # ZB-H1: a rank puts off as many W as ranks before it, and has them when gradients run dry
    "zb": ScheduleKind(
        lambda rank, stages, *_: stages - 1 - rank, several=None, owed=lambda rank: rank
    ),
    # twice 1F1B's, and one: what a rank needs comes while it computes the pair before
    "overlap": ScheduleKind(lambda rank, stages, *_: 2 * (stages - 1 - rank) + 1, pairs=True),
}


def splits(name: str) -> bool:
    """Whether a schedule's backward is I and W."""
    return name != "forward" and SCHEDULES[name].owed is not None


def in_pairs(name: str) -> bool:
    """Whether a schedule's forwards and backwards run in pairs."""
    return name != "forward" and SCHEDULES[name].pairs


def offered(several: bool) -> list[str]:
    """Names of the schedules worth running, with several virtual stages per rank or with one."""
    return [n for n, kind in SCHEDULES.items() if kind.offered and kind.several in (several, None)]


def by_clock(name: str, virtual_stages: int) -> bool:
    """Whether `greedy` decides the order."""
    return splits(name) and virtual_stages > 1


def found_by_clock(
    stages: int, microbatches: int, virtual_stages: int, ticks: greedy.Ticks = greedy.TYPICAL
) -> greedy.Found:
    """What it decides."""
    groups = _groups(stages, microbatches)
    ahead = SCHEDULES["interleaved"].warmup(0, stages, groups, virtual_stages)
    most = min(ahead + 1, virtual_stages * microbatches)
    return greedy.best(stages, microbatches, virtual_stages, most, ticks)


@lru_cache(maxsize=512)  # a planner asks for the same again and again
def in_flight_limits(
    name: str, stages: int, microbatches: int, virtual_stages: int
) -> tuple[int, ...]:
    """Per rank, the (chunk, microbatch) pairs whose activations are kept at most."""
    total, groups = microbatches * virtual_stages, _groups(stages, microbatches)
    if name == "forward":
        return (total,) * stages
    if by_clock(name, virtual_stages):
        return (found_by_clock(stages, microbatches, virtual_stages).limit,) * stages
    warmup = SCHEDULES[name].warmup
    return tuple(
        min(warmup(rank, stages, groups, virtual_stages) + 1, total) for rank in range(stages)
    )


@lru_cache(maxsize=512)
def held_limits(
    name: str, stages: int, microbatches: int, virtual_stages: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Per rank, what it holds at most when a backward begins: pairs of (those whose activations are
    kept, those that owe their W), none of which is within another. Where `by_clock`, `greedy.held`
    says it."""
    kept = in_flight_limits(name, stages, microbatches, virtual_stages)
    if not splits(name):
        return tuple(((most, 0),) for most in kept)
    held = []
    for most, owed in zip(kept, owed_limits(name, stages, microbatches, virtual_stages)):
        pairs = [(min(most, microbatches - k), k) for k in range(owed)]
        held.append(tuple(a for a, b in zip(pairs, [*pairs[1:], (0, 0)]) if a[0] > b[0]))
    return tuple(held)


@lru_cache(maxsize=512)
def owed_limits(name: str, stages: int, microbatches: int, virtual_stages: int) -> tuple[int, ...]:
    """Per rank, the (chunk, microbatch) pairs between their I and W at most."""
    owed = None if name == "forward" else SCHEDULES[name].owed
    if owed is None:
        return (0,) * stages
    if by_clock(name, virtual_stages):
        return (found_by_clock(stages, microbatches, virtual_stages).limit,) * stages
    return tuple(min(owed(rank) + 1, microbatches * virtual_stages) for rank in range(stages))


def both_limits(name: str, stages: int, microbatches: int, virtual_stages: int) -> tuple[int, ...]:
    """Per rank, the (chunk, microbatch) pairs between their F and B, or W, at most."""
    if by_clock(name, virtual_stages):
        return (found_by_clock(stages, microbatches, virtual_stages).limit,) * stages
    pairs = held_limits(name, stages, microbatches, virtual_stages)
    return tuple(max(kept + owed for kept, owed in held) for held in pairs)


def receive_limit(stages: int, microbatches: int, virtual_stages: int) -> int:
    """A rank's receive buffers at most, both directions together: one in use and one ahead. With
    virtual stages, what comes round to the first rank for its next chunk may come before that
    starts: at most a group, however many microbatches."""
    return 2 if virtual_stages == 1 else 2 + max(_groups(stages, microbatches))


def check_virtual_stages(name: str, virtual_stages: int) -> None:
    """UsageError where a schedule cannot have so many virtual stages per rank."""
    if name not in SCHEDULES:
        raise UsageError(f"unknown schedule {name!r}: one of {', '.join(SCHEDULES)}")
    several = SCHEDULES[name].several
    *others, last = offered(several=not several)
    use = f"use schedule {', '.join(others)} or {last}" if others else f"use schedule {last}"
    if several and virtual_stages < 2:
        raise UsageError(
            f"schedule {name} needs at least 2 virtual stages per rank, got {virtual_stages}: "
            f"{use}, or 2 virtual stages"
        )
    if several is False and virtual_stages > 1:
        raise UsageError(
            f"schedule {name} has one virtual stage a rank, got {virtual_stages}: "
            f"{use}, or 1 virtual stage"
        )


def build(
    name: str,
    stages: int,
    microbatches: int,
    virtual_stages: int = 1,
    ticks: greedy.Ticks = greedy.TYPICAL,
) -> Schedule:
    """A schedule by name: one of `SCHEDULES`, or `forward` for evaluation.

    Any number of microbatches will do, also fewer than stages and, for `interleaved`, no multiple
    of them. `ticks`: what F, I and W take, for which an order that is found under a clock is the
    best; planner and runtime leave it as it is.
    """
    for what, value in (
        ("pipeline stages", stages),
        ("microbatches", microbatches),
        ("virtual stages", virtual_stages),
    ):
        if value < 1:
            raise UsageError(f"{what} must be at least 1, got {value}")
    if name != "forward":
        check_virtual_stages(name, virtual_stages)

    size = stages, microbatches, virtual_stages
    if by_clock(name, virtual_stages):
        found = found_by_clock(*size, ticks)
        orders: list[list[Entry]] = [[(action,) for action in order] for order in found.orders]
        kept = owed = both = (found.limit,) * stages
    else:
        orders = _orders(name, *size)
        kept, owed = in_flight_limits(name, *size), owed_limits(name, *size)
        both = both_limits(name, *size)
    paired = tuple(frozenset(entry[0] for entry in order if len(entry) > 1) for order in orders)
    receives = receive_limit(*size)
    if any(paired):
        receives *= 2  # a pair needs two
    bare = Schedule(name, *size, (), kept, owed, both, receives)
    production = production_order(bare, orders)
    actions = tuple(
        with_communication(bare, rank, order, production) for rank, order in enumerate(orders)
    )
    return dataclasses.replace(bare, actions=actions, paired=paired if any(paired) else ())


def _orders(name: str, stages: int, microbatches: int, virtual_stages: int) -> list[list[Entry]]:
    """Each rank's computations, in order, where a rule says it."""
    groups = _groups(stages, microbatches)
    forward = _forward_order(groups, virtual_stages)
    if name == "forward":
        return [[(Action(Kind.F, c, m),) for c, m in forward]] * stages
    kind = SCHEDULES[name]
    backward = [(virtual_stages - 1 - c, m) for c, m in forward]
    orders: list[list[Entry]] = []
    for rank in range(stages):
        ahead = min(kind.warmup(rank, stages, groups, virtual_stages), len(forward))
        order = _one_forward_one_backward(forward, backward, ahead)
        order = _split(order, kind.owed(rank)) if kind.owed else order
        orders.append(_pairs(order, ahead if kind.pairs else len(order)))
    return orders


def _groups(stages: int, microbatches: int) -> list[int]:
    """Microbatches that go through a chunk together: as even as possible, and at least `stages`.

    A last group shorter than the pipeline, which a plain division would leave, stalls it, and from
    three virtual stages on it deadlocks. Even groups reach the bubble of (stages - 1) /
    virtual_stages microbatches with any number.
    """
    groups = max(1, microbatches // stages)
    return [microbatches // groups + (i < microbatches % groups) for i in range(groups)]


def _forward_order(groups: list[int], virtual_stages: int) -> list[tuple[int, int]]:
    """(chunk, microbatch) of the forward passes, in the order that all ranks share."""
    order, first = [], 0
    for size in groups:
        for chunk in range(virtual_stages):
            order += [(chunk, microbatch) for microbatch in range(first, first + size)]
        first += size
    return order


def _one_forward_one_backward(
    forward: list[tuple[int, int]], backward: list[tuple[int, int]], ahead: int
) -> list[Action]:
    """`ahead` forward passes, then forward and backward in turn, then the backward ones left."""
    order = [Action(Kind.F, c, m) for c, m in forward[:ahead]]
    for i, (chunk, microbatch) in enumerate(backward):
        if ahead + i < len(forward):
            order.append(Action(Kind.F, *forward[ahead + i]))
        order.append(Action(Kind.B, chunk, microbatch))
    return order


def _pairs(order: list[Action], ahead: int) -> list[Entry]:
    """Each forward behind the first `ahead` ones, and the backward that follows it, as one."""
    entries: list[Entry] = [(action,) for action in order[:ahead]]
    rest = deque(order[ahead:])
    while rest:
        action = rest.popleft()
        entries.append((action, rest.popleft()) if action.kind is Kind.F else (action,))
    return entries


def _split(order: list[Action], most: int) -> list[Action]:
    """Each B as I, then the W of all but the latest `most`, oldest first; these at the end."""
    split: list[Action] = []
    owed: deque[Action] = deque()
    for action in order:
        if action.kind is not Kind.B:
            split.append(action)
            continue
        split.append(action._replace(kind=Kind.I))
        owed.append(action._replace(kind=Kind.W))
        if len(owed) > most:
            split.append(owed.popleft())
    return [*split, *owed]
