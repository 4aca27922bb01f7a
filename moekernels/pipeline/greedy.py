"""Zero bubble over several virtual stages per rank: what to do next, decided under a clock.

At every moment a free rank takes the first that is ready of: I of its latest chunk, F of its latest
chunk, W in the order of their I. All take one unit and messages no time. A rank holds (chunk,
microbatch) pairs from their F to their W, at most as many as 1F1B's first stage does; where it is
full, or nothing comes, it finds a W to do.

Source: the list of "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241), on interleaved stages.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache

from .schedule import Action, Kind

Order = tuple[Action, ...]
Held = tuple[tuple[int, ...], tuple[int, ...]]
"""By chunk: pairs whose activations are kept, and pairs that owe their W."""


def limit(stages: int, microbatches: int, virtual_stages: int) -> int:
    """(chunk, microbatch) pairs that a rank holds at most: those of as many whole microbatches as
    there are stages. Interleaved 1F1B's first stage keeps no fewer."""
    return virtual_stages * min(stages, microbatches)


@lru_cache(maxsize=512)  # a planner asks for the same again and again
def orders(stages: int, microbatches: int, virtual_stages: int) -> tuple[Order, ...]:
    """Each rank's computations, in order."""
    depth, most = stages * virtual_stages, limit(stages, microbatches, virtual_stages)
    # ahead[s]: microbatches that have come to virtual stage s, back[s]: that have left it again
    ahead = [microbatches] + [0] * depth
    back = [0] * depth + [microbatches]
    held = [0] * stages
    owed: list[deque[Action]] = [deque() for _ in range(stages)]
    found: list[list[Action]] = [[] for _ in range(stages)]
    ranks = range(stages)
    latest_first = [range(depth - stages + rank, -1, -stages) for rank in ranks]

    def choose(rank: int) -> Action | None:
        for stage in latest_first[rank]:
            if back[stage] < ahead[stage + 1] and back[stage] < back[stage + 1]:
                return Action(Kind.I, stage // stages, back[stage])
        for stage in latest_first[rank]:
            # Its microbatch can come round to the last chunk: none ever waits for room for good.
            chunk = stage // stages
            room = held[rank] + virtual_stages - chunk <= most
            if room and ahead[stage + 1] < ahead[stage]:
                return Action(Kind.F, chunk, ahead[stage + 1])
        return owed[rank].popleft() if owed[rank] else None

    left = 3 * depth * microbatches
    while left:
        chosen = [(rank, action) for rank in ranks if (action := choose(rank))]
        for rank, action in chosen:
            found[rank].append(action)
            stage = action.chunk * stages + rank
            if action.kind is Kind.F:
                ahead[stage + 1] += 1
                held[rank] += 1
            elif action.kind is Kind.I:
                back[stage] += 1
                owed[rank].append(action._replace(kind=Kind.W))
            else:
                held[rank] -= 1
        left -= len(chosen)
    return tuple(map(tuple, found))


def held(stages: int, microbatches: int, virtual_stages: int) -> list[list[Held]]:
    """Per rank, what it holds whenever a backward begins or a forward ends; in between less."""
    made = orders(stages, microbatches, virtual_stages)
    return [_held_by(order, virtual_stages) for order in made]


def _held_by(order: Order, virtual_stages: int) -> list[Held]:
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
    return sorted(found)
