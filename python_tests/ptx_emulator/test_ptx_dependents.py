"""Launches that begin before the one ahead of them has ended: what griddepcontrol orders, and that
whoever relies on more is found."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import ptx_emulator as ptx

KERNELS = Path(__file__).parent / "kernels"
pytestmark = pytest.mark.skipif(ptx.nvcc() is None, reason="nvcc is not on PATH")
BLOCKS, THREADS = 3, 64
COUNT = BLOCKS * THREADS
MODES = [{}, {"lazy": True}, {"schedule": 1}, {"schedule": 2, "lazy": True}, {"resident": 4}]
BUGS = "none no_wait late_wait early_store one_thread_waits barrier_before_wait".split()
BUGS += ["never_triggers", "awaits_the_next"]


@cache
def module() -> ptx.Module:
    return ptx.load(KERNELS / "dependents.cu", arch="90a")


class Chain:
    """Launches of `link` over buffers by name; x holds 0, 1, ..."""

    def __init__(self) -> None:
        self.x = np.arange(COUNT, dtype=np.int32)
        self.at = {name: np.zeros(COUNT, np.int32) for name in "abc"} | {"x": self.x}
        flags = np.zeros(9, np.uint32)  # a launch adds to the word that the one ahead may poll
        self.flags = [flags[7 - i : 9 - i] for i in range(8)]
        self.launches: list[ptx.Launch] = []

    def add(self, source: str, target: str, bug: str = "none", programmatic: bool = True) -> Chain:
        flag = self.flags[len(self.launches)]
        args = [self.at[source], self.at[target], flag, BUGS.index(bug)]
        shape = ("link", BLOCKS, THREADS, args)
        self.launches.append(ptx.Launch(0, module(), *shape, programmatic=programmatic))
        return self

    def run(self, **how) -> list[int]:
        """The blocks of each launch that began early."""
        return [s.early for s in ptx.launch_together(self.launches, **how)]


@pytest.mark.parametrize("how", MODES, ids=str)
def test_a_chain_that_waits_computes_what_launches_in_turn_compute(how):
    """The third overwrites what the second reads, and the fourth reads what the third wrote."""
    chain = Chain().add("x", "a").add("a", "b").add("b", "a").add("a", "c")
    early = chain.run(**how)
    np.testing.assert_array_equal(chain.at["c"], chain.x + 4)
    np.testing.assert_array_equal(chain.at["b"], chain.x + 2)
    assert early[0] == 0 and all(count > 0 for count in early[1:]), early


@pytest.mark.parametrize("how", MODES, ids=str)
@pytest.mark.parametrize("bug", BUGS[1:6])
def test_a_link_that_touches_memory_too_early_is_found(bug, how):
    chain = Chain().add("x", "a").add("a", "b").add("b", "a", bug)
    with pytest.raises(ptx.GlobalRace):
        chain.run(**how)


@pytest.mark.parametrize("how", MODES, ids=str)
def test_a_link_that_never_waits_hides_those_before_it(how):
    """It touches nothing of theirs, but whoever waits for it alone does not wait for them."""
    right = Chain().add("x", "a").add("x", "b").add("a", "c")
    right.run(**how)
    np.testing.assert_array_equal(right.at["c"], right.x + 2)
    with pytest.raises(ptx.GlobalRace, match="read is not ordered|write is not ordered"):
        Chain().add("x", "a").add("x", "b", "no_wait").add("a", "c").run(**how)


def test_a_plain_launch_is_behind_the_one_ahead_and_only_by_its_waits_behind_others():
    chain = Chain().add("x", "a").add("a", "b", "no_wait", programmatic=False)
    assert chain.run() == [0, 0]  # in turn, whoever waits
    np.testing.assert_array_equal(chain.at["b"], chain.x + 2)
    with pytest.raises(ptx.GlobalRace):
        chain = Chain().add("x", "a").add("x", "b", "no_wait")
        chain.add("a", "c", programmatic=False).run()


def test_what_was_written_before_the_first_of_a_chain_may_be_read_without_a_wait():
    """All of a chain are behind what its first launch is behind."""
    chain = Chain().add("x", "a").add("x", "b", programmatic=False).add("a", "c", "late_wait")
    chain.run()
    np.testing.assert_array_equal(chain.at["c"], chain.x + 2)
    with pytest.raises(ptx.GlobalRace):
        Chain().add("x", "a").add("x", "b").add("a", "c", "late_wait").run()


def test_without_a_trigger_nothing_begins_early():
    chain = Chain().add("x", "a", "never_triggers").add("a", "b")
    assert chain.run() == [0, 0]
    np.testing.assert_array_equal(chain.at["b"], chain.x + 2)


def test_a_launch_that_waits_for_its_dependent_is_a_deadlock():
    chain = Chain().add("x", "a", "awaits_the_next").add("a", "b")
    with pytest.raises(ptx.Deadlock, match="(?s)wait for the launch ahead.*polls byte"):
        chain.run()


@pytest.mark.parametrize("how", MODES, ids=str)
def test_bulk_copies_see_what_the_launch_ahead_wrote_once_it_is_waited_for(how):
    x, a, b = (np.arange(COUNT, dtype=np.int32) for _ in range(3))
    for bug in (0, 1):
        first = ptx.Launch(0, module(), "bulk_link", BLOCKS, 64, [x, a, 0], programmatic=True)
        next = ptx.Launch(0, module(), "bulk_link", BLOCKS, 64, [a, b, bug], programmatic=True)
        if bug:
            with pytest.raises(ptx.GlobalRace):
                ptx.launch_together([first, next], **how)
        else:
            ptx.launch_together([first, next], **how)
            np.testing.assert_array_equal(b, x + 2)


def test_a_launch_alone_waits_for_nobody():
    x, out, flag = np.arange(COUNT, dtype=np.int32), np.zeros(COUNT, np.int32), np.zeros(2, "u4")
    module().launch("link", BLOCKS, THREADS, [x, out, flag, 0])
    np.testing.assert_array_equal(out, x[::-1] + 1)
