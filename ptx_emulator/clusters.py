"""Clusters: blocks that see one another's shared memory, and the barrier that they share.

An address of another block is the offset there with that block's rank + 1 above bit 24, as `mapa`
gives it; an address without a rank is the block's own. mbarrier arrivals and multicast copies take
such addresses; what else would go to another block's memory is refused as out of bounds.
"""

from __future__ import annotations

import numpy as np

from .errors import ClusterError, Unsupported
from .machine import Lanes, Machine, instruction
from .schedule import Waits
from .syntax import Instruction

_RANK = 24
_OFFSET = (1 << _RANK) - 1


def offset_of(addresses: np.ndarray) -> np.ndarray:
    """Where in its block's shared memory each address lies."""
    return addresses & _OFFSET


def block_of(machine: Machine, ids: np.ndarray, addresses: np.ndarray) -> np.ndarray:
    """The block (of the batch) that each thread's address names."""
    own, rank = machine.block_of[ids], addresses >> _RANK
    return np.where(rank > 0, own - own % machine.cluster + rank - 1, own)


def refuse_gone(machine: Machine, block: int, thread_id: int, ins: Instruction) -> None:
    """A block that has exited has no shared memory any more."""
    first = block * machine.threads_per_block
    if not machine.alive[first : first + machine.threads_per_block].any():
        number = int(machine.blocks[block])
        what = f"shared memory of block {number} of the cluster, which has exited"
        machine.fail(ClusterError, what, thread_id, ins)


class ClusterBarriers(Waits):
    """barrier.cluster: every thread arrives once, and goes on when all that live have."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.arrived = np.zeros(machine.size, np.bool_)
        self.passed = np.zeros(machine.size, np.bool_)  # may go by at their next wait
        self.waiting: list[tuple[int, np.ndarray]] = []  # (pc, threads)
        self.seen: dict[int, object] = {}  # what the arrivals of a cluster release
        self.released: dict[int, object] = {}

    def _cluster(self, ids: np.ndarray) -> np.ndarray:
        return self.machine.block_of[ids] // self.machine.cluster

    def arrive(self, lanes: Lanes, relaxed: bool, ins: Instruction) -> None:
        ids, machine = lanes.ids, self.machine
        if self.arrived[ids].any() or self.passed[ids].any():
            who = ids[self.arrived[ids] | self.passed[ids]][0]
            machine.fail(ClusterError, "a thread arrives twice without waiting", who, ins)
        self.arrived[ids] = True
        memory = machine.memory
        if not relaxed and memory.shared_races is not None:
            of = self._cluster(ids)
            for cluster in np.unique(of).tolist():
                memory.global_races.arrive(cluster, ids[of == cluster], wide=True)
                rows = np.unique(machine.warp[ids[of == cluster]])
                before = self.seen.get(cluster)
                self.seen[cluster] = memory.shared_races.release(rows, before)
        self._settle()

    def _settle(self) -> None:
        machine = self.machine
        missing = machine.alive & ~self.arrived
        of = machine.block_of // machine.cluster
        count = machine.num_blocks // machine.cluster
        late = np.bincount(of[missing], minlength=count)
        there = np.bincount(of[self.arrived & machine.alive], minlength=count)
        for cluster in np.flatnonzero((late == 0) & (there > 0)).tolist():
            members = self.arrived & (of == cluster)
            self.arrived[members] = False
            self.passed[members & machine.alive] = True
            self.released[cluster] = self.seen.pop(cluster, None)
        waiting, self.waiting = self.waiting, []
        for pc, ids in waiting:
            done = self.passed[ids]
            if done.any():
                self._go(ids[done])
                machine.scheduler.push(pc + 1, ids[done])
            if not done.all():
                self.waiting.append((pc, ids[~done]))

    def _go(self, ids: np.ndarray) -> None:
        """These threads pass the barrier, after what it released."""
        self.passed[ids] = False
        memory = self.machine.memory
        if memory.shared_races is None:
            return
        of = self._cluster(ids)
        for cluster in np.unique(of).tolist():
            rows = np.unique(self.machine.warp[ids[of == cluster]])
            if self.released.get(cluster) is not None:
                memory.shared_races.acquire(rows, self.released[cluster])
            memory.global_races.wait(cluster, ids[of == cluster], wide=True)

    def wait(self, lanes: Lanes, ins: Instruction) -> Lanes | None:
        ids = lanes.ids
        lost = ~(self.arrived[ids] | self.passed[ids])
        if lost.any():
            what = "a thread waits at the cluster's barrier without having arrived"
            self.machine.fail(ClusterError, what, ids[lost][0], ins)
        done = self.passed[ids]
        if done.any():
            self._go(ids[done])
        if done.all():
            return lanes
        self.waiting.append((self.machine.pc, ids[~done]))
        return lanes.where(done) if done.any() else None

    def exited(self, lanes: Lanes) -> None:
        if self.arrived.any():
            self._settle()

    def describe(self) -> list[str]:
        where = self.machine.where
        return [
            f"{len(ids)} threads at the cluster's barrier: "
            f"{where(int(ids[0]), self.machine.kernel.code[pc])}"
            for pc, ids in self.waiting
        ]


def bind_cluster_barrier(machine: Machine, ins: Instruction):
    if "arrive" in ins.mods:

        def arrive(lanes):
            machine.cluster_barriers.arrive(lanes, "relaxed" in ins.mods, ins)
            return lanes

        return arrive
    return lambda lanes: machine.cluster_barriers.wait(lanes, ins)


@instruction("mapa")
def _bind_map_address(machine: Machine, ins: Instruction):
    """The address of the same place in the shared memory of a block of the cluster."""
    source = machine.source(ins.operands[1], ins.type, ins)
    rank = machine.source(ins.operands[2], "u32", ins)
    target = machine.target(ins.operands[0], ins.type, ins)
    if machine.cluster > 1 and (ins.type != "u32" or ins.state_space() != "shared"):
        raise Unsupported(f"generic addresses of another block, `{ins.text}`")

    def step(lanes):
        ranks, own = rank[lanes.at].astype(np.int64), machine.block_of[lanes.ids]
        if (ranks >= machine.cluster).any():
            what = f"block {int(ranks.max())} of a cluster of {machine.cluster}"
            machine.fail(ClusterError, what, lanes.ids[int(ranks.argmax())], ins)
        other = np.where(ranks == own % machine.cluster, 0, ranks + 1 << _RANK)
        target[lanes.at] = source[lanes.at] + other.astype(np.uint64)

    return step
