"""Which experts of a layer are kept in its slots, by a policy: bookkeeping alone, the same for the
cache itself and for a replay of what it saw.

Legend: E experts, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from moekernels.errors import UsageError


@dataclass
class Held:
    """An expert in a slot. Times count the layer's passes."""

    slot: int
    came: int
    used: int  # -1: not yet
    uses: int = 0
    ahead: bool = False  # fetched before anybody asked, and not used since


# What goes first has the least of this; `now` is the pass under way.
Rank = Callable[[Held, int], tuple]
POLICIES: dict[str, Rank] = {
    "lru": lambda held, now: (held.used, held.came),
    "lfu": lambda held, now: (held.uses, held.used, held.came),
    # Who was not used in the layer's last pass, oldest comer first; among the others lru.
    "least-stale": lambda held, now: (
        (0, held.came, held.used) if held.used < now - 1 else (1, held.used, held.came)
    ),
}


class Fetch(NamedTuple):
    expert: int
    slot: int


class Round(NamedTuple):
    """Experts that lie in slots at once, after the fetches, and in which."""

    places: dict[int, int]
    fetches: list[Fetch]


@dataclass
class Counts:
    hits: int = 0
    misses: int = 0
    ahead: int = 0  # fetched ahead
    useless: int = 0  # of these, gone before they were used

    @staticmethod
    def of(layers: Iterable[Slots]) -> Counts:
        """Of all layers together."""
        each = [vars(slots.counts) for slots in layers]
        return Counts(**{f.name: sum(counts[f.name] for counts in each) for f in fields(Counts)})


@dataclass
class Slots:
    """One layer's."""

    size: int
    policy: str
    held: dict[int, Held] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    now: int = 0

    def use(self, needed: Iterable[int]) -> list[Round]:
        """A pass needs these experts: in rounds of at most S, those that are here first."""
        self.now += 1
        wanted = sorted(set(needed))
        here = [x for x in wanted if x in self.held]
        away = [x for x in wanted if x not in self.held]
        self.counts.hits += len(here)
        self.counts.misses += len(away)
        order, rounds = here + away, []
        for begin in range(0, len(order), self.size):
            experts = order[begin : begin + self.size]
            fetches = [self._bring(x, experts) for x in experts if x not in self.held]
            for x in experts:
                entry = self.held[x]
                entry.used, entry.ahead = self.now, False
                entry.uses += 1
            rounds.append(Round({x: self.held[x].slot for x in experts}, fetches))
        return rounds

    def ahead(self, likely: Iterable[int]) -> list[Fetch]:
        """Fetch what a coming pass is likely to need, as much as there are slots."""
        wanted = list(dict.fromkeys(likely))[: self.size]
        fetches = [self._bring(x, wanted) for x in wanted if x not in self.held]
        for fetch in fetches:
            self.held[fetch.expert].ahead = True
        self.counts.ahead += len(fetches)
        return fetches

    def _bring(self, expert: int, keep: Sequence[int]) -> Fetch:
        if len(self.held) < self.size:
            slot = len(self.held)
        else:
            rank = POLICIES[self.policy]
            gone = min(
                (x for x in self.held if x not in keep),
                key=lambda x: (rank(self.held[x], self.now), x),
            )
            entry = self.held.pop(gone)
            self.counts.useless += entry.ahead
            slot = entry.slot
        self.held[expert] = Held(slot, self.now, -1)
        return Fetch(expert, slot)


class Event(NamedTuple):
    """What a layer saw: the experts of a pass, or those that were said to come."""

    layer: int
    experts: tuple[int, ...]
    ahead: bool = False


def replay(trace: Iterable[Event], size: int, policy: str) -> Counts:
    """What a cache of `size` slots per layer counts on a recorded trace."""
    layers: dict[int, Slots] = {}
    for event in trace:
        slots = layers.setdefault(event.layer, Slots(size, policy))
        (slots.ahead if event.ahead else slots.use)(event.experts)
    return Counts.of(layers.values())


def belady(trace: Sequence[Event], size: int) -> int:
    """The most hits that any policy could have had on a trace without fetching ahead: whoever is
    needed last goes first."""
    hits = 0
    for layer in {event.layer for event in trace}:
        asked = [
            x for e in trace if e.layer == layer and not e.ahead for x in sorted(set(e.experts))
        ]
        follows: list[float] = [math.inf] * len(asked)
        last: dict[int, int] = {}
        for place in range(len(asked) - 1, -1, -1):
            follows[place] = last.get(asked[place], math.inf)
            last[asked[place]] = place
        held: dict[int, float] = {}
        for place, expert in enumerate(asked):
            if expert in held:
                hits += 1
            elif len(held) == size:
                del held[max(held, key=lambda x: (held[x], x))]
            held[expert] = follows[place]
    return hits


def check(slots: int, policy: str, experts: int) -> None:
    """UsageError where a layer of so many experts cannot be kept so."""
    if policy not in POLICIES:
        raise UsageError(f"cache: policy {policy!r}; it is one of {', '.join(POLICIES)}")
    if not 1 <= slots <= experts:
        raise UsageError(f"cache: {slots} slots; a layer has {experts} experts, use 1 to {experts}")
