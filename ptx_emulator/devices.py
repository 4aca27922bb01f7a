"""Launches of several devices that run together and see one another's memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .errors import Deadlock, PtxError
from .launch import Module, Prepared, Stats
from .machine import Machine
from .memory import GlobalMemory
from .memory_order import Clocks, MachineOrder, Order
from .syntax import Kernel

_MOST_THREADS = 1 << 14
_ROUNDS = 8  # in which nothing moves and everybody polls, before it counts as a deadlock


@dataclass
class Launch:
    """A launch on one device; what a stream is given runs in that order.

    programmatic: it may begin before the one ahead of it has ended (`dependents`)."""

    device: int
    module: Module
    kernel: str | Kernel
    grid: int | tuple[int, ...]
    block: int | tuple[int, ...]
    args: list
    shared_bytes: int = 0
    stream: int = 0
    cluster: int = 1
    programmatic: bool = False


@dataclass
class _Running:
    """How far a launch is."""

    launch: Launch
    prepared: Prepared
    first: int  # number of its first thread among those of all launches
    blocks: int
    seed: int | None
    started: int = 0
    early: int = 0  # blocks that began before the launch ahead had ended
    behind: np.ndarray | None = None  # the clock of what it began behind
    clocks: Clocks | None = None
    handed_on: np.ndarray | None = None
    machines: list[Machine] = field(default_factory=list)
    ended: list[Machine] = field(default_factory=list)

    @property
    def threads(self) -> np.ndarray:
        return self.first + np.arange(self.blocks * int(np.prod(self.prepared.block)))

    @property
    def done(self) -> bool:
        return self.started == self.blocks and not self.machines

    def lets_go(self) -> bool:
        """Whether a programmatic launch behind this one may begin."""
        return self.started == self.blocks and all(m.dependents.let_go() for m in self.machines)

    def end_clock(self) -> np.ndarray:
        """The clock that the end of this launch hands on."""
        if self.handed_on is None:
            assert self.clocks is not None
            self.handed_on = self.clocks.end(self.threads)
        return self.handed_on

    def resident(self) -> int:
        """Blocks that have not exited."""
        return sum(int(m.alive.reshape(m.num_blocks, -1).any(axis=1).sum()) for m in self.machines)


def launch_together(
    launches: list[Launch],
    *,
    resident: int | None = None,
    schedule: int | None = None,
    lazy: bool = False,
    max_steps: int = 3_000_000,
    began: int = 0,
    ahead: dict[int, int] | None = None,
) -> list[Stats]:
    """Run launches of several devices over one memory, interleaved; arrays are written in place.

    An array among the arguments of several launches is memory that their devices share. Accesses
    are judged by address and scope (`memory_order`), whatever device makes them.

    resident: blocks that a device has room for at a time, all its launches together; the others
        wait until blocks exit. None: room for all.
    schedule: a seed for who runs, how far, and which of its values a polled word shows.
    lazy: asynchronous work takes effect as late as it may, and polls see every value in turn.
    began: what %globaltimer, which counts the steps of all, shows at first;
    ahead: and by how much that of some devices is ahead of it.
    """
    with np.errstate(all="ignore"):
        return _Together(launches, resident, schedule, lazy, max_steps, began, ahead or {}).run()


class _Together:
    def __init__(self, launches, resident, seed, lazy: bool, max_steps: int, began: int, ahead):
        self.room, self.lazy, self.max_steps = resident, lazy, max_steps
        self.time, self.ahead = began, ahead
        self.random = None if seed is None else np.random.default_rng(seed)
        self.memory = GlobalMemory()
        self.running: list[_Running] = []
        placed: dict[int, dict] = {}
        first = 0
        for launch in launches:
            kernel = launch.kernel
            if not isinstance(kernel, Kernel):
                kernel = launch.module.kernel(kernel)
            shape = (launch.grid, launch.block, launch.args, launch.shared_bytes, launch.cluster)
            prepared = Prepared(launch.module, kernel, *shape, self.memory)
            prepared.place_variables(placed.setdefault(launch.device, {}))
            blocks = int(np.prod(prepared.grid))
            own = None if seed is None else int(self.random.integers(1 << 31))
            self.running.append(_Running(launch, prepared, first, blocks, own))
            first += blocks * int(np.prod(prepared.block))
        if first > _MOST_THREADS:
            raise PtxError(f"{first} threads run together, at most {_MOST_THREADS} can")
        addresses = self.memory.add([a for r in self.running for a in r.prepared.arrays()])
        self.memory.seal()
        for running in self.running:
            running.prepared.bind(addresses)
        grain = min(r.prepared.grain("global") for r in self.running)
        self.order = Order(self.memory, grain, max(first, 1))
        self.still = 0  # turns since anything moved

    def run(self) -> list[Stats]:
        try:
            while not all(r.done for r in self.running):
                self._admit()
                live = [(r, m) for r in self.running for m in r.machines]
                awake = [(r, m) for r, m in live if m.dependents.awake()]
                if not awake:
                    self._give_up(live)
                for running, machine in self._chosen(awake):
                    self._turn(running, machine)
                if self.still > _ROUNDS * len(awake):
                    self._give_up(live)
        finally:
            self.memory.copy_back()
        return [self._stats(r) for r in self.running]

    # ---- room
    def _admit(self) -> None:
        """Blocks start where there is room, and what their stream has before them has ended."""
        free: dict[int, int] = {}
        for number, running in enumerate(self.running):
            device = running.launch.device
            if device not in free:
                mine = [r for r in self.running if r.launch.device == device]
                held = sum(r.resident() for r in mine)
                free[device] = (self.room or 0) - held
            before = self._before(number)
            if running.started == running.blocks or not self._may_begin(running, before):
                continue
            left, cluster = running.blocks - running.started, running.prepared.cluster
            count = left if self.room is None else min(left, free[device])
            count -= count % cluster
            if count > 0:
                free[device] -= count
                self._start(running, count, before)

    def _may_begin(self, running: _Running, before: _Running | None) -> bool:
        if before is None or before.done:
            return True
        return running.launch.programmatic and before.lets_go()

    def _before(self, number: int) -> _Running | None:
        """What the launch's stream was given just before it."""
        mine = self.running[number].launch
        key = mine.device, mine.stream
        earlier = [r for r in self.running[:number] if (r.launch.device, r.launch.stream) == key]
        return earlier[-1] if earlier else None

    def _start(self, running: _Running, count: int, before: _Running | None) -> None:
        blocks = np.arange(running.started, running.started + count)
        prepared = running.prepared
        seed = None if running.seed is None else running.seed + running.started
        machine = prepared.machine(blocks, self.lazy, seed, self.max_steps, True)
        machine.device = running.launch.device
        first = running.first + running.started * int(np.prod(prepared.block))
        running.clocks = self.order.clocks
        if before is not None:
            running.behind = before.behind if running.launch.programmatic else before.end_clock()
            running.early += 0 if before.done else count
        order = MachineOrder(machine, self.order, first, running.launch.device, running.behind)
        machine.memory.global_races = order
        if running.launch.programmatic:
            machine.dependents.ahead, machine.dependents.order = before, order
        machine.scheduler.begin()
        running.started += count
        running.machines.append(machine)
        self.still = 0

    # ---- turns
    def _chosen(self, live: list) -> list:
        """Who runs next: all of them, or with a seed one, for a while."""
        if self.random is None:
            return live
        return [live[int(self.random.integers(len(live)))]]

    def _turn(self, running: _Running, machine: Machine) -> None:
        scheduler = machine.scheduler
        events = scheduler.events
        budget = 400 if self.random is None else int(2 ** self.random.uniform(3, 12))
        before = machine.now
        machine.others = self.time + self.ahead.get(machine.device, 0) - before
        ran = scheduler.turn(budget)
        self.time += machine.now - before
        if not ran and machine.dependents.parked:
            machine.dependents.asleep = True
            self.still = 0
        elif not ran:
            scheduler.end()
            running.machines.remove(machine)
            running.ended.append(machine)
            self.still = 0
        elif scheduler.events != events or not scheduler.only_polls():
            self.still = 0
        elif any(complete() for complete in scheduler.idle):
            self.still = 0
        else:
            self.still += 1

    def _give_up(self, live: list) -> None:
        lines = [line for _, m in live for wait in m.scheduler.waits for line in wait.describe()]
        for _, machine in live:
            for thread, (pc, offset, value) in machine.scheduler.polls.items():
                where = machine.where(thread, machine.kernel.code[pc])
                lines.append(f"polls {self.memory.describe(offset)}, which holds {value}: {where}")
        for running in self.running:
            left = running.blocks - running.started
            if left:
                lines.append(
                    f"{left} blocks of {running.prepared.kernel.name} have no room on device "
                    f"{running.launch.device} (resident={self.room}), or wait for their stream"
                )
        more = f"\n  and {len(lines) - 16} more" if len(lines) > 16 else ""
        raise Deadlock("nothing moves any more:\n  " + "\n  ".join(lines[:16]) + more)

    def _stats(self, running: _Running) -> Stats:
        stats = Stats()
        for machine in running.ended:
            stats.steps += machine.now
            for ins, count in zip(machine.kernel.code, machine.scheduler.counts):
                stats.by_op[ins.op] += count
            for kind, warps in machine.copies.bulk_warps.items():
                stats.bulk_warps.setdefault(kind, set()).update(warps)
        stats.instructions, stats.early = sum(stats.by_op.values()), running.early
        return stats


__all__ = ["Launch", "launch_together"]
