"""Zero bubble over several virtual stages: legal, within its limits, soon built and seldom idle."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moekernels.pipeline import greedy
from moekernels.pipeline.build import build, in_flight_limits
from moekernels.pipeline.check import check, peak_both, peak_held
from moekernels.pipeline.schedule import Kind
from moekernels.pipeline.simulate import Simulator
from python_tests.support.counting import at_most_calls


@settings(max_examples=25, deadline=None)
@example(4, 8, 3)  # a chunk's microbatches are made in another order than they are taken in
@example(8, 40, 3)
@example(2, 1, 2)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(2, 4))
def test_it_is_legal_and_keeps_its_limits(stages, microbatches, virtual_stages):
    schedule = build("zb", stages, microbatches, virtual_stages)
    check(schedule)
    most = virtual_stages * min(stages, microbatches)
    assert schedule.both_limit == (most,) * stages
    assert max(peak_both(schedule)) == most
    limits = in_flight_limits("interleaved", stages, microbatches, virtual_stages)
    assert most <= max(limits)


@pytest.mark.parametrize("size", [(4, 8, 2), (4, 32, 2), (5, 13, 3), (1, 3, 2)])
def test_what_it_holds_is_what_its_actions_hold(size):
    schedule = build("zb", *size)
    for held, peaks in zip(greedy.held(*size), peak_held(schedule), strict=True):
        sums = {(sum(kept), sum(owed)) for kept, owed in held}
        assert peaks == {
            (a, b) for a, b in sums if not any(c >= a and d >= b for c, d in sums - {(a, b)})
        }


def idle(name: str, stages: int, microbatches: int, virtual_stages: int) -> float:
    """Seconds behind a rank's own work, where F, I and W take one each."""
    run = Simulator(build(name, stages, microbatches, virtual_stages))
    one = [1.0] * microbatches
    return run.makespan(one, [2.0] * microbatches) - 3 * microbatches * virtual_stages


@pytest.mark.parametrize(
    "size, most", [((4, 8, 2), 0.06), ((4, 32, 2), 0.02), ((2, 4, 2), 0.04), ((4, 32, 3), 0.018)]
)
def test_little_of_a_flush_is_idle(size, most):
    """At no more memory than 1F1B's first stage keeps; at 8 microbatches over 4 stages 1F1B idles
    for 27 % of a flush, interleaved 1F1B for 16 % and ZB-H1 for 11 %."""
    behind = idle("zb", *size)
    assert behind / (behind + 3 * size[1] * size[2]) <= most


def test_it_is_no_slower_than_interleaved_1f1b():
    for stages, microbatches in itertools.product(range(2, 9), (*range(1, 14), 16, 24, 32)):
        assert idle("zb", stages, microbatches, 2) <= idle("interleaved", stages, microbatches, 2)


def test_weights_come_in_the_order_of_micro_batches():
    """Of each chunk, so that sums have the bits of 1F1B's."""
    schedule = build("zb", 4, 9, 3)
    for rank, chunk, kind in itertools.product(range(4), range(3), "FIW"):
        mine = [a for a in schedule.computations(rank) if (a.kind, a.chunk) == (Kind(kind), chunk)]
        assert [a.microbatch for a in mine] == list(range(9))


def test_it_is_soon_built():
    """In less than 50 ms, at four million calls a second."""
    greedy.orders.cache_clear()
    with at_most_calls(200_000):
        build("zb", 8, 40, 3)
