"""mbarriers: phases, arrivals, announced bytes, and who waits for what."""

from dataclasses import dataclass

import numpy as np

from .clusters import block_of, offset_of, refuse_gone
from .errors import ClusterError, MBarrierError, Unsupported
from .machine import Lanes, Machine, instruction
from .schedule import Waits
from .syntax import Address, Instruction


@dataclass
class _Phase:
    """One mbarrier object."""

    expected: int
    pending: int
    bytes: int = 0  # transactions announced and not yet complete
    phase: int = 0
    flips: int = 0
    seen: object = None  # what arrivals of this phase release
    released: object = None  # what waiters on the finished phase acquire
    born: tuple[int, int] = (0, 0)  # the warp that initialised it, and that warp's epoch


class MBarriers(Waits):
    """All mbarriers of a batch of blocks, by (block in the batch, shared address)."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.objects: dict[tuple[int, int], _Phase] = {}
        self.waiting: dict[tuple[int, int], list] = {}  # (pc, ids, parity, target)
        self.flips = 0
        self.refused_at = np.full(machine.size, -1)

    def find(self, block: int, address: int, thread_id: int, ins: Instruction) -> _Phase:
        state = self.objects.get((block, address))
        if state is None:
            self.machine.fail(
                MBarrierError, f"no mbarrier was initialised at {address:#x}", thread_id, ins
            )
        return state

    def check_remote(self, block: int, address: int, thread_id: int, ins: Instruction) -> None:
        """Another block's mbarrier must live, and its initialisation lie behind this thread."""
        machine = self.machine
        if block == machine.block_of[thread_id]:
            return
        refuse_gone(machine, block, thread_id, ins)
        row, epoch = self.find(block, address, thread_id, ins).born
        races = machine.memory.shared_races
        if races is not None and races.seen[machine.warp[thread_id], row % races.warps] < epoch:
            what = f"nothing orders this after block {int(machine.blocks[block])} initialised its "
            machine.fail(ClusterError, f"{what}mbarrier at {address:#x}", thread_id, ins)

    def groups(self, lanes: Lanes, addresses: np.ndarray):
        """Lanes that name the same mbarrier: (block, address, positions in lanes)."""
        blocks = block_of(self.machine, lanes.ids, addresses)
        keys = blocks * (1 << 32) + offset_of(addresses)
        for key in np.unique(keys):
            yield int(key >> 32), int(key & 0xFFFFFFFF), np.flatnonzero(keys == key)

    def arrive(self, block, address, count: int, expect: int, ids: np.ndarray, ins) -> int:
        """Arrivals and announced bytes of some threads; gives the phase they arrived in."""
        self.check_remote(block, address, int(ids[0]), ins)
        state = self.find(block, address, ids[0], ins)
        phase = state.phase
        state.bytes += expect
        self.machine.note("arrive", block, int(ids[0]), address, expect)
        if count > state.pending:
            self.machine.fail(
                MBarrierError,
                f"{count} arrivals at the mbarrier {address:#x}, which expects {state.pending} "
                f"more of {state.expected} in this phase",
                ids[0],
                ins,
            )
        state.pending -= count
        races = self.machine.memory.shared_races
        if races is not None and count:
            state.seen = races.release(np.unique(self.machine.warp[ids]), state.seen)
            self.machine.memory.global_races.arrive((block, address), ids)
        self.settle(block, address, state)
        return phase

    def complete(self, block: int, address: int, nbytes: int, seen, thread_id: int, ins) -> None:
        """An asynchronous copy has landed."""
        state = self.find(block, address, thread_id, ins)
        state.bytes -= nbytes
        if seen is not None:
            state.seen = seen if state.seen is None else np.maximum(state.seen, seen)
        self.settle(block, address, state)

    def settle(self, block: int, address: int, state: _Phase) -> None:
        """Flip the phase if nothing is missing, and wake the waiters."""
        if state.pending or state.bytes:
            return
        late = self.machine.copies.bytes_on_their_way(block, address)
        if late is not None:
            nbytes, thread_id, ins = late
            self.machine.fail(
                MBarrierError,
                f"a phase of the mbarrier {address:#x} completes with {nbytes} bytes still on "
                "their way: expect_tx announced too few",
                thread_id,
                ins,
            )
        state.phase ^= 1
        state.pending = state.expected
        state.released, state.seen = state.seen, None
        state.flips += 1
        self.flips += 1
        for pc, ids, _, target in self.waiting.pop((block, address), []):
            self.acquire(block, address, state, ids)
            target[ids] = True
            self.machine.scheduler.push(pc + 1, ids)

    def acquire(self, block: int, address: int, state: _Phase, ids: np.ndarray) -> None:
        memory = self.machine.memory
        if memory.shared_races is not None:
            warps = np.unique(self.machine.warp[ids])
            if state.released is not None:
                memory.shared_races.acquire(warps, state.released)
            memory.global_races.wait((block, address), ids)

    def refuse_some(self) -> bool:
        """Nothing else can run: try_wait may give up once, as it may on hardware."""
        found = False
        for key, entries in list(self.waiting.items()):
            kept = []
            for pc, ids, parity, target in entries:
                fresh = self.refused_at[ids] != self.flips
                if fresh.any():
                    found = True
                    again = ids[fresh]
                    self.refused_at[again] = self.flips
                    target[again] = False
                    self.machine.scheduler.push(pc + 1, again)
                if not fresh.all():
                    kept.append((pc, ids[~fresh], parity, target))
            self.waiting[key] = kept
        return found

    def describe(self) -> list[str]:
        lines = []
        for (block, address), entries in self.waiting.items():
            state = self.objects[block, address]
            missing = [f"{state.pending} of {state.expected} arrivals"] if state.pending else []
            if state.bytes > 0:
                missing.append(f"{state.bytes} bytes that no copy brings")
            elif state.bytes < 0:
                missing.append(f"an expect_tx for {-state.bytes} bytes that came unannounced")
            for pc, ids, parity, _ in entries:
                where = self.machine.where(int(ids[0]), self.machine.kernel.code[pc])
                lines.append(
                    f"{len(ids)} threads at the mbarrier {address:#x} for phase {parity}, missing "
                    f"{' and '.join(missing)}: {where}"
                )
        return lines


@instruction("mbarrier", blocking=True)
def _bind_mbarrier(machine: Machine, ins: Instruction):
    verb = ins.mods[0]
    binders = {
        "init": _bind_init,
        "inval": _bind_inval,
        "arrive": _bind_arrive,
        "arrive_drop": _bind_arrive,
        "expect_tx": _bind_arrive,
        "complete_tx": _bind_arrive,
        "test_wait": _bind_wait,
        "try_wait": _bind_wait,
    }
    if verb not in binders:
        raise Unsupported(f"`{ins.text}`")
    return binders[verb](machine, ins)


def shared_address(machine: Machine, operand: Address, ins: Instruction):
    """Addresses of 8 aligned bytes of shared memory, whatever window they are named in."""
    address, generic = machine.address(operand, ins), ins.state_space() == "generic"

    def located(lanes):
        at = address(lanes)
        if generic:
            at = machine.memory.split_generic(at, lanes)[0][1]
        machine.memory.locate_barrier(offset_of(at), lanes, ins)
        return at

    return located


def _bind_init(machine: Machine, ins: Instruction):
    address = shared_address(machine, ins.operands[0], ins)
    count = machine.source(ins.operands[1], "u32", ins)

    def step(lanes):
        at, counts = address(lanes), count[lanes.at]
        for block, where, members in machine.mbarriers.groups(lanes, at):
            expected = int(counts[members[0]])
            row, races = int(machine.warp[lanes.ids[members[0]]]), machine.memory.shared_races
            epoch = 0 if races is None else int(races.seen[row, row % races.warps]) + 1
            phase = _Phase(expected, expected, born=(row, epoch))
            machine.mbarriers.objects[block, where] = phase
        return lanes

    return step


def _bind_inval(machine: Machine, ins: Instruction):
    address = shared_address(machine, ins.operands[0], ins)

    def step(lanes):
        for block, where, members in machine.mbarriers.groups(lanes, address(lanes)):
            machine.mbarriers.find(block, where, int(lanes.ids[members[0]]), ins)
            del machine.mbarriers.objects[block, where]
        return lanes

    return step


def _bind_arrive(machine: Machine, ins: Instruction):
    place = next(i for i, o in enumerate(ins.operands) if isinstance(o, Address))
    address = shared_address(machine, ins.operands[place], ins)
    rest = ins.operands[place + 1 :]
    amount = machine.source(rest[0], "u32", ins) if rest else None
    state_target = machine.target(ins.operands[0], "b64", ins) if place else None
    verb = ins.mods[0]
    arrives = verb.startswith("arrive")
    expects = "expect_tx" in ins.mods

    def step(lanes):
        at = address(lanes)
        amounts = None if amount is None else amount[lanes.at].astype(np.int64)
        for block, where, members in machine.mbarriers.groups(lanes, at):
            total = 0 if amounts is None else int(amounts[members].sum())
            ids = lanes.ids[members]
            count = 0
            if arrives:
                count = len(members) if expects or amounts is None else total
            if verb == "complete_tx":
                machine.mbarriers.complete(block, where, total, None, int(ids[0]), ins)
                continue
            if verb == "arrive_drop":
                machine.mbarriers.find(block, where, int(ids[0]), ins).expected -= count
            expect = total if expects else 0
            phase = machine.mbarriers.arrive(block, where, count, expect, ids, ins)
            if state_target is not None:
                state_target[ids] = phase
        return lanes

    return step


def _bind_wait(machine: Machine, ins: Instruction):
    target = machine.target(ins.operands[0], "pred", ins)
    address = shared_address(machine, ins.operands[1], ins)
    parity = machine.source(ins.operands[2], "u32" if "parity" in ins.mods else "b64", ins)
    barriers = machine.mbarriers

    def step(lanes):
        at, wanted = address(lanes), parity[lanes.at]
        going, pc = np.ones(lanes.n, np.bool_), machine.pc
        for block, where, members in barriers.groups(lanes, at):
            state = barriers.find(block, where, int(lanes.ids[members[0]]), ins)
            over = (wanted[members] & 1) != state.phase
            ids = lanes.ids[members]
            machine.note("wait", block, int(ids[0]), where)
            if over.any():
                barriers.acquire(block, where, state, ids[over])
                target[ids[over]] = True
            if not over.all() and ins.mods[0] == "test_wait":
                target[ids[~over]] = False
            elif not over.all():
                going[members[~over]] = False
                entry = (pc, ids[~over], int(wanted[members[~over]][0] & 1), target)
                barriers.waiting.setdefault((block, where), []).append(entry)
        if going.all():
            return lanes
        return lanes.where(going) if going.any() else None

    return step
