"""bar.sync and its kin: who waits, who is let go, what that orders."""

from dataclasses import dataclass

import numpy as np

from .clusters import bind_cluster_barrier
from .errors import DivergentBarrier, Unsupported
from .machine import Lanes, Machine, instruction
from .schedule import Waits
from .syntax import Instruction
from .warp import bind_warp_sync


@dataclass
class _Arrival:
    pc: int
    ids: np.ndarray
    waits: bool
    need: np.ndarray | None  # threads per block that the barrier expects, None for all alive
    reduce: object = None  # (function, predicate values, target) of bar.red


class BlockBarriers(Waits):
    """The 16 hardware barriers of every block."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.arrivals: dict[int, list[_Arrival]] = {}

    def arrive(self, number: int, arrival: _Arrival) -> None:
        self.arrivals.setdefault(number, []).append(arrival)
        self.release_complete(number)

    def release_complete(self, number: int) -> None:
        """Let the blocks go in which everyone has arrived."""
        machine, entries = self.machine, self.arrivals[number]
        blocks = machine.num_blocks
        counts = sum(np.bincount(machine.block_of[e.ids], minlength=blocks) for e in entries)
        alive = np.bincount(machine.block_of[machine.alive], minlength=blocks)
        need = alive.copy()
        for entry in entries:
            if entry.need is not None:
                need[machine.block_of[entry.ids]] = entry.need
        done = (counts > 0) & (counts >= need)
        if not done.any():
            return
        self._refuse_divergence(number, entries, done)
        self._reduce(entries, done)
        released, left = [], []
        for entry in entries:
            chosen = done[machine.block_of[entry.ids]]
            if entry.waits:
                released.append((entry.pc + 1, entry.ids[chosen]))
            if not chosen.all():
                rest = ~chosen
                need_rest = None if entry.need is None else entry.need[rest]
                reduce = entry.reduce
                if reduce is not None:
                    reduce = (reduce[0], reduce[1][rest], reduce[2])
                left.append(_Arrival(entry.pc, entry.ids[rest], entry.waits, need_rest, reduce))
        self.arrivals[number] = left
        memory = machine.memory
        if memory.shared_races is not None:
            everyone = np.concatenate([e.ids[done[machine.block_of[e.ids]]] for e in entries])
            warps = np.unique(machine.warp[everyone])
            memory.shared_races.barrier(warps)
            memory.global_races.barrier(warps)
        for pc, ids in released:
            machine.scheduler.push(pc, ids)

    def _refuse_divergence(self, number: int, entries: list[_Arrival], done: np.ndarray) -> None:
        """Every warp must be there as a whole, at one instruction."""
        machine = self.machine
        warps = machine.num_blocks * machine.warps_per_block
        there = np.zeros(warps, np.int64)
        where = np.full(warps, -1)
        for entry in entries:
            ids = entry.ids[done[machine.block_of[entry.ids]]]
            of = machine.warp[ids]
            apart = (where[of] >= 0) & (where[of] != entry.pc)
            if apart.any():
                other = machine.kernel.code[int(where[of][apart][0])]
                machine.fail(
                    DivergentBarrier,
                    f"barrier {number}: threads of one warp arrive from another instruction, "
                    f"{machine.quote(other)}",
                    ids[apart][0],
                    machine.kernel.code[entry.pc],
                )
            where[of] = entry.pc
            there += np.bincount(of, minlength=warps)
        exist = np.bincount(machine.warp, minlength=warps)
        partial = (there > 0) & (there < exist)
        if partial.any():
            warp = int(np.flatnonzero(partial)[0])
            entry = next(e for e in entries if (machine.warp[e.ids] == warp).any())
            ids = entry.ids[machine.warp[entry.ids] == warp]
            machine.fail(
                DivergentBarrier,
                f"barrier {number}: only {there[warp]} of the warp's {exist[warp]} threads arrive; "
                "the others have taken another way or exited",
                ids[0],
                machine.kernel.code[entry.pc],
            )

    def _reduce(self, entries: list[_Arrival], done: np.ndarray) -> None:
        machine = self.machine
        voting = [e for e in entries if e.reduce is not None]
        if not voting:
            return
        ids = np.concatenate([e.ids for e in voting])
        votes = np.concatenate([e.reduce[1] for e in voting])
        blocks = machine.num_blocks
        yes = np.bincount(machine.block_of[ids[votes]], minlength=blocks)
        all_votes = np.bincount(machine.block_of[ids], minlength=blocks)
        results = {"popc": yes, "or": yes > 0, "and": yes == all_votes}
        for entry in voting:
            name, _, target = entry.reduce
            chosen = entry.ids[done[machine.block_of[entry.ids]]]
            target[chosen] = results[name][machine.block_of[chosen]]

    def exited(self, lanes: Lanes) -> None:
        for number, entries in self.arrivals.items():
            if entries:
                self.release_complete(number)

    def describe(self) -> list[str]:
        lines = []
        for number, entries in self.arrivals.items():
            for entry in entries:
                if entry.waits:
                    where = self.machine.where(
                        int(entry.ids[0]), self.machine.kernel.code[entry.pc]
                    )
                    lines.append(f"{len(entry.ids)} threads at barrier {number}: {where}")
        return lines


@instruction("bar", "barrier", blocking=True)
def _bind_barrier(machine: Machine, ins: Instruction):
    if "warp" in ins.mods:
        return bind_warp_sync(machine, ins)
    if "cluster" in ins.mods:
        return bind_cluster_barrier(machine, ins)
    kind = next((m for m in ins.mods if m in ("sync", "arrive", "red")), None)
    operands, reduce, target, vote = list(ins.operands), None, None, None
    if kind is None:
        raise Unsupported(f"`{ins.text}`")
    if kind == "red":
        reduce = next(m for m in ins.mods if m in ("popc", "and", "or"))
        target = machine.target(operands.pop(0), "u32" if reduce == "popc" else "pred", ins)
        vote = machine.source(operands.pop(), "pred", ins)
    number = machine.source(operands[0], "u32", ins)
    count = machine.source(operands[1], "u32", ins) if len(operands) > 1 else None
    barriers = machine.barriers

    def step(lanes):
        pc, numbers = machine.pc, number[lanes.at]
        for n in np.unique(numbers):
            some = lanes if (numbers == n).all() else lanes.where(numbers == n)
            need = None if count is None else count[some.at].astype(np.int64)
            voting = None if reduce is None else (reduce, vote[some.at].copy(), target)
            barriers.arrive(int(n), _Arrival(pc, some.ids, kind != "arrive", need, voting))
        return lanes if kind == "arrive" else None

    return step
