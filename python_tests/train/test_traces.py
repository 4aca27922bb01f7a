"""A flush as it ran beside itself as planned: passes at their means, exchanges in their places."""

from __future__ import annotations

import pytest

from moekernels.parallel.measure import Flight
from moekernels.pipeline.build import build
from moekernels.pipeline.interleave import interleave, passes
from moekernels.pipeline.schedule import Kind
from moekernels.pipeline.trace import Event
from moekernels.train.traces import Tracks, entries_of, plan_of


def flight(name: str, posted: float, start: float, end: float) -> Flight:
    return Flight(name, start, end, 100, 0.0, 0.0, posted)


def test_an_exchange_stands_at_its_mean_place_in_its_mean_pass():
    events = [
        Event(0, Kind.F, 0, 0, 5.0, 7.0),
        Event(0, Kind.F, 0, 1, 7.0, 11.0),
        Event(0, Kind.B, 0, 0, 12.0, 15.0),
        Event(0, Kind.B, 0, 1, 15.0, 18.0),
    ]
    flights = [
        flight("dispatch 1", 5.5, 5.5, 6.0),
        flight("dispatch 1", 8.0, 8.5, 10.0),
        flight("dispatch's gradient 1", 13.0, 13.0, 14.0),
        flight("dispatch's gradient 1", 15.0, 16.0, 17.0),
        flight("tokens", 11.5, 11.5, 11.8),  # between passes: of none
    ]
    schedule = build("gpipe", 1, 2)
    plan = plan_of(schedule, Tracks(events, {0: flights}))
    assert [(str(e.kind), e.start, e.end) for e in plan.events] == [
        ("F", 5.0, 8.0),
        ("F", 8.0, 11.0),
        ("B", 11.0, 14.0),
        ("B", 14.0, 17.0),
    ]
    assert [(f.name, f.start, f.end) for f in plan.flights[0]] == [
        ("dispatch 1", 6.0, 7.0),
        ("dispatch 1", 9.0, 10.0),
        ("dispatch's gradient 1", 12.0, 13.0),
        ("dispatch's gradient 1", 15.0, 16.0),
    ]


def test_an_exchange_of_a_pair_stands_where_its_piece_does():
    """Of one layer; the first forward and the last backward run alone, and wait."""
    ahead, back = [1.0, 2.0, 0.5], [0.5, 0.25, 3.0, 1.0]
    events = [Event(0, Kind.F, 0, 0, 0.0, 6.0)]
    flights = [flight("dispatch 1", 1.0, 1.0, 2.0)]
    now = 6.0
    for number in (1, 2):
        sides = {True: iter(ahead), False: iter(back)}
        for piece in interleave(*passes([0])):
            kind, of = (Kind.F, number) if piece.forward else (Kind.B, number - 1)
            takes = next(sides[piece.forward])
            events.append(Event(0, kind, 0, of, now, now + takes))
            now += takes
            if piece.posts is not None:
                flights.append(flight(f"{piece.posts.name} 1", now, now, now + 0.25))
    events.append(Event(0, Kind.B, 0, 2, now, now + 7.0))
    measured = Tracks(events, {0: flights})
    plan = plan_of(build("overlap", 1, 3), measured)
    # passes that are alike in all but their microbatch: the plan is what ran
    assert len(plan.events) == len(events) and len(plan.flights[0]) == len(flights)
    for a, b in zip(sorted(plan.events, key=lambda e: e.start), events, strict=True):
        assert a[:4] == b[:4] and (a.start, a.end) == pytest.approx((b.start, b.end))
    found = sorted((f.start, f.end, f.name) for f in plan.flights[0])
    for a, b in zip(found, sorted((f.start, f.end, f.name) for f in flights), strict=True):
        assert a[2] == b[2] and a[:2] == pytest.approx(b[:2])
    entries = entries_of(measured, plan, step=7)
    names = {e["pid"]: e["args"]["name"] for e in entries if e["name"] == "process_name"}
    assert names == {0: "stage 0", 1: "stage 0, planned"}
    shown = [e for e in entries if e["ph"] == "X"]
    assert len(shown) == 2 * (len(events) + len(flights))
    assert all(e["args"]["step"] == 7 for e in shown)
