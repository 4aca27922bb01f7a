"""griddepcontrol: launches that begin before the one ahead of them in their stream has ended.

A launch that is `programmatic` may begin once every block of the one ahead has executed
launch_dependents, by any of its threads, or has exited. That orders nothing: until a thread has
executed wait, which returns when the launch ahead has ended, it is behind what that launch itself
began behind and no more. So whatever touches memory too early is a race, and a launch in the middle
that never waits hands on nothing of those before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from .machine import Lanes, Machine, instruction
from .schedule import Waits
from .syntax import Instruction

if TYPE_CHECKING:
    from .memory_order import MachineOrder


class Ahead(Protocol):
    """The launch ahead, as one that waits for it sees it."""

    @property
    def done(self) -> bool: ...

    def end_clock(self) -> np.ndarray:
        """The clock that its end hands on."""


class Dependents(Waits):
    """What a machine's threads wait for, and which of its blocks let the next launch begin."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.triggered = np.zeros(machine.num_blocks, np.bool_)
        self.ahead: Ahead | None = None  # of a programmatic launch
        self.order: MachineOrder | None = None
        self.parked: list[tuple[int, np.ndarray]] = []  # (pc, threads)
        self.asleep = False  # nothing can run until the launch ahead has ended

    def trigger(self, lanes: Lanes) -> Lanes | None:
        """Once the last block has triggered, other machines have a turn."""
        before = self.let_go()
        self.triggered[self.machine.block_of[lanes.ids]] = True
        if before or not self.let_go():
            return lanes
        scheduler = self.machine.scheduler
        scheduler.push(self.machine.pc + 1, lanes.ids)
        scheduler.budget = 0
        scheduler.events += 1
        return None

    def let_go(self) -> bool:
        """Whether every block has triggered or exited."""
        blocks = self.machine.alive.reshape(self.machine.num_blocks, -1).any(axis=1)
        return bool((self.triggered | ~blocks).all())

    def wait(self, lanes: Lanes) -> Lanes | None:
        if self.ahead is None:
            return lanes
        if not self.ahead.done:
            self.parked.append((self.machine.pc, lanes.ids))
            return None
        self._pass(lanes.ids)
        return lanes

    def _pass(self, ids: np.ndarray) -> None:
        assert self.ahead is not None and self.order is not None
        self.order.behind_launch(ids, self.ahead.end_clock())

    def awake(self) -> bool:
        """Whether there is anything to run; threads whose launch ahead has ended go on."""
        if self.parked and self.ahead is not None and self.ahead.done:
            parked, self.parked, self.asleep = self.parked, [], False
            for pc, ids in parked:
                self._pass(ids)
                self.machine.scheduler.push(pc + 1, ids)
        return not self.asleep

    def describe(self) -> list[str]:
        where = self.machine.where
        return [
            f"{len(ids)} threads wait for the launch ahead: "
            f"{where(int(ids[0]), self.machine.kernel.code[pc])}"
            for pc, ids in self.parked
        ]


@instruction("griddepcontrol", blocking=True)
def _bind(machine: Machine, ins: Instruction):
    if "wait" in ins.mods:
        return lambda lanes: machine.dependents.wait(lanes)
    return lambda lanes: machine.dependents.trigger(lanes)
