"""Zero bubble over several virtual stages: legal, within its limits, soon built and seldom idle."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moekernels.pipeline import greedy
from moekernels.pipeline.build import build, found_by_clock, in_flight_limits
from moekernels.pipeline.check import check, peak_both, peak_held
from moekernels.pipeline.greedy import ALIKE, TYPICAL, Ticks
from moekernels.pipeline.schedule import Kind
from moekernels.pipeline.simulate import Simulator
from python_tests.support.counting import at_most_calls

COMPUTED_AGAIN = Ticks(10, 20, 10)


@settings(max_examples=25, deadline=None)
@example(4, 8, 3, ALIKE)  # a chunk's microbatches are made in another order than they are taken in
@example(5, 8, 3, TYPICAL)  # a sender has more to send than a receiver that is busy has asked for
@example(5, 13, 3, TYPICAL)
@example(8, 40, 3, TYPICAL)
@example(2, 1, 2, TYPICAL)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(2, 4), st.sampled_from([ALIKE, TYPICAL]))
def test_it_is_legal_and_keeps_its_limits(stages, microbatches, virtual_stages, ticks):
    schedule = build("zb", stages, microbatches, virtual_stages, ticks)
    check(schedule)
    least = virtual_stages * min(stages, microbatches)
    most = max(in_flight_limits("interleaved", stages, microbatches, virtual_stages))
    assert set(schedule.both_limit) in ({least}, {max(least, most)})
    assert max(peak_both(schedule)) <= schedule.both_limit[0]


@pytest.mark.parametrize("size", [(4, 8, 2), (4, 32, 2), (5, 13, 3), (1, 3, 2)])
def test_what_it_holds_is_what_its_actions_hold(size):
    schedule, orders = build("zb", *size), found_by_clock(*size).orders
    for held, peaks in zip(greedy.held(orders, size[2]), peak_held(schedule), strict=True):
        sums = {(sum(kept), sum(owed)) for kept, owed in held}
        assert peaks == {
            (a, b) for a, b in sums if not any(c >= a and d >= b for c, d in sums - {(a, b)})
        }


def idle(name: str, size: tuple[int, int, int], takes: Ticks, **found: Ticks) -> float:
    """Of a flush whose passes take `takes`."""
    price = dict(zip((Kind.F, Kind.I, Kind.W), takes))
    price[Kind.B] = takes.through + takes.weights
    run = Simulator(build(name, *size, **found)).run(lambda stage, microbatch, kind: price[kind])
    return 1 - size[1] * size[2] * sum(takes) / run.makespan


@pytest.mark.parametrize(
    "size, most", [((4, 8, 2), 0.06), ((4, 32, 2), 0.02), ((2, 4, 2), 0.04), ((4, 32, 3), 0.018)]
)
def test_little_of_a_flush_is_idle_where_passes_take_as_long(size, most):
    """At 8 microbatches over 4 stages 1F1B idles for 27 % of a flush, interleaved 1F1B for 16 % and
    ZB-H1 for 11 %."""
    assert idle("zb", size, ALIKE, ticks=ALIKE) <= most + 1e-12


@pytest.mark.parametrize("microbatches, most", [(8, 0.06), (32, 0.02)])
def test_it_needs_no_more_memory_than_1f1b_where_passes_take_as_long(microbatches, most):
    schedule = build("zb", 4, microbatches, 2, ALIKE)
    assert max(peak_both(schedule)) == 2 * max(in_flight_limits("1f1b", 4, microbatches, 1))
    assert idle("zb", (4, microbatches, 2), ALIKE, ticks=ALIKE) <= most


@pytest.mark.parametrize("ticks", [ALIKE, TYPICAL, COMPUTED_AGAIN])
@pytest.mark.parametrize("microbatches, most", [(8, 0.06), (32, 0.02)])
def test_little_is_idle_whatever_passes_take(microbatches, most, ticks):
    """In one order; that for passes which take as long idles for up to 22 % of these."""
    assert idle("zb", (4, microbatches, 2), ticks) <= most


def test_it_is_no_slower_than_interleaved_1f1b():
    """Where passes take as long, and in the order for those that do not from two rounds on."""
    for stages, microbatches in itertools.product(range(2, 9), (*range(1, 14), 16, 24, 32)):
        size = stages, microbatches, 2
        assert idle("zb", size, ALIKE, ticks=ALIKE) <= idle("interleaved", size, ALIKE), size
        for ticks in (ALIKE, TYPICAL, COMPUTED_AGAIN) if microbatches >= 2 * stages else ():
            assert idle("zb", size, ticks) <= idle("interleaved", size, ticks), (size, ticks)


def test_weights_come_in_the_order_of_micro_batches():
    """Of each chunk, so that sums have the bits of 1F1B's."""
    schedule = build("zb", 4, 9, 3)
    for rank, chunk, kind in itertools.product(range(4), range(3), "FIW"):
        mine = [a for a in schedule.computations(rank) if (a.kind, a.chunk) == (Kind(kind), chunk)]
        assert [a.microbatch for a in mine] == list(range(9))


def test_it_is_soon_built():
    """In less than 50 ms, at four million calls a second."""
    greedy.best.cache_clear()
    with at_most_calls(200_000):
        build("zb", 8, 40, 3)
