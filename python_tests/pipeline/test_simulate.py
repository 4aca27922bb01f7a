"""The simulated clock agrees with the formulas of the literature and with a plain event loop."""

import json
import random
from itertools import pairwise

import pytest

from moekernels.pipeline.build import build
from moekernels.pipeline.check import peak_in_flight
from moekernels.pipeline.schedule import Kind
from moekernels.pipeline.simulate import Simulator, makespan
from moekernels.pipeline.trace import Event, trace_events, write_trace
from python_tests.support.counting import at_most_calls


def equal_costs(stage, microbatch, kind):
    return 1 if kind is Kind.F else 2


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [1, 2, 4, 7])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 8, 32])
def test_bubble_of_equal_costs(name, stages, microbatches):
    timeline = Simulator(build(name, stages, microbatches)).run(equal_costs)
    assert timeline.makespan == 3 * (microbatches + stages - 1)
    expected = (stages - 1) / (microbatches + stages - 1)
    assert timeline.bubble == pytest.approx([expected] * stages, abs=1e-15)


@pytest.mark.parametrize("costs", [(1, 1, 1), (1, 2, 1), (10, 13, 8), (2, 3, 2), (3, 3, 0)])
@pytest.mark.parametrize("stages", range(2, 9))
def test_idle_of_zb(stages, costs):
    """Behind its own work a rank idles for (p - 1)(F + I - W), where W is the shortest; with fewer
    microbatches than stages W cannot fill what it would."""
    forward, through, weights = costs
    price = dict(zip((Kind.F, Kind.I, Kind.W), costs))
    for microbatches in range(1, 41):
        split = Simulator(build("zb", stages, microbatches))
        found = split.run(lambda stage, microbatch, kind: price[kind])
        idle = found.makespan - microbatches * sum(costs)
        missing = max(0, stages - microbatches) * weights
        assert idle == (stages - 1) * (forward + through - weights) + missing
        assert found.busy == [microbatches * sum(costs)] * stages
        if costs == (1, 1, 1):  # a makespan halves what a backward takes
            assert split.makespan([1.0] * microbatches, [2.0] * microbatches) == found.makespan


@pytest.mark.parametrize("stages, microbatches", [(1, 1), (1, 6), (2, 5), (4, 9), (4, 32)])
def test_pairs_take_what_they_are_said_to(stages, microbatches):
    pairs = Simulator(build("overlap", stages, microbatches))
    alone = pairs.run(equal_costs)
    assert alone.makespan == 3 * (microbatches + stages - 1)  # as 1F1B: nothing is hidden
    costs = [1.0] * microbatches, [2.0] * microbatches
    assert pairs.makespan(*costs) == alone.makespan
    for stage in range(stages):
        order = [e for e in alone.events if e.stage == stage]
        assert all(
            a.end <= b.start + 1e-12 for a, b in pairwise(sorted(order, key=lambda e: e.start))
        )
        for kind, takes in ((Kind.F, 1), (Kind.B, 2)):
            spent = dict.fromkeys(range(microbatches), 0.0)
            for e in order:
                if e.kind is kind:
                    spent[e.microbatch] += e.end - e.start
            assert list(spent.values()) == pytest.approx([takes] * microbatches)
    seen = []

    def half(stage, forward, backward):
        seen.append((stage, forward, backward))
        return 1.5

    hidden = pairs.run(equal_costs, half)
    count = max(0, microbatches - 1)
    assert [(f, b) for s, f, b in seen if s == stages - 1] == [(i + 1, i) for i in range(count)]
    if stages == 1:
        assert hidden.makespan == 3 + 1.5 * count
    assert hidden.busy[-1] == pytest.approx(3 + 1.5 * count)


@pytest.mark.parametrize("virtual_stages", [2, 3, 4])
@pytest.mark.parametrize(
    "stages, microbatches", [(2, 2), (2, 3), (4, 4), (4, 6), (4, 8), (4, 9), (5, 32)]
)
def test_interleaving_divides_the_bubble(stages, microbatches, virtual_stages):
    """By the number of virtual stages, also where microbatches are no multiple of stages."""
    schedule = build("interleaved", stages, microbatches, virtual_stages)
    timeline = Simulator(schedule).run(equal_costs)
    assert timeline.makespan == 3 * (microbatches * virtual_stages + stages - 1)
    assert timeline.busy == [3 * microbatches * virtual_stages] * stages
    assert max(timeline.bubble) < (stages - 1) / (microbatches + stages - 1)


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_interleaving_with_fewer_microbatches_than_stages_is_no_slower_than_1f1b(microbatches):
    fine = Simulator(build("interleaved", 4, microbatches, 2)).run(equal_costs).makespan
    coarse = Simulator(build("1f1b", 4, microbatches)).run(equal_costs).makespan
    assert fine <= 2 * coarse  # its chunks are half as long


def event_loop(schedule, costs, latency):
    """The same by the plainest means: try every rank's next action until nothing moves."""
    clock = [0.0] * schedule.stages
    position = [0] * schedule.stages
    posted, sent, ends = {}, {}, {}
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if action.kind.computes:
                    need = schedule.needs(rank, action)
                    start = clock[rank]
                    if need:
                        if need not in sent:
                            break
                        ready = sent[need]
                        if schedule.stages > 1:
                            ready = max(ready, posted[need]) + latency
                        start = max(start, ready)
                    stage = schedule.virtual_stage(rank, action.chunk)
                    clock[rank] = start + costs(stage, action.microbatch, action.kind)
                    ends[rank, action] = clock[rank]
                    if schedule.stages == 1 and (output := schedule.makes(rank, action)):
                        sent[output] = clock[rank]
                elif action.kind.sends:
                    sent[schedule.message(rank, action)] = clock[rank]
                else:
                    posted[schedule.message(rank, action)] = clock[rank]
                position[rank] += 1
                moved = True
    return ends


@pytest.mark.parametrize(
    "name, virtual_stages", [("gpipe", 1), ("1f1b", 1), ("zb", 1), ("interleaved", 2), ("zb", 3)]
)
@pytest.mark.parametrize("stages, microbatches", [(1, 3), (2, 5), (4, 3), (4, 11)])
@pytest.mark.parametrize("latency", [0.0, 0.25])
def test_random_costs(name, stages, microbatches, virtual_stages, latency):
    draw = random.Random(5)
    table = {}

    def costs(stage, microbatch, kind):
        return table.setdefault((stage, microbatch, kind), draw.uniform(0.1, 3.0))

    schedule = build(name, stages, microbatches, virtual_stages)
    timeline = Simulator(schedule, latency).run(costs)
    expected = event_loop(schedule, costs, latency)
    found = {(e.stage, (e.kind, e.chunk, e.microbatch)): e for e in timeline.events}
    assert found.keys() == expected.keys()
    for key, end in expected.items():
        assert found[key].end == pytest.approx(end, rel=1e-12)
    assert timeline.makespan == pytest.approx(max(expected.values()), rel=1e-12)
    assert timeline.peak_in_flight == peak_in_flight(schedule)


def test_costs_per_microbatch():
    forward, backward = [1.0, 4.0, 2.0], [2.0, 8.0, 4.0]
    schedule = build("1f1b", 3, 3)
    by_table = Simulator(schedule, 0.5).run(
        lambda stage, microbatch, kind: (forward if kind is Kind.F else backward)[microbatch]
    )
    assert makespan(schedule, forward, backward, 0.5) == by_table.makespan
    assert makespan(build("forward", 3, 3), forward) == 1 + 4 + 4 + 4 + 2


def test_order_of_unequal_microbatches_matters():
    """What the search over orders relies on: one long microbatch first or last costs most."""
    schedule = build("1f1b", 4, 8)

    def of(costs):
        return makespan(schedule, costs, [2 * c for c in costs])

    middle = of([1, 1, 1, 1, 4, 1, 1, 1])
    assert middle < of([4, 1, 1, 1, 1, 1, 1, 1]) and middle <= of([1, 1, 1, 1, 1, 1, 1, 4])


def test_a_makespan_is_quick():
    """32 microbatches on 4 stages, 256 computations, took 27 us when this was written, as no
    function is called for each; a search asks for hundreds."""
    simulator = Simulator(build("1f1b", 4, 32))
    with at_most_calls(20):
        simulator.makespan([1.0] * 32, [2.0] * 32)


def test_trace(tmp_path):
    planned = Simulator(build("1f1b", 2, 3)).run(equal_costs).events
    entries = trace_events([*planned, Event(1, Kind.RECV_F, 0, 2, 0.5, 1.25)], step=7)
    write_trace(tmp_path / "trace.json", entries)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    entries = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in entries if e["name"] == "process_name"}
    assert names == {(0, "stage 0"), (1, "stage 1")}
    actions = [e for e in entries if e["ph"] == "X"]
    assert len(actions) == 2 * 2 * 3 + 1
    first = actions[0]
    assert first["name"] == "F0" and first["pid"] == 0 and (first["ts"], first["dur"]) == (0, 1e6)
    assert first["args"] == {"chunk": 0, "microbatch": 0, "step": 7}
    wait = next(e for e in actions if e["name"] == "RECV_F2")
    assert (wait["pid"], wait["tid"], wait["ts"], wait["dur"]) == (1, 1, 5e5, 7.5e5)
