"""Asynchronous copies: cp.async, bulk copies and TMA tensor loads and stores, with their groups."""

from dataclasses import dataclass

import numpy as np

from .clusters import refuse_gone
from .errors import AsyncHazard, GlobalRace
from .machine import Lanes, Machine
from .schedule import Waits
from .syntax import Instruction


@dataclass
class ThreadCopy:
    """cp.async of some threads."""

    ids: np.ndarray
    group: np.ndarray
    shared: np.ndarray
    source: np.ndarray
    size: int
    valid: np.ndarray
    ins: Instruction
    late: bool = False


@dataclass
class BulkLoad:
    """A bulk copy into shared memory that has not landed."""

    thread_id: int
    block: int
    mbarrier: int
    nbytes: int
    chunk: int
    shared: np.ndarray
    values: np.ndarray
    cells: np.ndarray | None
    actor: int
    ins: Instruction


@dataclass
class BulkStore:
    """A bulk copy out of shared memory that its thread has not waited for."""

    thread_id: int
    chunk: int
    shared: np.ndarray
    target: np.ndarray
    epoch: int
    ins: Instruction
    late: bool = False
    values: np.ndarray | None = None  # what it has read, once its source may be written again
    adds: bool = False  # to the f32 that is there


class Copies(Waits):
    """What is on its way, and to whom."""

    def __init__(self, machine: Machine, maps: dict, lazy: bool):
        self.machine, self.maps, self.lazy = machine, maps, lazy
        self.committed = np.zeros(machine.size, np.int64)
        self.thread_copies: list[ThreadCopy] = []
        self.loads: list[BulkLoad] = []
        self.open_stores: dict[int, list[BulkStore]] = {}
        self.store_groups: dict[int, list[list[BulkStore]]] = {}
        self.bulk_warps: dict[str, set[int]] = {}  # of a block, by what they issued
        # For every 2 bytes of global memory: the thread that stores there in bulk, + 1; 0: none.
        self.storing: np.ndarray | None = None

    # ---- cp.async
    def issue(self, copy: ThreadCopy) -> None:
        races = self.machine.memory.shared_races
        if races is not None:
            cells, count = races.cells(copy.shared, copy.size)
            races.begin_write(cells, np.repeat(copy.ids, count), copy.ins)
        copy.late = self.lazy or self.machine.scheduler.delays()
        if not copy.late:
            self._move(copy)
        self.thread_copies.append(copy)

    def _move(self, copy: ThreadCopy) -> None:
        memory = self.machine.memory
        offsets = copy.source[:, None] + np.arange(copy.size)
        kept = np.arange(copy.size) < copy.valid[:, None]
        data = memory.globals.data[np.where(kept, offsets, 0)]
        memory.shared[copy.shared[:, None] + np.arange(copy.size)] = np.where(kept, data, 0)

    def commit(self, lanes: Lanes) -> None:
        self.committed[lanes.at] += 1

    def land(self, lanes: Lanes, groups_left: int | None) -> None:
        """The copies of these threads land, but for the `groups_left` latest groups (None: all)."""
        waiting = np.zeros(self.machine.size, np.bool_)
        waiting[lanes.at] = True
        kept = []
        for copy in self.thread_copies:
            done = waiting[copy.ids]
            if groups_left is not None:
                done &= copy.group < self.committed[copy.ids] - groups_left
            if done.any():
                self._finish(_select(copy, done))
            if not done.all():
                kept.append(_select(copy, ~done))
        self.thread_copies = kept

    def _finish(self, copy: ThreadCopy) -> None:
        machine = self.machine
        if copy.late:
            self._move(copy)
        races = machine.memory.shared_races
        if races is not None:
            cells, count = races.cells(copy.shared, copy.size)
            ids = np.repeat(copy.ids, count)
            rows = machine.warp[ids]
            races.record_write(cells, rows, rows % races.warps, machine.lane[ids])

    # ---- bulk loads
    def begin_load(self, load: BulkLoad) -> None:
        machine = self.machine
        races = machine.memory.shared_races
        if races is not None:
            cells, count = races.cells(load.shared, load.chunk)
            load.cells, load.actor = cells, races.load_actor(load.block, load.mbarrier)
            ids = np.full(len(cells), load.thread_id)
            races.begin_write(cells, ids, load.ins, load.actor)
        self.loads.append(load)
        machine.note("load", load.block, load.thread_id, load.mbarrier, load.nbytes)
        if not self.lazy and machine.scheduler.random is None:
            self.deliver()

    def deliver(self) -> bool:
        """One bulk load lands."""
        if not self.loads:
            return False
        random = self.machine.scheduler.random
        load = self.loads.pop(0 if random is None else int(random.integers(len(self.loads))))
        if load.block != self.machine.block_of[load.thread_id]:
            refuse_gone(self.machine, load.block, load.thread_id, load.ins)
        memory, seen = self.machine.memory, None
        memory.shared.reshape(-1, load.chunk)[load.shared // load.chunk] = load.values
        if memory.shared_races is not None:
            seen = memory.shared_races.end_load(load.block, load.cells, load.actor)
        self.machine.mbarriers.complete(
            load.block, load.mbarrier, load.nbytes, seen, load.thread_id, load.ins
        )
        return True

    def bytes_on_their_way(self, block: int, mbarrier: int):
        """(bytes, thread, instruction) of the loads that have yet to report to an mbarrier."""
        late = [c for c in self.loads if c.block == block and c.mbarrier == mbarrier]
        if not late:
            return None
        return sum(c.nbytes for c in late), late[0].thread_id, late[0].ins

    # ---- bulk stores
    def begin_store(self, store: BulkStore) -> None:
        races = self.machine.memory.shared_races
        if races is not None:
            cells, _ = races.cells(store.shared, store.chunk)
            row = self.machine.warp[[store.thread_id]]
            actor = races.store_actor(int(row[0]))
            store.epoch = races.async_read(cells, row, [store.thread_id], store.ins, actor)
        self._refuse_overtaking(store)
        block = int(self.machine.block_of[store.thread_id])
        self.machine.note("store", block, store.thread_id, 0, store.target.size * store.chunk)
        store.late = self.lazy or self.machine.scheduler.delays()
        if not store.late:
            self._write_out(store)
        self.open_stores.setdefault(store.thread_id, []).append(store)

    def _halves(self, store: BulkStore) -> np.ndarray:
        """Where a bulk store writes, in units of 2 bytes."""
        return (store.target[:, None] + np.arange(0, store.chunk, 2)).reshape(-1) >> 1

    def _refuse_overtaking(self, store: BulkStore) -> None:
        """Of two bulk stores on their way, even of one thread, either may come first."""
        if self.storing is None:
            self.storing = np.zeros(len(self.machine.memory.globals.data) // 2, np.int32)
        halves = self._halves(store)
        busy = self.storing[halves]
        if self.machine.memory.global_races is not None and busy.any():
            first = np.flatnonzero(busy)[0]
            where = self.machine.memory.globals.describe(2 * int(halves[first]))
            who = int(self.machine.thread[busy[first] - 1])
            what = f"a bulk store to {where} while one of thread {who} is on its way there"
            self.machine.fail(GlobalRace, what, store.thread_id, store.ins)
        self.storing[halves] = store.thread_id + 1

    def _write_out(self, store: BulkStore) -> None:
        values = self._read_source(store) if store.values is None else store.values
        target = self.machine.memory.globals.data.reshape(-1, store.chunk)
        at = store.target // store.chunk
        if store.adds:
            there = np.ascontiguousarray(target[at]).view(np.float32)
            values = _flushed(_flushed(there) + _flushed(values.view(np.float32))).view(np.uint8)
        target[at] = values

    def _read_source(self, store: BulkStore) -> np.ndarray:
        shared = self.machine.memory.shared.reshape(-1, store.chunk)
        return shared[store.shared // store.chunk]

    def commit_stores(self, lanes: Lanes) -> None:
        for thread_id in lanes.ids.tolist():
            group = self.open_stores.pop(thread_id, [])
            self.store_groups.setdefault(thread_id, []).append(group)

    def finish_stores(self, lanes: Lanes, groups_left: int, read_only: bool = False) -> None:
        """Threads wait for all but their latest groups: to be written, or only to be read."""
        for thread_id in lanes.ids.tolist():
            groups = self.store_groups.get(thread_id, [])
            done = groups[: max(0, len(groups) - groups_left)]
            for store in (s for group in done for s in group):
                if store.values is None:
                    self._release_source(thread_id, store)
                if not read_only:
                    self._complete(thread_id, store)
            if not read_only:
                del groups[: len(done)]

    def _release_source(self, thread_id: int, store: BulkStore) -> None:
        store.values = self._read_source(store)
        races = self.machine.memory.shared_races
        if races is not None:
            row = self.machine.warp[[thread_id]]
            races.async_done(row, races.store_actor(int(row[0])), store.epoch)

    def _complete(self, thread_id: int, store: BulkStore) -> None:
        if store.late:
            self._write_out(store)
        if self.storing is not None:
            self.storing[self._halves(store)] = 0
        if self.machine.memory.global_races is not None:
            self.machine.memory.global_races.landed(thread_id, store.target, store.chunk)

    def finish(self) -> None:
        stores = [s for group in self.open_stores.values() for s in group]
        for thread_id, groups in self.store_groups.items():
            for store in (s for group in groups for s in group):
                if store.values is None:
                    stores.append(store)
                else:  # the kernel's end waits for the rest
                    self._complete(thread_id, store)
        if stores:
            what = "the kernel ended with a bulk store that its thread has not waited for"
            self.machine.fail(AsyncHazard, what, stores[0].thread_id, stores[0].ins)
        if self.loads:
            what = "the kernel ended with a bulk load that nobody has waited for"
            self.machine.fail(AsyncHazard, what, self.loads[0].thread_id, self.loads[0].ins)


def _flushed(values: np.ndarray) -> np.ndarray:
    """Without subnormal numbers, which sums in L2 take for zeros of their sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, values * np.float32(0), values)


def _select(copy: ThreadCopy, chosen: np.ndarray) -> ThreadCopy:
    parts = (copy.ids, copy.group, copy.shared, copy.source)
    parts = [p[chosen] for p in parts]
    return ThreadCopy(*parts, copy.size, copy.valid[chosen], copy.ins, copy.late)
