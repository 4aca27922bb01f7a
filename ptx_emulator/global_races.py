"""Global-memory races, by the time of the last accesses of every cell.

Within a block two accesses are ordered if a barrier lies between them, between blocks if the first
block has released (atomic, fence) after its access and the second has acquired since. That is
coarser than the vector clocks of shared memory: it may acquit a wrong kernel.
"""

import numpy as np

from .errors import GlobalRace
from .machine import Lanes, Machine
from .syntax import Instruction

_THREAD, _WARP, _BLOCK, _GRID = range(4)


class GlobalShadow:
    """What a whole launch remembers of global memory, over all its batches of blocks."""

    def __init__(self, nbytes: int, grain: int, num_blocks: int):
        cells = nbytes // grain
        self.grain, self.cells = grain, cells
        self.write_thread = np.full(cells, -1, np.int64)
        self.write_time = np.zeros(cells, np.int64)
        self.write_atomic = np.zeros(cells, np.bool_)
        self.write_pc = np.zeros(cells, np.int32)
        self.read_thread = np.full(cells, -1, np.int64)
        self.read_time = np.zeros(cells, np.int64)
        self.read_scope = np.zeros(cells, np.int8)
        self.read_pc = np.zeros(cells, np.int32)
        self.released = np.full(num_blocks, -1, np.int64)
        self.acquired = np.full(num_blocks, -1, np.int64)


class GlobalRaces:
    def __init__(self, machine: Machine, shadow: GlobalShadow, memory):
        self.machine, self.shadow, self.memory = machine, shadow, memory
        self.per_block = 32 * machine.warps_per_block  # threads, padded to whole warps
        self.block = np.repeat(machine.blocks, machine.threads_per_block)
        self.thread = self.block * self.per_block + machine.thread
        warps = machine.num_blocks * machine.warps_per_block
        self.barrier_time = np.full(warps, -1, np.int64)
        self.warp_time = np.full(warps, -1, np.int64)

    @property
    def now(self) -> int:
        return self.machine.clock_base + self.machine.now

    def barrier(self, rows: np.ndarray) -> None:
        self.barrier_time[rows] = self.warp_time[rows] = self.now

    def warp_sync(self, rows: np.ndarray) -> None:
        self.warp_time[rows] = self.now

    def _release(self, ids: np.ndarray) -> None:
        self.shadow.released[self.block[ids]] = self.now

    def _acquire(self, ids: np.ndarray) -> None:
        self.shadow.acquired[self.block[ids]] = self.now

    def loaded(self, lanes: Lanes, offsets, ins: Instruction, values: np.ndarray) -> np.ndarray:
        """A strong load: what it sees is what memory holds."""
        self._acquire(lanes.ids)
        return values

    def stored(self, lanes: Lanes, offsets, ins: Instruction, values: np.ndarray) -> None:
        """A strong store or an atomic."""
        self._release(lanes.ids)
        if ins.op != "st":
            self._acquire(lanes.ids)

    def fence(self, lanes: Lanes, ins: Instruction) -> None:
        self._release(lanes.ids)
        self._acquire(lanes.ids)

    def proxy_fence(self, lanes: Lanes) -> None:
        """Global memory has one proxy here."""

    def landed(self, thread_id: int, offsets: np.ndarray, nbytes: int) -> None:
        """A bulk store counts from its beginning here."""

    def arrive(self, key, ids: np.ndarray, wide: bool = False) -> None:
        """Threads arrive at an mbarrier or, wide, at the cluster's barrier."""
        if wide:
            self._release(ids)

    def wait(self, key, ids: np.ndarray, wide: bool = False) -> None:
        self.barrier(np.unique(self.machine.warp[ids]))
        if wide:
            self._acquire(ids)

    def _unordered(self, ids, other, scope, time) -> np.ndarray:
        """Where an earlier access by `other` (or several threads near it) is unordered with ids."""
        machine, shadow = self.machine, self.shadow
        mine, row = self.thread[ids], machine.warp[ids]
        same_block = (other // self.per_block == self.block[ids]) & (scope < _GRID)
        same_warp = (other // 32 == mine // 32) & (scope <= _WARP)
        same_thread = (other == mine) & (scope == _THREAD)
        after = np.where(same_warp, self.warp_time[row], self.barrier_time[row])
        inside = same_block & ~same_thread & (time > after)
        across = ~same_block
        if across.any():
            block = np.clip(other // self.per_block, 0, None)
            ordered = (shadow.released[block] >= time) | (scope == _GRID)
            ordered &= shadow.acquired[self.block[ids]] > time
            across &= ~ordered
        return (inside | across) & (other >= 0)

    def access(self, lanes: Lanes, offsets, nbytes, ins, write: bool, atomic: bool) -> None:
        shadow = self.shadow
        cells, count = offsets // shadow.grain, max(1, nbytes // shadow.grain)
        ids = lanes.ids
        if count > 1:
            cells = (cells[:, None] + np.arange(count)).reshape(-1)
            ids = np.repeat(ids, count)
        writer = shadow.write_thread[cells]
        if (writer >= 0).any():
            bad = self._unordered(ids, writer, np.int8(_THREAD), shadow.write_time[cells])
            if atomic:
                bad &= ~shadow.write_atomic[cells]
            if bad.any():
                self._report(cells, ids, bad, writer, shadow.write_pc, "write", ins, write)
        if write:
            reader = shadow.read_thread[cells]
            if (reader >= 0).any():
                scope, time = shadow.read_scope[cells], shadow.read_time[cells]
                bad = self._unordered(ids, reader, scope, time)
                if bad.any():
                    self._report(cells, ids, bad, reader, shadow.read_pc, "read", ins, write)
            shadow.write_thread[cells] = self.thread[ids]
            shadow.write_time[cells] = self.now
            shadow.write_atomic[cells] = atomic
            shadow.write_pc[cells] = self.machine.pc
        elif not atomic:
            self._record_read(cells, ids)

    def _record_read(self, cells, ids) -> None:
        """Remember the reader; several unordered ones become their warp, block or the grid."""
        shadow, mine = self.shadow, self.thread[ids]
        reader, scope = shadow.read_thread[cells], shadow.read_scope[cells]
        joins = self._unordered(ids, reader, scope, shadow.read_time[cells])
        new_scope = np.where(joins, np.maximum(self._scope(reader, mine), scope), _THREAD)
        shadow.read_thread[cells] = mine
        shadow.read_scope[cells] = new_scope
        stored = shadow.read_thread[cells]
        if (stored != mine).any() or joins.any():
            together = np.maximum(new_scope, self._scope(stored, mine)).astype(np.int8)
            np.maximum.at(shadow.read_scope, cells, together)
        shadow.read_time[cells] = self.now
        shadow.read_pc[cells] = self.machine.pc

    def _scope(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The smallest unit that holds both threads."""
        return np.where(
            a == b,
            _THREAD,
            np.where(
                a // 32 == b // 32,
                _WARP,
                np.where(a // self.per_block == b // self.per_block, _BLOCK, _GRID),
            ),
        )

    def _report(self, cells, ids, bad, other, pcs, did: str, ins: Instruction, write) -> None:
        i = int(np.flatnonzero(bad)[0])
        where = self.memory.describe(int(cells[i]) * self.shadow.grain)
        thread = int(other[i])
        other_ins = self.machine.kernel.code[int(pcs[cells[i]])]
        what = (
            f"global-memory race: this {'write' if write else 'read'} of {where} is not ordered "
            f"after the {did} by block {thread // self.per_block} thread "
            f"{thread % self.per_block}, {self.machine.quote(other_ins)}"
        )
        self.machine.fail(GlobalRace, what, ids[i], ins)
