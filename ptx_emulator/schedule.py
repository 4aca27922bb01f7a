"""Who runs next. Threads at the same instruction run as one group; groups split and merge again.

The lowest instruction runs first, so that the two sides of a branch meet behind it. With a seed,
warps fall into classes that run far ahead of one another, in an order drawn anew at every turn.
"""

import heapq
import sys

import numpy as np

from .errors import Deadlock, NoProgress, Trap, Unsupported
from .machine import BINDERS, BLOCKING, Lanes, Machine, instruction

_TURN = 1 << 32  # a group's key is rank * _TURN + pc
_CLASSES = 4
_FAIR_SHARE = 20_000  # steps after which even the lowest group lets others run


class Scheduler:
    def __init__(self, machine: Machine, seed: int | None, max_steps: int):
        self.machine, self.code = machine, machine.kernel.code
        self.steps = [None] * len(self.code)
        self.guards = [
            None if i.guard is None else machine.source(i.guard, "pred", i) for i in self.code
        ]
        self.counts = [0] * len(self.code)
        self.groups: dict[int, Lanes] = {}
        self.heap: list[int] = []
        self.limit = sys.maxsize
        self.steps_left = max_steps
        self.random = None if seed is None else np.random.default_rng(seed)
        self.ranks, self.class_of = [0], None
        if self.random is not None:
            warps = machine.num_blocks * machine.warps_per_block
            self.class_of = self.random.integers(0, _CLASSES, warps)[machine.warp]
            self.ranks = [int(r) for r in self.random.permutation(_CLASSES)]
        self.budget = self.began = 0
        self.events = 0  # what another machine could notice: writes, exits, a word seen changed
        self.polls: dict[int, tuple[int, int, int]] = {}  # thread: pc, offset of the word, value
        self.paused = False
        self.waits = []  # objects with `describe() -> list[str]`, told of exits, asked on deadlock
        self.idle = []  # functions that may complete something delayed: `() -> bool`
        self.in_flight: dict[str, object] = {}  # registers that asynchronous operations hold
        self.check_in_flight = None

    def delays(self) -> bool:
        """Whether asynchronous work that could happen now is put off: only with a seed."""
        return self.random is not None and bool(self.random.random() < 0.5)

    # ---- groups
    def push(self, pc: int, ids: np.ndarray, base: int | None = None) -> None:
        """Make threads runnable at `pc`."""
        if not len(ids):
            return
        if base is not None or self.class_of is None:
            self._push((base or 0) + pc, ids)
            return
        classes = self.class_of[ids]
        for c in np.unique(classes):
            self._push(self.ranks[c] * _TURN + pc, ids[classes == c])

    def _push(self, key: int, ids: np.ndarray) -> None:
        present = self.groups.get(key)
        if present is None:
            heapq.heappush(self.heap, key)
        else:
            ids = np.sort(np.concatenate([present.ids, ids]))
        self.groups[key] = Lanes(ids)
        self.limit = self.heap[0]

    def _redraw(self) -> None:
        """A new order of the classes."""
        self.ranks = [int(r) for r in self.random.permutation(_CLASSES)]
        groups, self.groups, self.heap = self.groups, {}, []
        for key, lanes in groups.items():
            self.push(key % _TURN, lanes.ids)

    def run(self) -> None:
        self.begin()
        while self.turn(sys.maxsize):
            pass
        self.end()

    def begin(self) -> None:
        self.push(0, self.machine.all_ids)

    def turn(self, budget: int) -> bool:
        """About `budget` instructions of groups; False when none can run any more."""
        self.budget = budget
        while self.budget > 0:
            if not self.heap:
                if any(complete() for complete in self.idle):
                    continue
                return False
            key = heapq.heappop(self.heap)
            self.limit = self.heap[0] if self.heap else sys.maxsize
            self.began, self.paused = self.machine.now, False
            self._run(key - key % _TURN, key % _TURN, self.groups.pop(key))
            self.budget -= self.machine.now - self.began
            if self.random is not None and self.heap and self.random.random() < 0.2:
                self._redraw()
            if self.random is not None and self.random.random() < 0.1:
                any(complete() for complete in self.idle)
        return True

    def polled(self, thread_id: int, offset: int, value: int, news: bool) -> None:
        """A thread has read a word that others write; without news it lets others run."""
        if news:
            self.polls.pop(thread_id, None)
            self.events += 1
            return
        self.polls[thread_id] = (self.machine.pc, offset, value)
        self.paused = True
        self.budget //= 2

    def only_polls(self) -> bool:
        """Whether all that could run is warps that wait for a word to change."""
        warps = self.machine.warp[list(self.polls)]
        return all(np.isin(self.machine.warp[g.ids], warps).all() for g in self.groups.values())

    def end(self) -> None:
        waiting = [line for wait in self.waits for line in wait.describe()]
        if waiting:
            more = f"\n  and {len(waiting) - 12} more" if len(waiting) > 12 else ""
            raise Deadlock(
                f"deadlock in {self.machine.kernel.name}; these wait for ever:\n  "
                + "\n  ".join(waiting[:12])
                + more
            )
        for wait in self.waits:
            wait.finish()

    def _run(self, base: int, pc: int, lanes: Lanes) -> None:
        """Run one group until it waits, ends, splits, or meets a group that is further behind."""
        code, steps, guards, counts, machine = (
            self.code,
            self.steps,
            self.guards,
            self.counts,
            self.machine,
        )
        share = _FAIR_SHARE if self.random is None else int(self.random.integers(50, 2000))
        share = min(share, self.budget)
        while True:
            if base + pc >= self.limit:
                self.push(pc, lanes.ids, base)
                return
            share -= 1
            if share < 0:
                self._yield(pc, lanes, base)
                return
            if pc >= len(code):
                self._exit(lanes)
                return
            ins = code[pc]
            counts[pc] += lanes.n
            machine.now += 1
            active = lanes
            guard = guards[pc]
            if guard is not None:
                chosen = guard[lanes.at]
                if ins.negated:
                    chosen = ~chosen
                n = np.count_nonzero(chosen)
                if n == 0:
                    pc += 1
                    continue
                if n < lanes.n:
                    active = Lanes(lanes.ids[chosen])
            if self.in_flight and not ins.registers.isdisjoint(self.in_flight):
                self.check_in_flight(ins, active)
            op = ins.op
            if op == "bra":
                if active is not lanes:
                    self.push(ins.target, active.ids, base)
                    self.push(pc + 1, lanes.ids[~chosen], base)
                    return
                pc = ins.target
            elif op in ("ret", "exit"):
                if active is not lanes:
                    self.push(pc + 1, lanes.ids[~chosen], base)
                self._exit(active)
                return
            elif op == "brx":
                if active is not lanes:
                    self.push(pc + 1, lanes.ids[~chosen], base)
                index = machine.source(ins.operands[0], "u32", ins)[active.at]
                for i in np.unique(index):
                    self.push(ins.target[int(i)], active.ids[index == i], base)
                return
            else:
                step = steps[pc]
                if step is None:
                    step = steps[pc] = self._bind(pc)
                if op in BLOCKING:
                    if active is not lanes:
                        self.push(pc + 1, lanes.ids[~chosen], base)
                    machine.pc = pc
                    lanes = step(active)
                    if lanes is None:
                        return
                else:
                    machine.pc = pc
                    step(active)
                    if self.paused:
                        share = 0
                pc += 1

    def _bind(self, pc: int):
        ins = self.code[pc]
        bind = BINDERS.get(ins.op)
        if bind is None:
            raise Unsupported(f"`{ins.text}` in {self.machine.kernel.name}")
        return bind(self.machine, ins)

    def _yield(self, pc: int, lanes: Lanes, base: int) -> None:
        self.steps_left -= self.machine.now - self.began
        if self.steps_left < 0:
            raise NoProgress(
                "step limit reached; still running: "
                + self.machine.where(int(lanes.ids[0]), self.code[pc])
            )
        if self.random is None:
            self.push(pc, lanes.ids, base + _TURN)
        elif self.paused:
            self.push(pc, lanes.ids, _CLASSES * _TURN)  # behind all others, until ranks are drawn
        else:
            self.push(pc, lanes.ids)
            self._redraw()
        self.paused = False

    def _exit(self, lanes: Lanes) -> None:
        self.machine.alive[lanes.ids] = False
        self.events += 1
        for wait in self.waits:
            wait.exited(lanes)


class Waits:
    """What the scheduler asks of anything that threads can wait on."""

    def describe(self) -> list[str]:
        """One line for each group of threads that still waits."""
        return []

    def exited(self, lanes: Lanes) -> None:
        """Some threads have exited."""

    def finish(self) -> None:
        """All threads have exited: complain of what was left undone."""


@instruction("trap", "brkpt")
def _bind_trap(machine: Machine, ins):
    return lambda lanes: machine.fail(Trap, "trap", lanes.ids[0], ins)


@instruction("call")
def _bind_call(machine: Machine, ins):
    if "__assertfail" in ins.text:
        return lambda lanes: machine.fail(Trap, "a device assert failed", lanes.ids[0], ins)
    raise Unsupported(f"a call of a function that is not inlined: `{ins.text}`")
