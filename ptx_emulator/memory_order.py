"""Which accesses to global memory are ordered, by address and scope, over all devices.

A clock for every thread (`Clocks`), moved on by what PTX says orders: barriers, and release and
acquire patterns at one address, where the scopes of both include the other thread (`flags`). The
epoch of an access is the number of its instruction among all that ran. Two accesses to one place,
one of them a write, must be ordered, or both be strong with scopes that reach each other.
"""

from __future__ import annotations

import numpy as np

from .errors import AsyncHazard, GlobalRace, ProxyFenceMissing
from .flags import BLOCK, DEVICE, FENCE, Flags, scope_of
from .machine import Lanes, Machine
from .syntax import Instruction

FLYING = np.int64(1 << 60)  # the epoch of a bulk store that its thread has not waited for
_NOBODY = -1


class Clocks:
    """Up to which epoch each thread is ordered behind each other one.

    Threads that met at a barrier share a row of `known`, until one of them learns more.
    """

    def __init__(self, threads: int):
        self.now = 0
        self.known = np.zeros((max(64, threads // 16), threads), np.int64)
        self.row_of = np.zeros(threads, np.int64)
        self._free = list(range(1, len(self.known)))
        # The block and the device that a thread belongs to, and all of them: by scope, from 1 on.
        self.units = np.zeros((4, threads), np.int64)
        self.given = np.zeros(threads, np.int64)  # when others could last learn of a thread
        self.fenced = np.zeros(threads, np.int64)  # its last fence.proxy.async
        self.behind_fence = np.zeros(threads, np.int64)  # the row of what that fence covers

    def _fresh(self) -> int:
        """A row that nobody uses."""
        if not self._free:
            used = np.zeros(len(self.known), np.bool_)
            used[self.row_of] = used[self.behind_fence] = True
            self._free = np.flatnonzero(~used).tolist()
            if len(self._free) < len(self.known) // 4:
                count = len(self.known)
                self.known = np.concatenate([self.known, np.zeros_like(self.known)])
                self._free += range(count, 2 * count)
        return self._free.pop()

    def _take(self, threads, clock: np.ndarray) -> None:
        row = self._fresh()
        self.known[row] = clock
        self.row_of[threads] = row

    def of(self, thread: int) -> np.ndarray:
        """What a thread gives to others now: all that it knows, and its own accesses."""
        clock = self.known[self.row_of[thread]].copy()
        clock[thread] = self.given[thread] = self.now
        return clock

    def meet(self, threads: np.ndarray) -> None:
        """These threads are all ordered behind one another."""
        clock = self.known[np.unique(self.row_of[threads])].max(axis=0)
        clock[threads] = self.given[threads] = self.now
        self._take(threads, clock)

    def learn(self, threads, clock: np.ndarray) -> None:
        """These threads are ordered behind what `clock` says."""
        for row in np.unique(self.row_of[threads]):
            if (clock > self.known[row]).any():
                those = np.atleast_1d(threads)
                self._take(those[self.row_of[those] == row], np.maximum(self.known[row], clock))

    def begin(self, threads: np.ndarray, clock: np.ndarray | None) -> None:
        """A launch begins, behind the launches that `clock` covers; its proxies agree."""
        if clock is not None:
            self._take(threads, clock)
        self.behind_fence[threads] = self.row_of[threads]

    def wait(self, threads: np.ndarray, clock: np.ndarray) -> None:
        """Threads have waited for the launch ahead: as if theirs began now."""
        self.learn(threads, clock)
        self.behind_fence[threads] = self.row_of[threads]

    def end(self, threads: np.ndarray) -> np.ndarray:
        """What a launch that has ended hands to the next one of its stream."""
        clock = self.known[np.unique(self.row_of[threads])].max(axis=0)
        clock[threads] = self.now
        return clock

    def proxy_fence(self, threads: np.ndarray) -> None:
        self.fenced[threads] = self.now
        for thread in threads.tolist():  # the row it has now, which nobody changes
            self.behind_fence[thread] = self.row_of[thread]

    def behind(self, threads: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The epochs up to which each thread is ordered behind each of `others`."""
        return self.known[self.row_of[threads], others]


class Order:
    """What all launches that run together remember of global memory."""

    def __init__(self, memory, grain: int, threads: int):
        self.memory, self.grain = memory, grain
        self.clocks = Clocks(threads)
        self.flags = Flags(self.clocks)
        cells = len(memory.data) // grain
        self.writer = np.full(cells, _NOBODY, np.int32)
        self.write_epoch = np.zeros(cells, np.int64)
        self.write_scope = np.zeros(cells, np.int8)  # 0: a plain write
        self.write_site = np.zeros(cells, np.int32)
        self.reader = np.full(cells, _NOBODY, np.int32)  # or -2 - number of a set of readers
        self.read_epoch = np.zeros(cells, np.int64)
        self.readers: list[tuple[np.ndarray, np.ndarray]] = []  # threads ascending, epochs
        self.read_site = np.zeros(cells, np.int32)
        self.sites: dict[tuple[str, int], int] = {}
        self.quotes: list[str] = []
        self.machines: list[tuple[int, Machine]] = []  # the first thread of each

    def site(self, machine: Machine) -> int:
        """A number for the instruction that runs, to be quoted later."""
        key = machine.kernel.name, machine.pc
        if key not in self.sites:
            self.sites[key] = len(self.quotes)
            self.quotes.append(machine.quote(machine.kernel.code[machine.pc]))
        return self.sites[key]

    def name(self, thread: int) -> str:
        first, machine = max(((f, m) for f, m in self.machines if f <= thread), key=lambda e: e[0])
        return machine.describe_thread(thread - first)


class MachineOrder:
    """The order of one machine's accesses; the same questions as `GlobalRaces` answers."""

    def __init__(self, machine: Machine, order: Order, first: int, device: int, begin):
        """first: number of the machine's first thread among all; begin: what it is behind."""
        self.machine, self.order, self.clocks = machine, order, order.clocks
        self.slot = first + machine.all_ids
        units = self.clocks.units
        units[BLOCK, self.slot] = first + machine.threads_per_block * machine.block_of
        units[DEVICE, self.slot] = device
        order.machines.append((first, machine))
        self.joined: dict[object, np.ndarray] = {}  # what arrivals at an mbarrier gave
        self.clocks.begin(self.slot, begin)

    # ---- what orders
    def barrier(self, rows: np.ndarray) -> None:
        threads = self.slot[np.isin(self.machine.warp, rows)]
        blocks = self.clocks.units[BLOCK, threads]
        for block in np.unique(blocks):
            self.clocks.meet(threads[blocks == block])

    def warp_sync(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            self.clocks.meet(self.slot[self.machine.warp == row])

    def arrive(self, key, ids: np.ndarray, wide: bool = False) -> None:
        """Threads arrive at an mbarrier or at the cluster's barrier."""
        for thread in self.slot[ids].tolist():
            clock = self.clocks.of(thread)
            before = self.joined.get(key)
            self.joined[key] = clock if before is None else np.maximum(before, clock)

    def wait(self, key, ids: np.ndarray, wide: bool = False) -> None:
        if key in self.joined:
            self.clocks.learn(self.slot[ids], self.joined[key])

    def behind_launch(self, ids: np.ndarray, clock: np.ndarray) -> None:
        """griddepcontrol.wait has returned; `clock`: what the end of the launch ahead hands on."""
        self.clocks.wait(self.slot[ids], clock)

    def fence(self, lanes: Lanes, ins: Instruction) -> None:
        self.clocks.now += 1
        sequential = ins.op == "membar" or "sc" in ins.mods
        for thread in self.slot[lanes.ids].tolist():
            self.order.flags.fence(thread, scope_of(ins, FENCE), sequential)

    def proxy_fence(self, lanes: Lanes) -> None:
        self.clocks.proxy_fence(self.slot[lanes.ids])

    def landed(self, thread_id: int, offsets: np.ndarray, nbytes: int) -> None:
        """Its thread has waited for a bulk store: from now on it is a write like any other."""
        order = self.order
        cells = self._cells(offsets, nbytes)
        own = (order.writer[cells] == self.slot[thread_id]) & (order.write_epoch[cells] == FLYING)
        self.clocks.now += 1
        order.write_epoch[cells[own]] = self.clocks.now

    # ---- strong accesses, once they have happened
    def loaded(self, lanes: Lanes, offsets, ins: Instruction, values: np.ndarray) -> np.ndarray:
        """What strong loads see, which may be older than what memory holds."""
        machine, flags = self.machine, self.order.flags
        random, seen = machine.scheduler.random, values.copy()
        raw = seen.view(f"u{seen.dtype.itemsize}")
        for i, thread in enumerate(self.slot[lanes.ids].tolist()):
            late = machine.copies.lazy or (random is not None and random.random() < 0.9)
            raw[i], news = flags.load(thread, int(offsets[i]), ins, late)
            machine.scheduler.polled(int(lanes.ids[i]), int(offsets[i]), int(raw[i]), news)
        return seen

    def stored(self, lanes: Lanes, offsets, ins: Instruction, values: np.ndarray) -> None:
        """Strong stores and atomics have left these values."""
        flags = self.order.flags
        raw = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
        last = {int(offset): i for i, offset in enumerate(offsets)}
        for i, thread in enumerate(self.slot[lanes.ids].tolist()):
            at = int(offsets[i])
            flags.store(thread, at, ins, int(raw[i]), last[at] == i)

    # ---- accesses, before they happen
    def _cells(self, offsets: np.ndarray, nbytes: int) -> np.ndarray:
        first, count = offsets // self.order.grain, max(1, nbytes // self.order.grain)
        return first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)

    def access(self, lanes: Lanes, offsets, nbytes, ins, write: bool, atomic: bool) -> None:
        order = self.order
        self.clocks.now += 1
        cells = self._cells(offsets, nbytes)
        ids = np.repeat(lanes.ids, len(cells) // len(lanes.ids))
        me, scope = self.slot[ids], scope_of(ins) if atomic else 0
        bulk = ins.op == "cp" and "bulk" in ins.mods
        if atomic:
            self._begin_strong(lanes, offsets, nbytes, ins)
        self._check_writes(cells, ids, me, ins, write, scope)
        if bulk and not write:
            self._check_proxy(cells, ids, me, ins)
        if write:
            self.machine.scheduler.events += 1
            self._check_reads(cells, ids, me, ins)
            order.reader[cells] = _NOBODY  # all of them lie behind this write
            order.writer[cells] = me
            order.write_epoch[cells] = FLYING if bulk else self.clocks.now
            order.write_scope[cells] = scope
            order.write_site[cells] = order.site(self.machine)
            if not atomic:
                order.flags.forget(offsets, nbytes)
        elif not atomic:
            self._record_read(cells, me)

    def _begin_strong(self, lanes: Lanes, offsets, nbytes: int, ins: Instruction) -> None:
        data = self.order.memory.data
        for i, offset in enumerate(np.atleast_1d(offsets).tolist()):
            for at in range(offset, offset + nbytes, size := _item(ins, nbytes)):
                value = int.from_bytes(data[at : at + size].tobytes(), "little")
                other = self.order.flags.begin(at, size, value)
                if other is not None:
                    what = (
                        f"{self.order.memory.describe(at)} is read or written as one word of "
                        f"{size} bytes here, and of {other} bytes elsewhere"
                    )
                    self.machine.fail(GlobalRace, what, lanes.ids[i], ins)

    def _check_writes(self, cells, ids, me, ins, write: bool, scope: int) -> None:
        order, clocks = self.order, self.clocks
        writer, epoch = order.writer[cells], order.write_epoch[cells]
        if (writer < 0).all():
            return
        other = np.maximum(writer, 0)
        flying = epoch == FLYING
        bad = (writer >= 0) & (writer != me) & (epoch > clocks.behind(me, other))
        if scope:
            theirs = order.write_scope[cells]
            bad &= ~((theirs > 0) & self.order.flags.reach(me, other, scope, theirs))
        if (hazard := (writer == me) & flying).any():
            i = int(np.flatnonzero(hazard)[0])
            what = f"{self._did(cells[i], 'write')}, which its thread has not waited for"
            self.machine.fail(AsyncHazard, f"this touches {what}", ids[i], ins)
        if bad.any():
            self._report(cells, ids, bad, "write", ins, write)

    def _check_proxy(self, cells, ids, me, ins) -> None:
        """A bulk copy or TMA reads what ordinary stores, or other threads' copies, wrote."""
        order, clocks = self.order, self.clocks
        writer, epoch = order.writer[cells], order.write_epoch[cells]
        other = np.maximum(writer, 0)
        covered = clocks.known[clocks.behind_fence[me], other]
        covered = np.where(other == me, clocks.fenced[me], covered)
        bare = (writer >= 0) & (epoch > np.maximum(covered, clocks.fenced[other]))
        if bare.any():
            i = int(np.flatnonzero(bare)[0])
            what = (
                f"{self._did(cells[i], 'write')}, is read here by an asynchronous copy with no "
                "fence.proxy.async in between"
            )
            self.machine.fail(ProxyFenceMissing, what, ids[i], ins)

    def _unordered_reads(self, cells, me) -> np.ndarray:
        """Where a read by another thread is not ordered before `me`; of several, by any of them."""
        order, clocks = self.order, self.clocks
        reader = order.reader[cells]
        other = np.maximum(reader, 0)
        bad = (reader >= 0) & (reader != me)
        bad &= order.read_epoch[cells] > clocks.behind(me, other)
        if (many := reader < _NOBODY).any():
            pairs = np.stack([me[many], -2 - reader[many]])
            distinct, back = np.unique(pairs, axis=1, return_inverse=True)
            late = []
            for thread, number in distinct.T.tolist():
                threads, epochs = order.readers[number]
                behind = clocks.known[clocks.row_of[thread], threads] >= epochs
                late.append(not (behind | (threads == thread)).all())
            bad[many] = np.array(late)[back.reshape(-1)]
        return bad

    def _check_reads(self, cells, ids, me, ins) -> None:
        if (self.order.reader[cells] != _NOBODY).any():
            bad = self._unordered_reads(cells, me)
            if bad.any():
                self._report(cells, ids, bad, "read", ins, True)

    def _record_read(self, cells, me) -> None:
        """Remember the readers: one of a cell, or a set of those that nothing orders."""
        order, clocks = self.order, self.clocks
        reader = order.reader[cells]
        alone = (reader == _NOBODY) | (reader == me)
        alone |= (reader >= 0) & (
            order.read_epoch[cells] <= clocks.behind(me, np.maximum(reader, 0))
        )
        distinct, back, count = np.unique(cells, return_inverse=True, return_counts=True)
        epochs = order.read_epoch[distinct]
        alone &= (count == 1)[back]
        order.reader[cells[alone]] = me[alone]
        order.read_epoch[cells] = clocks.now
        order.read_site[cells] = order.site(self.machine)
        if alone.all():
            return
        sets: dict[tuple[int, bytes], int] = {}
        by_cell = np.split(me[np.argsort(back, kind="stable")], np.cumsum(count)[:-1])
        for cell in np.unique(back[~alone]).tolist():
            at, mine = int(distinct[cell]), np.unique(by_cell[cell])
            before = int(order.reader[at])
            key = before, mine.tobytes()
            if key not in sets:
                sets[key] = self._joined(before, int(epochs[cell]), mine)
            order.reader[at] = sets[key]

    def _joined(self, before: int, epoch: int, mine: np.ndarray) -> int:
        """The reader that stands for `before`, if nothing orders it before `mine`, and these."""
        order, clocks = self.order, self.clocks
        threads, epochs = np.array([], np.int64), np.array([], np.int64)
        if before >= 0:
            threads, epochs = np.array([before]), np.array([epoch])
        elif before < _NOBODY:
            threads, epochs = order.readers[-2 - before]
            at = np.minimum(np.searchsorted(threads, mine), len(threads) - 1)
            if (threads[at] == mine).all() and (epochs[at] > clocks.given[mine]).all():
                return before  # nobody could learn of these threads since
        known = clocks.known[np.unique(clocks.row_of[mine])][:, threads]
        kept = ~(known >= epochs).any(axis=0) & ~np.isin(threads, mine)
        threads = np.concatenate([threads[kept], mine])
        epochs = np.concatenate([epochs[kept], np.full(len(mine), clocks.now)])
        if len(threads) == 1:
            return int(threads[0])
        sorting = np.argsort(threads)
        order.readers.append((threads[sorting], epochs[sorting]))
        return -1 - len(order.readers)

    # ---- words
    def _did(self, cell: int, did: str) -> str:
        order = self.order
        thread = int((order.writer if did == "write" else order.reader)[cell])
        if thread < _NOBODY:
            thread = int(order.readers[-2 - thread][0][0])
        site = (order.write_site if did == "write" else order.read_site)[cell]
        where = order.memory.describe(int(cell) * order.grain)
        return f"the {did} of {where} by {order.name(thread)}, {order.quotes[site]}"

    def _report(self, cells, ids, bad, did: str, ins: Instruction, write: bool) -> None:
        i = int(np.flatnonzero(bad)[0])
        what = (
            f"global-memory race: this {'write' if write else 'read'} is not ordered after "
            f"{self._did(cells[i], did)}"
        )
        self.machine.fail(GlobalRace, what, ids[i], ins)


def _item(ins: Instruction, nbytes: int) -> int:
    """Bytes of one word of an access of `nbytes`."""
    for mod in ins.mods:
        if mod in ("v2", "v4", "v8"):
            return nbytes // int(mod[1:])
    return nbytes
