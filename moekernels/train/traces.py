"""A flush as it ran, and as it was planned: the tracks of every stage, for the trace and its
picture."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from moekernels.parallel.measure import Flight
from moekernels.pipeline.schedule import Kind, Schedule
from moekernels.pipeline.simulate import Pieces, Simulator
from moekernels.pipeline.trace import (
    Event,
    PieceOf,
    exchange_events,
    pieces_of,
    trace_events,
)


class Tracks(NamedTuple):
    """`flights` by stage."""

    events: list[Event]
    flights: dict[int, list[Flight]]


def entries_of(measured: Tracks, planned: Tracks, **args: Any) -> list[dict[str, Any]]:
    """Of a Chrome trace that has each stage as it ran and, below, as it was planned."""
    beside = 1 + max((e.stage for e in measured.events), default=0)
    entries: list[dict[str, Any]] = []
    for tracks, first, label in ((measured, 0, ""), (planned, beside, ", planned")):
        more = {**args, "planned": True} if first else args
        entries += trace_events(tracks.events, label, first, **more)
        for stage, flights in sorted(tracks.flights.items()):
            entries += exchange_events(first + stage, flights, **more)
    return entries


def plan_of(schedule: Schedule, measured: Tracks) -> Tracks:
    """The same schedule under the clock, each computation at its virtual stage's measured mean, and
    in each, at its mean place, what it posted."""
    events = _events(schedule, measured.events)
    begin = min((e.start for e in measured.events), default=0.0)
    events = [e._replace(start=begin + e.start, end=begin + e.end) for e in events]
    return Tracks(events, _flights(measured, events))


def _events(schedule: Schedule, measured: list[Event]) -> list[Event]:
    passes: dict[tuple[int, Kind, int], list[float]] = defaultdict(list)
    cuts: dict[tuple[int, Kind], list[list[float]]] = defaultdict(list)
    for e, _ in pieces_of(measured):
        where = schedule.virtual_stage(e.stage, e.chunk), e.kind, e.microbatch
        passes[where].append(e.end - e.start)
    spent: dict[tuple[int, Kind, bool], list[float]] = defaultdict(list)
    for (stage, kind, _), parts in passes.items():
        spent[stage, kind, len(parts) > 1].append(sum(parts))
        if len(parts) > 1:
            cuts[stage % schedule.stages, kind].append(parts)

    def cost(stage: int, microbatch: int, kind: Kind) -> float:
        return fmean(spent[stage, kind, len(passes[stage, kind, microbatch]) > 1])

    pieces: list[Pieces] = [
        (_means(cuts[rank, Kind.F]), _means(cuts[rank, Kind.B])) for rank in range(schedule.stages)
    ]
    return Simulator(schedule).run(cost, pieces=pieces).events


def _means(passes: Sequence[Sequence[float]]) -> list[float]:
    """Of each piece; one, where passes are whole."""
    return [fmean(column) for column in zip(*passes, strict=True)] or [1.0]


def _flights(measured: Tracks, planned: list[Event]) -> dict[int, list[Flight]]:
    seen: dict[tuple[PieceOf, str, int], list[Flight]] = defaultdict(list)
    ran = dict(pieces_of(measured.events))
    for stage, flights in measured.flights.items():
        mine = sorted((e for e in ran if e.stage == stage), key=lambda e: e.start)
        starts = [e.start for e in mine]
        times: Counter[tuple[Event, str]] = Counter()
        for flight in flights:
            at = bisect.bisect_right(starts, flight.posted) - 1
            if at < 0 or flight.posted > mine[at].end:
                continue  # of no computation
            e = mine[at]
            times[e, flight.name] += 1
            key = ran[e], flight.name, times[e, flight.name]
            seen[key].append(_moved(flight, -e.start))
    posts: dict[PieceOf, list[Flight]] = defaultdict(list)
    for (piece, name, _), flights in seen.items():
        means = (fmean(column) for column in zip(*(f[1:] for f in flights), strict=True))
        start, end, size, *rest = means
        posts[piece].append(Flight(name, start, end, round(size), *rest))
    made: dict[int, list[Flight]] = {stage: [] for stage in measured.flights}
    for e, piece in pieces_of(planned):
        if e.stage in made:
            made[e.stage] += [_moved(flight, e.start) for flight in posts[piece]]
    return made


def _moved(flight: Flight, by: float) -> Flight:
    return flight._replace(start=flight.start + by, end=flight.end + by, posted=flight.posted + by)
