"""Zero bubble over several virtual stages per rank: what to do next, decided under a clock.

At every moment a free rank takes the first that is ready of: I of its latest chunk, F of its latest
chunk, W in the order of their I. Messages take no time. A rank holds (chunk, microbatch) pairs from
their F to their W, at most as many as it is allowed; where it is full, or nothing comes, it finds a
W to do.

An order that was found while all passes took as long is fragile: where I takes longer than F it
idles more than interleaved 1F1B. One found under what passes do take, by ranks that hold what
interleaved 1F1B's first one does, idles little whatever they take. So both are found, with either
memory, and played; the one that idles the least is taken, of equals the one that holds less.

Source: the list of "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241), on interleaved stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from .schedule import Action, Kind

Order = tuple[Action, ...]
Held = tuple[tuple[int, ...], tuple[int, ...]]
"""By chunk: pairs whose activations are kept, and pairs that owe their W."""


class Ticks(NamedTuple):
    """What the passes of a chunk take, beside one another."""

    forward: int
    through: int
    weights: int


ALIKE = Ticks(1, 1, 1)
TYPICAL = Ticks(10, 13, 8)  # of a layer that is not computed again


class Found(NamedTuple):
    """Each rank's computations, in order, and the pairs that it holds at most."""

    orders: tuple[Order, ...]
    limit: int


Bare = list[list[tuple[Kind, int, int]]]
"""Per rank, (kind, virtual stage, microbatch) of its computations, in order."""


@lru_cache(maxsize=512)  # a planner asks for the same again and again
def best(
    stages: int, microbatches: int, virtual_stages: int, interleaved: int, ticks: Ticks = TYPICAL
) -> Found:
    """What idles the least where passes take `ticks`. interleaved: the pairs that interleaved
    1F1B's first rank keeps; the alternative are those of as many whole microbatches as there are
    stages, which 1F1B's first stage keeps."""
    size = stages, microbatches, virtual_stages
    least = virtual_stages * min(stages, microbatches)
    found = [
        (limit, _orders(*size, limit, clock))
        for limit in sorted({least, max(least, interleaved)})
        for clock in dict.fromkeys((ticks, ALIKE))
    ]
    limit, chosen = min(found, key=lambda one: _makespan(one[1], *size, ticks))
    orders = tuple(
        tuple(Action(kind, stage // stages, number) for kind, stage, number in order)
        for order in chosen
    )
    return Found(orders, limit)


def _orders(stages: int, microbatches: int, virtual_stages: int, limit: int, clock: Ticks) -> Bare:
    depth, ranks = stages * virtual_stages, range(stages)
    # Microbatches that a virtual stage has begun, that have come to it, that have left it again.
    begun = [0] * depth
    ahead = [microbatches] + [0] * depth
    back = [0] * depth + [microbatches]
    held = [0] * stages
    owed: list[deque[tuple[int, int]]] = [deque() for _ in ranks]
    found: Bare = [[] for _ in ranks]
    latest_first = [range(depth - stages + rank, -1, -stages) for rank in ranks]
    forward, through, weights = clock
    never = 1 + 3 * depth * microbatches * max(clock)
    # What a rank computes, and until when; `never`: it is free.
    runs: list[tuple[Kind, int, int]] = [(Kind.W, 0, 0)] * stages
    until, now = [never] * stages, 0
    while True:
        for rank in ranks:
            if until[rank] != never:
                continue
            for stage in latest_first[rank]:
                number = back[stage]
                if number < ahead[stage + 1] and number < back[stage + 1]:
                    kind, ends = Kind.I, now + through
                    break
            else:
                for stage in latest_first[rank]:
                    number = begun[stage]
                    # It can come round to the last chunk: none ever waits for room for good.
                    room = held[rank] + virtual_stages - stage // stages <= limit
                    if room and number < ahead[stage]:
                        kind, ends = Kind.F, now + forward
                        begun[stage] += 1
                        held[rank] += 1
                        break
                else:
                    if not owed[rank]:
                        continue
                    stage, number = owed[rank].popleft()
                    kind, ends = Kind.W, now + weights
            runs[rank], until[rank] = (kind, stage, number), ends
            found[rank].append(runs[rank])
        now = min(until)
        if now == never:
            return found
        for rank in ranks:
            if until[rank] != now:
                continue
            kind, stage, number = runs[rank]
            until[rank] = never
            if kind is Kind.F:
                ahead[stage + 1] += 1
            elif kind is Kind.I:
                back[stage] += 1
                owed[rank].append((stage, number))
            else:
                held[rank] -= 1


def _makespan(
    orders: Bare, stages: int, microbatches: int, virtual_stages: int, ticks: Ticks
) -> int:
    """Of the flush, where passes take `ticks` and messages no time."""
    forward, through, weights = ticks
    depth = stages * virtual_stages
    # When a microbatch has left a virtual stage, ahead and back; -1: not yet.
    ahead = [[-1] * microbatches for _ in range(depth)]
    back = [[-1] * microbatches for _ in range(depth)]
    clock, position = [0] * stages, [0] * stages
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            at, now = position[rank], clock[rank]
            for kind, stage, number in order[at:]:
                if kind is Kind.W:
                    now += weights
                    at += 1
                    continue
                if kind is Kind.F:
                    left, needed, takes = ahead, stage - 1, forward
                else:
                    left, needed, takes = back, stage + 1, through
                if 0 <= needed < depth:
                    end = left[needed][number]
                    if end < 0:
                        break
                    if end > now:
                        now = end
                now += takes
                left[stage][number] = now
                at += 1
            moved = moved or at > position[rank]
            position[rank], clock[rank] = at, now
    return max(clock)


def held(orders: tuple[Order, ...], virtual_stages: int) -> list[list[Held]]:
    """Per rank, what it holds whenever a backward begins or a forward ends; in between less."""
    return [sorted(_held_by(order, virtual_stages)) for order in orders]


def _held_by(order: Order, virtual_stages: int) -> Iterator[Held]:
    kept, owed = [0] * virtual_stages, [0] * virtual_stages
    found: set[Held] = set()
    for kind, chunk, _ in order:
        if kind is Kind.F:
            kept[chunk] += 1
        if kind is not Kind.W:
            found.add((tuple(kept), tuple(owed)))
        if kind is Kind.I:
            kept[chunk] -= 1
            owed[chunk] += 1
        elif kind is Kind.W:
            owed[chunk] -= 1
    yield from found
