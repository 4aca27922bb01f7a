"""What flushes have shown of their passes, and what the planner's simulator makes of it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from moekernels.parallel.measure import BACK, OUT, Stamps
from moekernels.pipeline.schedule import Kind
from moekernels.pipeline.trace import Event
from moekernels.plan.evaluate import simulator
from moekernels.plan.overlap import LayerTimes, exposed, exposed_in_pair
from moekernels.plan.pairs import PairCosts

SCHEDULES = ("1f1b", "zb", "overlap")
Flushes = list[list[list[Event]]]  # each, of both ranks


@dataclass(frozen=True)
class Setting:
    """share: of a flush that waits for every exchange, what these take; 0: no link."""

    pp: int
    microbatches: int
    share: float = 0.0

    @property
    def name(self) -> str:
        link = f" link {self.share:g}" if self.share else ""
        return f"pp{self.pp} m{self.microbatches}{link}"


def makespan(flush: list[list[Event]]) -> float:
    events = [e for of_rank in flush for e in of_rank]
    return max(e.end for e in events) - min(e.start for e in events)


def passes_of(flushes: Flushes, kind: Kind) -> dict[int, float]:
    """By stage, the mean seconds of a pass, whole or in pieces; the median over flushes."""
    spent: dict[int, list[float]] = defaultdict(list)
    for flush in flushes:
        by_pass = _by_pass(flush, kind)
        for stage in {stage for _, stage, _ in by_pass}:
            sums = [sum(pieces) for (_, s, _), pieces in by_pass.items() if s == stage]
            spent[stage].append(statistics.mean(sums))
    return {stage: statistics.median(each) for stage, each in spent.items()}


def _by_pass(flush: list[list[Event]], kind: Kind) -> dict[tuple[int, int, int], list[float]]:
    """Seconds of the pieces of each pass, by rank, stage and microbatch."""
    found: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for rank, events in enumerate(flush):
        for e in events:
            if e.kind is kind:
                found[rank, e.stage, e.microbatch].append(e.end - e.start)
    return found


def pieces_of(flushes: Flushes, kind: Kind) -> list[float]:
    """Mean seconds of the pieces of a pass that a pair ran, in order; the median over flushes."""
    found = []
    for flush in flushes:
        by_pass = _by_pass(flush, kind)
        cut = [each for each in by_pass.values() if len(each) > 1]
        found.append([statistics.mean(column) for column in zip(*cut, strict=True)])
    return [statistics.median(column) for column in zip(*found, strict=True)]


def layers_of(flushes: Flushes, stamps: list[Stamps]) -> tuple[LayerTimes, ...]:
    """Of a stage, from the pieces of its pairs without a link and the flights over it."""
    ahead, back = pieces_of(flushes, Kind.F), pieces_of(flushes, Kind.B)
    flights: dict[bool, list[float]] = {True: [], False: []}
    for s in stamps:
        flights[s.label % 4 in (OUT, BACK)].append((s.ready - s.start) / 1e9)
    flight, flight_back = (statistics.median(flights[forward]) for forward in (True, False))
    layers = []
    count = len(ahead) // 2
    for i in range(count):
        # backward, from the last layer on: [weights of the layer behind, experts, attention]
        at = 1 + 3 * (count - 1 - i)
        behind = back[at + 2]
        weights = back[at + 3] if i else 0.0  # those of the first are in its last piece
        layers.append(
            LayerTimes(
                ahead[2 * i], ahead[2 * i + 1], back[at + 1], behind, weights, flight, flight_back
            )
        )
    return tuple(layers)


# --- what the planner's simulator says of it


def predict(setting: Setting, ran: dict[str, Flushes], stamps: list[Stamps]) -> dict[str, float]:
    """Seconds of a flush by schedule."""
    took = {kind: passes_of(ran["1f1b"], kind) for kind in (Kind.F, Kind.B)}
    took |= {kind: passes_of(ran["zb"], kind) for kind in (Kind.I, Kind.W)}
    shown = 0.0
    if setting.share:
        layers = layers_of(ran["overlap"], stamps)
        for x in layers:
            after = x.weights or layers[-1].weights
            took[Kind.F][0] += exposed(1, x.flight, x.experts)
            took[Kind.B][0] += exposed(1, x.flight_back, x.experts_back, after)
            took[Kind.I][0] += exposed(1, x.flight_back, x.experts_back)
        shown = exposed_in_pair(layers)
    alone = {kind: passes_of(ran["1f1b"], kind) for kind in (Kind.F, Kind.B)}
    stages, m = range(setting.pp), setting.microbatches
    pair = PairCosts(
        [[alone[Kind.F][stage]] * m for stage in stages],
        [[alone[Kind.B][stage]] * m for stage in stages],
        [shown] * setting.pp,
    )
    found = {}
    for name in SCHEDULES:
        run = simulator(name, setting.pp, m, 1)
        run.latency = 0.0
        pairs = pair if name == "overlap" else None
        found[name] = run.run(lambda stage, _, kind: took[kind][stage], pairs).makespan
    return found
