"""The bench of schedules on made-up flushes: what it predicts, when it says that it is right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moekernels.parallel.measure import BACK, GRAD_BACK, GRAD_OUT, OUT, Stamps
from moekernels.pipeline.build import build
from moekernels.pipeline.interleave import interleave, passes
from moekernels.pipeline.schedule import Kind
from moekernels.pipeline.simulate import Simulator
from moekernels.pipeline.trace import Event

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import bench_schedules  # noqa: E402
import flush_costs  # noqa: E402
from flush_costs import Setting  # noqa: E402


def ran(name: str, pp: int, microbatches: int, price: dict[Kind, float]) -> list[list[Event]]:
    """A flush of both ranks; those of one stage do the same."""
    run = Simulator(build(name, pp, microbatches))
    events = run.run(lambda stage, _, kind: price[kind] * (1 + stage)).events
    return [[e for e in events if e.stage == rank % pp] for rank in range(2)]


def test_two_stages_are_predicted_as_they_ran():
    price = {Kind.F: 1.0, Kind.B: 2.1, Kind.I: 1.3, Kind.W: 0.8}
    flushes = {name: [ran(name, 2, 4, price)] * 3 for name in flush_costs.SCHEDULES}
    for name, seconds in flush_costs.predict(Setting(2, 4), flushes, []).items():
        assert seconds == pytest.approx(flush_costs.makespan(flushes[name][0])), name


def cut(microbatches: int, ahead: list[float], back: list[float]) -> list[Event]:
    """Pairs of one stage, their pieces as long as said; the first forward and the last backward
    alone."""
    now, events = 0.0, []

    def add(kind: Kind, number: int, takes: float) -> None:
        nonlocal now
        events.append(Event(0, kind, 0, number, now, now + takes))
        now += takes

    add(Kind.F, 0, sum(ahead))
    for number in range(1, microbatches):
        sides = {True: iter(ahead), False: iter(back)}
        for piece in interleave(*passes(range(len(ahead) // 2))):
            kind, of = (Kind.F, number) if piece.forward else (Kind.B, number - 1)
            add(kind, of, next(sides[piece.forward]))
    add(Kind.B, microbatches - 1, sum(back))
    return events


def test_one_stage_is_predicted_with_what_each_schedule_waits_for():
    """Of two layers, whose experts take 1 and weights' gradients 0.6, over a link of 0.7."""
    ahead, back = [0.5, 1.0, 0.5, 1.0, 0.1], [0.0, 0.0, 1.0, 0.5, 0.6, 1.0, 1.1]
    price = {Kind.F: sum(ahead), Kind.B: sum(back), Kind.I: sum(back) - 1.2, Kind.W: 1.2}
    flushes = {name: [ran(name, 1, 4, price)] for name in ("1f1b", "zb")}
    flushes["overlap"] = [[cut(4, ahead, back)] * 2]
    stamps = [
        Stamps(0, 0, 700_000_000, 0, 0, 0, 9, 4 * layer + way)
        for layer in (0, 1)
        for way in (OUT, BACK, GRAD_OUT, GRAD_BACK)
    ]
    found = flush_costs.predict(Setting(1, 4, 0.3), flushes, stamps)
    own, waits = 4 * (sum(ahead) + sum(back)), 4 * 8 * 0.7
    assert found["zb"] == pytest.approx(own + waits)
    assert found["1f1b"] == pytest.approx(own + waits - 4 * 2 * 0.6)
    # the first forward, and the last backward, wait as 1F1B's do
    alone = 4 * 0.7 + 4 * 0.7 - 2 * 0.6
    assert own + alone <= found["overlap"] <= own + alone + 3 * 4 * 0.2


def test_an_order_is_right_but_for_what_differs_and_was_not_foreseen():
    measured = {"1f1b": [1.0, 1.01, 0.99], "zb": [0.9, 0.909, 0.891], "overlap": [1.02] * 3}
    told = bench_schedules.judged(measured, {"1f1b": 1.0, "zb": 0.95, "overlap": 1.1})
    assert told["right"] and [row["tie"] for row in told["pairs"]] == [False, True, False]
    for zb in (1.0, 1.05):  # equal, and the other way round
        told = bench_schedules.judged(measured, {"1f1b": 1.0, "zb": zb, "overlap": 1.1})
        assert not told["right"] and not told["pairs"][0]["right"]
    noisy = {**measured, "zb": [0.9, 1.3, 0.5]}
    assert bench_schedules.judged(noisy, {"1f1b": 1.0, "zb": 1.05, "overlap": 1.1})["right"]


def test_parts_of_one_commit_join(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    monkeypatch.setattr(bench_schedules, "where", lambda: {"machine": "a", "commit": "b"})
    for name in ("pp2 m4", "pp1 m4 link 0.3"):
        found = bench_schedules.joined(path, {"order": [{"setting": name}]})
        path.write_text(bench_schedules.jsonio.dumps(found))
    assert [row["setting"] for row in found["order"]] == ["pp1 m4 link 0.3", "pp2 m4"]
    monkeypatch.setattr(bench_schedules, "where", lambda: {"machine": "a", "commit": "c"})
    assert bench_schedules.joined(path, {"two": {}})["order"] == []
