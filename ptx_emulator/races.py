"""Shared-memory races by vector clocks: what an access conflicts with must have happened before.

Actors are the warps of a block (of all blocks of a cluster) and, for asynchronous work, one more
for every warp (wgmma and cp.async that it issued), eight a block for TMA loads (by mbarrier), and
where there are TMA stores another for every warp. `seen[w, a]` is the last epoch of actor a that
warp w is ordered after; of its own epochs that is the one the last barrier finished.
"""

import numpy as np

from .errors import AsyncHazard, ProxyFenceMissing, SharedRace, UninitializedRead
from .machine import Lanes, Machine
from .syntax import Instruction

IN_FLIGHT = np.int32(1 << 30)  # the epoch of a write that nobody can have waited for yet
_LOADS = 8
_MANY = -2  # several lanes of a warp


class SharedRaces:
    def __init__(self, machine: Machine, nbytes: int, stride: int, grain: int, actors: str):
        self.machine, self.grain, self.stride = machine, grain, stride
        # The blocks of a cluster see one another's memory: their warps are actors of one unit.
        warps = self.warps = machine.warps_per_block * machine.cluster
        loads = warps + _LOADS * machine.cluster
        self.actors = warps + {"": 0, "loads": loads, "stores": loads + warps}[actors]
        cells = nbytes // grain
        self.seen = np.zeros((machine.num_blocks * warps, self.actors), np.int32)
        self.write_actor = np.full(cells, -1, np.int16)
        self.write_epoch = np.zeros(cells, np.int32)
        self.write_lane = np.zeros(cells, np.int8)
        self.write_pc = np.zeros(cells, np.int32)
        self.write_atomic = np.zeros(cells, np.bool_)
        self.read_epoch = np.zeros((cells, self.actors), np.int32)
        self.read_lane = np.zeros((cells, warps), np.int8)
        self.read_pc = np.zeros(cells, np.int32)
        self.fenced = np.zeros(machine.num_blocks * warps, np.int32)
        self.fence_seen = np.zeros_like(self.seen)
        units = machine.num_blocks // machine.cluster
        self.async_epoch = np.zeros((units, self.actors), np.int32)

    def cells(self, offsets: np.ndarray, nbytes: int) -> tuple[np.ndarray, int]:
        """Cells of accesses of `nbytes` each, and how many an access has."""
        first, count = offsets // self.grain, max(1, nbytes // self.grain)
        if count == 1:
            return first, 1
        return (first[:, None] + np.arange(count)).reshape(-1), count

    # ---- accesses of ordinary instructions
    def access(self, lanes: Lanes, offsets, nbytes, ins, write: bool, atomic: bool) -> None:
        cells, count = self.cells(offsets, nbytes)
        ids = lanes.ids if count == 1 else np.repeat(lanes.ids, count)
        machine = self.machine
        row, lane = machine.warp[ids], machine.lane[ids]
        warp = row % self.warps
        self._check_writes(cells, ids, row, warp, lane, ins, write, atomic)
        if write:
            self._check_reads(cells, ids, row, warp, lane, ins)
            self.record_write(cells, row, warp, lane, atomic)
        elif not atomic:
            self._record_read(cells, row, warp, lane)

    def _check_writes(self, cells, ids, row, warp, lane, ins, write, atomic) -> None:
        actor, epoch = self.write_actor[cells], self.write_epoch[cells]
        known = actor >= 0
        if not known.all() and (atomic or not write):
            i = int(np.flatnonzero(~known)[0])
            what = f"read of shared byte {self._address(cells[i])}, which nothing has written"
            self.machine.fail(UninitializedRead, what, ids[i], ins)
        bad = known & (epoch > self.seen[row, actor])
        if not bad.any():
            return
        bad &= (actor != warp) | (self.write_lane[cells] != lane)
        if atomic:
            bad &= ~self.write_atomic[cells]
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            self._report(cells[i], int(actor[i]), "write", ids[i], ins, write)

    def _check_reads(self, cells, ids, row, warp, lane, ins) -> None:
        late = self.read_epoch[cells] > self.seen[row]
        if not late.any():
            return
        i = np.flatnonzero(late[np.arange(len(cells)), warp])
        late[i, warp[i]] = self.read_lane[cells[i], warp[i]] != lane[i]
        if late.any():
            i, actor = (int(v[0]) for v in np.nonzero(late))
            self._report(cells[i], actor, "read", ids[i], ins, True)

    def record_write(self, cells, row, warp, lane, atomic=False) -> None:
        self.write_actor[cells] = warp
        self.write_epoch[cells] = self.seen[row, warp] + 1
        self.write_lane[cells] = lane
        self.write_pc[cells] = self.machine.pc
        self.write_atomic[cells] = atomic

    def _record_read(self, cells, row, warp, lane) -> None:
        now = self.seen[row, warp] + 1
        again = self.read_epoch[cells, warp] == now
        before = self.read_lane[cells, warp]
        self.read_epoch[cells, warp] = now
        self.read_lane[cells, warp] = np.where(again & (before != lane), _MANY, lane)
        shared = self.read_lane[cells, warp] != lane  # another lane of this very instruction
        if shared.any():
            self.read_lane[cells[shared], warp[shared]] = _MANY
        self.read_pc[cells] = self.machine.pc

    def _address(self, cell: int) -> str:
        return f"{int(cell) * self.grain % self.stride:#x}"

    def _report(self, cell: int, actor: int, did: str, thread_id, ins, write: bool) -> None:
        cell = int(cell)
        pc = int((self.write_pc if did == "write" else self.read_pc)[cell])
        other = self.machine.quote(self.machine.kernel.code[pc])
        mine = "write" if write else "read"
        flying = did == "write" and self.write_epoch[cell] == IN_FLIGHT
        if actor < self.warps:
            lane = int(self.write_lane[cell] if did == "write" else self.read_lane[cell, actor])
            who = f"lane {lane}" if lane >= 0 else "several lanes"
            text = f"the {did} by warp {actor} {who}, {other}"
            error = SharedRace
        else:
            text = f"the asynchronous {did} of {other}"
            error = AsyncHazard
        how = "comes before the end of" if flying else "is not ordered after"
        what = f"shared-memory race: this {mine} of byte {self._address(cell)} {how} {text}"
        self.machine.fail(error, what, thread_id, ins)

    # ---- what orders: rows are warps of the batch
    def barrier(self, rows: np.ndarray) -> None:
        """All these warps are ordered after one another, within each block."""
        warp, block = rows % self.warps, rows // self.machine.warps_per_block
        self.seen[rows, warp] += 1
        blocks, start = np.unique(block, return_index=True)
        latest = np.maximum.reduceat(self.seen[rows], start, axis=0)
        self.seen[rows] = latest[np.searchsorted(blocks, block)]

    def warp_sync(self, rows: np.ndarray) -> None:
        self.seen[rows, rows % self.warps] += 1

    def release(self, rows: np.ndarray, into: np.ndarray | None) -> np.ndarray:
        """What the warps have done up to now, joined to `into`."""
        self.warp_sync(rows)
        latest = self.seen[rows].max(axis=0)
        return latest if into is None else np.maximum(into, latest)

    def acquire(self, rows: np.ndarray, released: np.ndarray) -> None:
        own = rows % self.warps
        kept = self.seen[rows, own]
        self.seen[rows] = np.maximum(self.seen[rows], released)
        self.seen[rows, own] = kept

    def proxy_fence(self, lanes: Lanes) -> None:
        rows = np.unique(self.machine.warp[lanes.ids])
        self.warp_sync(rows)
        self.fenced[rows] = self.seen[rows, rows % self.warps]
        self.fence_seen[rows] = self.seen[rows]

    # ---- asynchronous work
    def async_actor(self, row: int) -> int:
        return self.warps + row % self.warps

    def store_actor(self, row: int) -> int:
        return self.actors - self.warps + row % self.warps

    def load_actor(self, block: int, mbarrier_address: int) -> int:
        rank = block % self.machine.cluster
        return 2 * self.warps + rank * _LOADS + (mbarrier_address // 8) % _LOADS

    def async_read(
        self, cells: np.ndarray, rows: np.ndarray, ids, ins: Instruction, actor: int | None = None
    ) -> int:
        """wgmma or a TMA store, issued by the warps `rows`, reads cells; gives the read's epoch."""
        unit = int(rows[0]) // self.warps
        actor = self.async_actor(int(rows[0])) if actor is None else actor
        writer, epoch = self.write_actor[cells], self.write_epoch[cells]
        if (writer < 0).any():
            cell = cells[np.flatnonzero(writer < 0)[0]]
            what = f"read of shared byte {self._address(cell)}, which nothing has written"
            self.machine.fail(UninitializedRead, what, ids[0], ins)
        seen = self.seen[rows].min(axis=0)
        bad = epoch > seen[writer]
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            self._report(cells[i], int(writer[i]), "write", ids[0], ins, False)
        plain = writer < self.warps
        fenced = self.fenced[unit * self.warps + np.where(plain, writer, 0)]
        known = np.maximum(fenced, self.fence_seen[rows].min(axis=0)[writer])
        bare = plain & (epoch > known)
        if bare.any():
            cell = int(cells[np.flatnonzero(bare)[0]])
            store = self.machine.quote(self.machine.kernel.code[int(self.write_pc[cell])])
            what = (
                f"byte {self._address(cell)} was stored by {store} and is read here without a "
                "fence.proxy.async in between"
            )
            self.machine.fail(ProxyFenceMissing, what, ids[0], ins)
        self.async_epoch[unit, actor] += 1
        now = self.async_epoch[unit, actor]
        self.read_epoch[cells, actor] = now
        self.read_pc[cells] = self.machine.pc
        return int(now)

    def async_done(self, rows: np.ndarray, actor: int, epoch: int) -> None:
        """The warps have waited for what `actor` did up to `epoch`."""
        self.seen[rows, actor] = np.maximum(self.seen[rows, actor], epoch)

    def begin_write(self, cells, ids, ins: Instruction, actor: int | None = None) -> None:
        """An asynchronous write is issued: from here on nobody may touch the cells."""
        machine = self.machine
        row, lane = machine.warp[ids], machine.lane[ids]
        warp = row % self.warps
        self._check_writes(cells, ids, row, warp, lane, ins, True, False)
        self._check_reads(cells, ids, row, warp, lane, ins)
        self.write_actor[cells] = self.warps + warp if actor is None else actor
        self.write_epoch[cells] = IN_FLIGHT
        self.write_pc[cells] = machine.pc
        self.write_atomic[cells] = False

    def end_load(self, block: int, cells: np.ndarray, actor: int) -> np.ndarray:
        """A TMA load has landed; gives what waiting on its mbarrier acquires."""
        unit = block // self.machine.cluster
        self.async_epoch[unit, actor] += 1
        self.write_epoch[cells] = self.async_epoch[unit, actor]
        seen = np.zeros(self.actors, np.int32)
        seen[actor] = self.async_epoch[unit, actor]
        return seen
