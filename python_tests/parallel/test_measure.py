"""What is said of an exchange, from stamps that are made up: no clock runs here."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from moekernels.parallel.measure import Stamps, flights_of, hidden_of, origin_of, times_of


def _stamps(**given: int) -> Stamps:
    """Posted by all at 0, here at 100, asked for at once; `got` as soon as that may be."""
    base = Stamps(0, 0, 100, 0, 0, 10, 0, 0)._replace(**given)
    return base._replace(got=given.get("got", max(base.need, base.ready)))


@pytest.mark.parametrize(
    ("stamps", "nanoseconds"),  # moving, skew, exposed, flight, hidden
    [
        ([_stamps()], (10, 0, 110, 100, 0)),
        ([_stamps(need=60)], (10, 0, 50, 100, 60)),
        ([_stamps(need=500)], (10, 0, 10, 100, 100)),
        ([_stamps(last=40, ready=140)], (10, 40, 110, 100, 0)),
        # Woken late, as where another rank has the core: waiting, and no flight.
        ([_stamps(got=130)], (10, 0, 140, 100, 0)),
        ([_stamps(need=60, got=130), _stamps(ready=120, need=130)], (20, 0, 90, 120, 60)),
        ([_stamps(ready=0, got=30)], (10, 0, 40, 0, 0)),  # and nothing flew
        # Four parts of one exchange share the link: it is busy for 100, not for 250.
        (
            [_stamps(ready=25 * n, need=25 * (n - 1)) for n in (1, 2, 3, 4)],
            (40, 0, 140, 100, 0),
        ),
        (
            [_stamps(ready=25 * n, need=40 * n - 20) for n in (1, 2, 3, 4)],
            (40, 0, 45, 100, 95),
        ),
        ([_stamps(), _stamps(post=300, ready=400, need=300)], (20, 0, 220, 200, 0)),
        # What flies while a late peer is waited for is neither hidden nor not.
        ([_stamps(last=80, ready=80), _stamps(need=90)], (20, 80, 30, 20, 10)),
    ],
)
def test_times_of_stamps(stamps: list[Stamps], nanoseconds: tuple[int, ...]) -> None:
    assert times_of(stamps) == pytest.approx(tuple(n * 1e-9 for n in nanoseconds))


def _overlapped(delay: int) -> list[Stamps]:
    """Three parts under 30 of work each; before the second is posted a peer is late by `delay`."""
    at, stamps = 0, []
    for part in range(3):
        late = delay if part == 1 else 0
        arrives = at + late + 50
        stamps.append(Stamps(at, at + late, arrives, at + 30, max(at + 30, arrives), 5, 0, part))
        at = stamps[-1].got
    return stamps


@pytest.mark.parametrize("delay", [0, 40, 1000, 10**6])
def test_a_late_peer_is_skew_and_leaves_what_is_hidden(delay: int) -> None:
    times, before = times_of(_overlapped(delay)), times_of(_overlapped(0))
    assert times.skew == pytest.approx(max(0, delay - 30) * 1e-9)
    shift = min(30, delay) * 1e-9  # of its lateness passed under work, which hid nothing then
    assert times.flight == pytest.approx(before.flight)
    assert times.hidden == pytest.approx(before.hidden - shift)
    assert times.exposed == pytest.approx(before.exposed + shift)


def test_hidden_of() -> None:
    assert hidden_of(0.5, 1.0, 10.0) == 0.5
    assert hidden_of(0.5, 1.0, 1000.0) is None
    assert hidden_of(float("nan"), float("nan"), 1.0) is None


def test_flights_are_what_a_trace_draws() -> None:
    zero = origin_of(time.perf_counter())
    here, need = zero + 5_000_000, zero + 1_000_000
    stamps = Stamps(zero, zero + 2_000_000, here, need, here, 10, 64, 4 * 3 + 1)
    flight = flights_of([stamps], time.perf_counter())[0]
    assert flight.name == "combine 3" and flight.size == 64
    assert flight.end - flight.start == pytest.approx(3e-3)
    assert (flight.waited, flight.late) == pytest.approx((4e-3, 1e-3))
    assert flight.start - flight.posted == pytest.approx(2e-3)


Act = tuple[str, str, float]  # post, wait or work; of which exchange; how long it flies or takes


def _program(parts: int, overlap: bool, flight: float, works: Iterator[float]) -> list[Act]:
    """Forward and backward of some layers as `chunks` has them; a flight of 0 is a local copy."""
    acts: list[Act] = []

    def way(name: str, work: float) -> None:
        """There in parts, some work, and back."""
        each = flight / parts
        acts.extend(("post", f"{name} out {i}", each) for i in range(parts))
        if not overlap:
            acts.extend(("wait", f"{name} out {i}", each) for i in range(parts))
        for i in range(parts):
            if overlap:
                acts.append(("wait", f"{name} out {i}", each))
            acts.append(("work", "", work / parts))
            acts.append(("post", f"{name} back {i}", each))

    for layer in range(12):
        acts.append(("work", "", next(works)))  # attention
        way(f"forward {layer}", next(works))
        acts.extend(("wait", f"forward {layer} back {i}", flight / parts) for i in range(parts))
    for layer in range(12):
        way(f"backward {layer}", next(works))
        later = ("work", "", next(works))  # weights' gradients
        back = [("wait", f"backward {layer} back {i}", flight / parts) for i in range(parts)]
        acts.extend([later, *back] if overlap else [*back, later])
    return acts


def _play(programs: list[list[Act]], wake: float = 0.0) -> tuple[float, list[Stamps]]:
    """Two ranks run their programs; when both are done, and the first one's stamps. Who waits for
    a peer, or for the link, wakes up late by `wake`."""
    posts: list[dict[str, float]] = [{}, {}]
    place, clock, link = [0, 0], [0.0, 0.0], [0.0, 0.0]
    stamps: list[Stamps] = []
    while any(place[r] < len(programs[r]) for r in (0, 1)):
        for rank in (0, 1):
            while place[rank] < len(programs[rank]):
                act, name, length = programs[rank][place[rank]]
                if act == "post":
                    posts[rank][name] = clock[rank]
                elif act == "work":
                    clock[rank] += length
                elif name not in posts[1 - rank]:
                    break
                else:
                    post, last, need = posts[rank][name], posts[1 - rank][name], clock[rank]
                    ready = max(post, last)
                    if length:
                        ready = link[rank] = max(ready, link[rank]) + length
                    got = max(need, ready + wake) if ready > need else need
                    clock[rank] = got
                    if rank == 0:
                        stamps.append(Stamps(*map(round, (post, last, ready, need, got, 0, 0, 0))))
                place[rank] += 1
    return max(clock), stamps


def _modes(flight: float, parts: int, uneven: float) -> tuple[float, float]:
    """Hidden by the clock and by stamps."""

    def programs(parts: int, overlap: bool, flight: float) -> list[list[Act]]:
        draws = [random.Random(rank) for rank in (0, 1)]
        draw = [iter(lambda d=d: 1e6 * (1 + uneven * d.random()), None) for d in draws]
        return [_program(parts, overlap, flight, works) for works in draw]

    waited, _ = _play(programs(1, False, flight))
    local, _ = _play(programs(1, False, 0.0))
    overlapped, stamps = _play(programs(parts, True, flight))
    times = times_of(stamps)
    return (waited - overlapped) / (waited - local), hidden_of(times.hidden, times.flight, 0.0)


@pytest.mark.parametrize("flight", [0.2e6, 0.6e6, 1.5e6])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("uneven", [0.0, 0.3])
def test_stamps_agree_with_the_clock(flight: float, parts: int, uneven: float) -> None:
    clock, stamps = _modes(flight, parts, uneven)
    assert stamps == pytest.approx(clock, abs=0.05)


def test_waking_up_late_is_not_hidden_and_no_flight() -> None:
    works = [iter(lambda: 1e6, None) for _ in (0, 1)]
    programs = [_program(1, False, 0.5e6, w) for w in works]
    times, late = (times_of(_play(programs, wake)[1]) for wake in (0.0, 1e5))
    assert late.flight == pytest.approx(times.flight) and late.hidden == times.hidden == 0
    assert late.exposed == pytest.approx(times.exposed * 1.2)
