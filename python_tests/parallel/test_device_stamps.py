"""Stamps that kernels of an exchange make, from their records to a step's figures: records that are
made up, then threads over the CPU's kernels."""

from __future__ import annotations

import pytest
import torch

from moekernels.parallel import device_exchange, device_stamps, straight
from moekernels.parallel.device_stamps import stamps_of
from moekernels.parallel.measure import Measure, Stamps, flights_of, times_of
from moekernels.parallel.mesh import Group
from python_tests.support.exchanges import (
    EXPERTS,
    HIDDEN,
    Threads,
    group_of,
    in_steps,
    in_threads,
    learning,
)

END = 2**63 - 1


def record(**given: int) -> list[int]:
    """Of rank 0 of two: it sends from 1000 to 1040, and needs rows from 1010 on; the peer, whose
    clock is 500 ahead, sends from 1020 to 1090 of this rank's."""
    own = {
        "need": END - 1010, "waited": 0, "readers": 0, "waited_taking": 2 * 90, "takers": 2,
        "copied": 7, "rows": 5, "sending": END - 1000,
    }  # fmt: skip
    peers = {"began": 1000, "ended": 1035, "given": 1030}
    peers |= {"its_began": 1520, "its_ended": 1590, "its_given": 1040}
    return list({**own, **peers, **given}.values())


@pytest.mark.parametrize(
    "given, share, stamps",
    [
        ({}, 1.0, Stamps(1040, 1020, 1090, 1010, 1100, 47, 160, 9)),
        ({}, 0.25, Stamps(1000, 1020, 1090, 1010, 1100, 17, 160, 9)),
        # A product of 4 blocks read them while they came, of which two waited.
        (
            {"waited": 2 * 80, "readers": 4, "waited_taking": 0},
            0.25,
            Stamps(1000, 1020, 1090, 1010, 1050, 17, 160, 9),
        ),
        # Results that a product brought; the peer has none for this rank.
        (
            {"ended": 0, "given": 0, "its_ended": 0, "its_given": 0},
            1.0,
            Stamps(1000, 1020, 1020, 1010, 1100, 7, 160, 9),
        ),
        ({"need": 0, "waited_taking": 0, "takers": 0, "copied": 0}, 0.25,
         Stamps(1000, 1020, 1090, 1090, 1090, 10, 160, 9)),
    ],
)  # fmt: skip
def test_stamps_of_a_record(given, share, stamps):
    posted = device_stamps._Posted(9, 32, share)
    assert stamps_of(record(**given), 0, [0, 500], posted) == stamps
    later = stamps_of(record(**given), 0, [0, 500], posted, shift=7)
    assert later[:5] == tuple(t + 7 for t in stamps[:5]) and later[5:] == stamps[5:]


def steps(rank: int, groups: list[Group], layer) -> list[tuple[list[Stamps], tuple]]:
    """Of three steps, each of two layers forward and backward, what a rank's stamps say."""
    found = []
    measure = Measure(groups[rank], None, device_exchange.stamps_of(groups[rank]))
    assert measure.device is device_exchange.stamps_of(groups[rank])  # one a group
    for _ in range(3):
        learning(rank, groups, layer, torch.float32, {}, False)
        measure.read()
        times = measure.take()
        found.append((measure.stamps, times))
        measure.read()  # nothing was posted
        assert measure.take() == (0, 0, 0, 0, 0)
    return found


@pytest.mark.parametrize("layer", [in_steps, straight.experts])
def test_every_exchange_of_a_step_has_stamps(layer, monkeypatch):
    monkeypatch.setattr(device_stamps, "ROOM", 3)  # so that several chunks of memory are needed
    threads = Threads(2)
    found = in_threads(2, steps, [group_of(threads, rank, 2) for rank in range(2)], layer)
    for mine in found:
        for stamps, times in mine:
            # counts, out, back, the gradients out and back, of layers 0 and 1
            assert [s.label for s in stamps] == [-2, 0, 1, 2, 3, -2, 4, 5, 6, 7]
            assert times == times_of(stamps)
            for s in stamps:
                assert max(s.post, s.last) <= s.ready and s.need <= s.got and s.moving >= 0
            flights = flights_of(stamps, 0.0)
            names = ["counts", "dispatch 1", "combine 1", "combine's gradient 1"]
            assert [f.name for f in flights[5:9]] == names
        ends = [(stamps[0].post, stamps[-1].got) for stamps, _ in mine]
        assert all(a < b for a, b in ends) and ends == sorted(ends)
    sizes = [[s.size for s in rank[0][0]] for rank in found]
    # What ranks take in, in all, they send home.
    out, back, dout, dback = (sum(rank[5 + way] for rank in sizes) for way in (1, 2, 3, 4))
    assert out == back == dout == dback > 0 and out % (4 * HIDDEN) == 0
    assert EXPERTS == 2


def test_groups_without_memory_of_devices_have_none():
    assert device_exchange.stamps_of(Group(None, 0, 2, (0, 1))) is None
