"""What pairs of passes take and hold, as the planner counts them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from moekernels.model.layout import Layout
from moekernels.pipeline.build import in_flight_limits
from moekernels.pipeline.trace import exchange_events
from moekernels.plan.evaluate import batch_sizes, evaluate, lower_bound, play
from moekernels.plan.memory import (
    chunk_activations,
    chunk_bytes,
    layer_bytes,
    place_of,
    stage_memory,
)
from moekernels.plan.overlap import LayerTimes, exposed_in_pair
from moekernels.plan.search import Space, search
from moekernels.plan.strategy import Strategy
from moekernels.plan.tracks import tracks
from python_tests.support.plans import problem

SLOW = {"gpus": 2, "memory": 4e9, "overhead": 0.0, "backward_overhead": 0.0}


def strategy(schedule: str, pp: int = 1, microbatches: int = 8) -> Strategy:
    layout = Layout(dp=2, ep=2, pp=pp)
    return Strategy(layout, (4 // pp,) * pp, (0,) * pp, microbatches, schedule)


def test_what_a_pair_waits_for():
    def layer(flight: float) -> LayerTimes:
        return LayerTimes(0.5, 1.0, 1.0, 0.5, 1.0, flight, flight)

    assert exposed_in_pair((layer(0.5),) * 4) == pytest.approx(0.0)
    # the first gradient has but attention beside it, and is 0.3 longer
    assert exposed_in_pair((layer(0.8),)) == pytest.approx(0.3)
    assert 4 * 9.0 - 4.0 <= exposed_in_pair((layer(9.0),)) <= 4 * 9.0  # the link is the bound


@pytest.mark.parametrize("pp", [1, 2])
def test_pairs_hide_what_a_slow_link_takes(pp):
    """Where rows take no time, pairs take what 1F1B does; with two stages some more, as what a pass
    makes leaves with its pair."""
    for bandwidth, least, most in ((450e12, 0.999, (1.001, 1.06)[pp - 1]), (20e9, 0.5, 0.97)):
        task = problem(**{**SLOW, "gpus": 2 * pp}, link_bandwidth=bandwidth, latency=0.0)
        flushes = []
        for schedule in ("1f1b", "overlap"):
            s = strategy(schedule, pp)
            sl = batch_sizes(task.model, task.batch, 2, 8, 1)
            flushes.append(play(task, s, sl)[0].makespan)
            assert lower_bound(task, s, sl) <= flushes[-1]
        assert least <= flushes[1] / flushes[0] <= most


def test_the_hidden_part_is_no_part_of_the_step():
    task = problem(**SLOW, link_bandwidth=20e9)
    whole, pairs = (evaluate(task, strategy(name)) for name in ("1f1b", "overlap"))
    for name, seconds in whole.parts.items():
        if name not in ("expert exchange", "waiting"):
            assert pairs.parts[name] == pytest.approx(seconds), name
    # the first forward and the last backward have no other beside them
    exchange = whole.parts["expert exchange"]
    assert exchange / 8 * 0.9 < pairs.parts["expert exchange"] < exchange / 2
    assert pairs.step < whole.step - exchange / 2


@pytest.mark.parametrize("rank", [0, 1])
def test_the_planner_counts_what_pairs_hold(rank):
    """Twice the microbatches of 1F1B, two passes at work, and a layer's weights to come."""
    task, tokens = problem(), 512
    s = strategy("overlap", pp=2)
    one, two = (
        stage_memory(task.model, replace(s, schedule=name), rank, tokens)
        for name in ("1f1b", "overlap")
    )
    chunk = chunk_activations(
        task.model, place_of(s, tokens), s.kinds_of_layers(task.model, rank), rank == 0, rank == 1
    )
    kept = [in_flight_limits(name, 2, 8, 1)[rank] for name in ("1f1b", "overlap")]
    assert kept == [2 - rank, 2 * (2 - rank)]
    # The pair's own two are never whole at once: together they hold a layer more than one.
    whole = one.activations / kept[0]
    layer = layer_bytes(task.model, place_of(s, tokens)).total
    beside, _, _ = chunk_bytes(task.model, place_of(s, tokens), rank == 0, rank == 1)
    pair = whole + layer + beside
    assert two.activations == pytest.approx((kept[1] - 2) * whole + pair)
    assert two.working == pytest.approx(2 * one.working + chunk.owed / 2)  # of two layers
    assert two.messages > one.messages


def test_a_search_weighs_pairs_where_rows_are_exchanged():
    task = problem(**SLOW, link_bandwidth=20e9)
    for space, chosen in (
        (Space(dp=2, ep=2, microbatches=8, dispatcher="all_to_all"), "overlap"),
        (Space(dp=2, ep=1, microbatches=8), "1f1b"),
        (Space(dp=2, ep=2, microbatches=1, dispatcher="all_to_all"), "1f1b"),
        (Space(dp=2, ep=2, microbatches=8, dispatcher="all_gather"), "1f1b"),
    ):
        assert search(task, space).best.strategy.schedule == chosen, space
    cut = replace(task, cluster=replace(task.cluster, exchange_parts=2))
    space = Space(dp=2, ep=2, microbatches=8, dispatcher="all_to_all")
    assert search(cut, space).best.strategy.schedule == "1f1b"


@pytest.mark.parametrize("schedule", ["1f1b", "zb", "overlap"])
def test_a_planned_trace_has_the_exchanges(schedule):
    """Four of each layer and microbatch, each within the flush, and, where one waits for all, each
    within its pass."""
    task = problem(**{**SLOW, "gpus": 4}, link_bandwidth=20e9)
    events, exchanges = tracks(task, strategy(schedule, pp=2))
    end = max(e.end for e in events)
    for stage, numbers in ((0, (1, 2)), (1, (3, 4))):
        names = Counter(sent.name for sent in exchanges[stage])
        ways = ("dispatch", "combine", "combine's gradient", "dispatch's gradient")
        assert names == {f"{way} {number}": 8 for way in ways for number in numbers}
        passes = [e for e in events if e.stage == stage]
        for sent in exchanges[stage]:
            assert 0 <= sent.start < sent.end <= end + 1e-9 and sent.size > 0
            if schedule != "overlap":
                assert any(e.start <= sent.start and sent.end <= e.end + 1e-9 for e in passes)
            else:
                assert any(e.start - 1e-9 <= sent.start <= e.end + 1e-9 for e in passes)
    entries = exchange_events(0, exchanges[0], planned=True)
    assert entries[1]["args"] == {"bytes": exchanges[0][0].size, "planned": True}
    assert tracks(task, Strategy(Layout(dp=2, pp=2), (2, 2), (0, 0), 8, "zb"))[1] == {}
