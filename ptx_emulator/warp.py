"""Warp collectives: shfl, vote, match, redux, elect and bar.warp.sync, with their masks checked."""

from dataclasses import dataclass

import numpy as np

from .errors import MaskError, Unsupported
from .machine import Lanes, Machine, instruction
from .schedule import Waits
from .syntax import Imm, Instruction, Pair

_LANES = np.arange(32)
_BITS = (np.uint32(1) << np.arange(32, dtype=np.uint32)).astype(np.uint32)
_FULL = np.uint32(0xFFFFFFFF)


class WarpWaits(Waits):
    """Lanes that wait until every lane of their mask has arrived."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.parked: dict[object, list[tuple[int, np.ndarray]]] = {}
        self.mask = np.zeros(machine.size, np.uint32)
        self.groups: dict[int, np.ndarray] = {}  # threads that wait for the rest of a warpgroup

    def gather(self, lanes: Lanes, mask: np.ndarray, ins: Instruction, key=None) -> Lanes | None:
        """The lanes whose masks are complete, or None. Those of `key` may be at different pcs."""
        machine, pc = self.machine, self.machine.pc
        key = pc if key is None else key
        waiting = self.parked.pop(key, None)
        if waiting is None and machine.threads_per_block % 32 == 0 and (mask == _FULL).all():
            if _whole_warps(lanes):
                return lanes
        outside = (mask & machine.lane_bit[lanes.at]) == 0
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            what = f"the mask {int(mask[i]):#010x} leaves out the calling lane"
            machine.fail(MaskError, what, lanes.ids[i], ins)
        self.mask[lanes.at] = mask
        waiting = (waiting or []) + [(pc, lanes.ids)]
        ids = np.concatenate([i for _, i in waiting])
        warps = machine.num_blocks * machine.warps_per_block
        present = np.zeros(warps, np.uint32)
        np.bitwise_or.at(present, machine.warp[ids], machine.lane_bit[ids])
        missing = self.mask[ids] & ~present[machine.warp[ids]]
        self._refuse_dead(ids, missing, ins)
        ready = np.zeros(machine.size, np.bool_)
        ready[ids[missing == 0]] = True
        left = [(p, i[~ready[i]]) for p, i in waiting if not ready[i].all()]
        if left:
            self.parked[key] = left
        if not ready.any():
            return None
        for p, i in waiting:
            if p != pc:
                machine.scheduler.push(p + 1, i[ready[i]])
        ids = np.sort(np.concatenate([i[ready[i]] for p, i in waiting if p == pc]))
        return Lanes(ids) if len(ids) else None

    def _refuse_dead(self, ids: np.ndarray, missing: np.ndarray, ins: Instruction) -> None:
        """A mask that names a lane which has exited or never existed waits for ever."""
        machine = self.machine
        for i in np.flatnonzero(missing)[:4096]:
            thread = int(machine.thread[ids[i]])
            first = thread - thread % 32
            for lane in np.flatnonzero(missing[i] & _BITS):
                exists = first + lane < machine.threads_per_block
                if not exists or not machine.alive[ids[i] - thread % 32 + lane]:
                    why = "has exited" if exists else "does not exist"
                    what = f"the mask {int(self.mask[ids[i]]):#010x} names lane {lane}, which {why}"
                    machine.fail(MaskError, what, ids[i], ins)

    def exited(self, lanes: Lanes) -> None:
        for key, waiting in self.parked.items():
            for pc, ids in waiting:
                same = np.isin(self.machine.warp[ids], np.unique(self.machine.warp[lanes.ids]))
                ids = ids[same]
                if not len(ids):
                    continue
                here = np.concatenate([i for _, i in self.parked[key]])
                present = np.zeros(self.machine.num_blocks * self.machine.warps_per_block, "u4")
                np.bitwise_or.at(present, self.machine.warp[here], self.machine.lane_bit[here])
                missing = self.mask[ids] & ~present[self.machine.warp[ids]]
                self._refuse_dead(ids, missing, self.machine.kernel.code[pc])

    def describe(self) -> list[str]:
        lines = []
        for waiting in self.parked.values():
            for pc, ids in waiting:
                where = self.machine.where(int(ids[0]), self.machine.kernel.code[pc])
                lines.append(
                    f"{len(ids)} lanes wait for the rest of mask "
                    f"{int(self.mask[ids[0]]):#010x}: {where}"
                )
        for pc, ids in self.groups.items():
            where = self.machine.where(int(ids[0]), self.machine.kernel.code[pc])
            lines.append(f"{len(ids)} threads wait for the rest of their warpgroup: {where}")
        return lines


def _whole_warps(lanes: Lanes) -> bool:
    if lanes.n % 32:
        return False
    if type(lanes.at) is slice:
        return lanes.at.start % 32 == 0
    rows = lanes.ids.reshape(-1, 32)
    return bool(((rows[:, 0] % 32 == 0) & (rows[:, 31] - rows[:, 0] == 31)).all())


class _Rows:
    """Values of some lanes as [warps, 32]: absent lanes hold zeros."""

    def __init__(self, machine: Machine, lanes: Lanes):
        self.full = machine.threads_per_block % 32 == 0 and _whole_warps(lanes)
        if not self.full:
            _, self.row = np.unique(machine.warp[lanes.ids], return_inverse=True)
            self.lane = machine.lane[lanes.ids]
            self.rows = int(self.row.max()) + 1

    def spread(self, values: np.ndarray) -> np.ndarray:
        if self.full:
            return values.reshape(-1, 32)
        table = np.zeros((self.rows, 32), values.dtype)
        table[self.row, self.lane] = values
        return table

    def collect(self, table: np.ndarray) -> np.ndarray:
        if self.full:
            return np.broadcast_to(table, (len(table), 32)).reshape(-1)
        return np.broadcast_to(table, (self.rows, 32))[self.row, self.lane]


@dataclass
class _Call:
    """What a collective sees: rows of lanes and of their masks."""

    lanes: Lanes
    rows: _Rows
    masks: np.ndarray

    def take(self, source) -> np.ndarray:
        return self.rows.spread(np.ascontiguousarray(source[self.lanes.at]))


def _collective(*names: str, mask_operand: int = -1):
    """Register `prepare(machine, ins) -> act(call)` as a blocking instruction."""

    def register(prepare):
        @instruction(*names, blocking=True)
        def bind(machine: Machine, ins: Instruction):
            mask = machine.source(ins.operands[mask_operand], "u32", ins)
            act = prepare(machine, ins)

            def step(lanes):
                lanes = machine.warp_waits.gather(lanes, mask[lanes.at], ins)
                if lanes is None:
                    return None
                rows = _Rows(machine, lanes)
                act(_Call(lanes, rows, rows.spread(mask[lanes.at])))
                return lanes

            return step

        return prepare

    return register


def _shuffle_source(ins: Instruction, lane, b, c):
    """Source lane and validity, as PTX defines them."""
    segment, clamp, b = (c >> 8) & 31, c & 31, b & 31
    highest = (lane & segment) | (clamp & ~segment)
    if "up" in ins.mods:
        j = lane - b
        valid = j >= highest
    elif "down" in ins.mods:
        j = lane + b
        valid = j <= highest
    elif "bfly" in ins.mods:
        j = lane ^ b
        valid = j <= highest
    else:
        j = (lane & segment) | (b & ~segment)
        valid = j <= highest
    return np.where(valid, j, lane), valid


@_collective("shfl")
def _prepare_shuffle(machine: Machine, ins: Instruction):
    result, value, b, c, _ = ins.operands
    valid_target = None
    if isinstance(result, Pair):
        valid_target = machine.target(result.second, "pred", ins)
        result = result.first
    target = machine.target(result, "b32", ins)
    source = machine.source(value, "b32", ins)
    fixed = None
    if isinstance(b, Imm) and isinstance(c, Imm):
        fixed = _shuffle_source(ins, _LANES, np.int64(b.value), np.int64(c.value))
    b_source, c_source = machine.source(b, "u32", ins), machine.source(c, "u32", ins)

    def act(call):
        values = call.take(source)
        if fixed is not None:
            lane, valid = fixed
            named = (call.masks & _BITS[lane]) != 0
            lane = np.broadcast_to(lane, values.shape)
        else:
            lane, valid = _shuffle_source(
                ins,
                _LANES,
                call.take(b_source).astype(np.int64),
                call.take(c_source).astype(np.int64),
            )
            named = (call.masks >> lane.astype(np.uint32)) & np.uint32(1) != 0
        if not named.all():
            lost = ~named & (call.masks != 0)
            if lost.any():
                bad = call.rows.collect(lost)
                i = int(np.flatnonzero(bad)[0])
                source_lane = int(call.rows.collect(lane)[i])
                what = f"the shuffle reads lane {source_lane}, which its mask leaves out"
                machine.fail(MaskError, what, call.lanes.ids[i], ins)
        at = call.lanes.at
        if fixed is not None:
            target[at] = call.rows.collect(values[:, fixed[0]])
        else:
            target[at] = call.rows.collect(np.take_along_axis(values, lane, 1))
        if valid_target is not None:
            valid_target[at] = call.rows.collect(np.broadcast_to(valid, values.shape))

    return act


def _ballot(predicate: np.ndarray) -> np.ndarray:
    """[warps, 32] bool -> [warps, 1] uint32."""
    return np.packbits(predicate, axis=1, bitorder="little").view("<u4")


@_collective("vote")
def _prepare_vote(machine: Machine, ins: Instruction):
    predicate = machine.source(ins.operands[1], "pred", ins)
    kind = next(m for m in ins.mods if m in ("ballot", "any", "all", "uni"))
    target = machine.target(ins.operands[0], "b32" if kind == "ballot" else "pred", ins)

    def act(call):
        votes = _ballot(call.take(predicate)) & call.masks
        if kind == "ballot":
            value = votes
        elif kind == "any":
            value = votes != 0
        else:
            value = votes == call.masks
            if kind == "uni":
                value |= votes == 0
        target[call.lanes.at] = call.rows.collect(value)

    return act


@_collective("match")
def _prepare_match(machine: Machine, ins: Instruction):
    source = machine.source(ins.operands[1], ins.type, ins)
    result, all_target = ins.operands[0], None
    if isinstance(result, Pair):
        all_target = machine.target(result.second, "pred", ins)
        result = result.first
    target = machine.target(result, "b32", ins)

    def act(call):
        values = call.take(source)
        equal = values[:, :, None] == values[:, None, :]
        same = np.packbits(equal, axis=2, bitorder="little").view("<u4")[:, :, 0] & call.masks
        if "all" in ins.mods:
            agreed = same == call.masks
            same = np.where(agreed, call.masks, np.uint32(0))
            if all_target is not None:
                all_target[call.lanes.at] = call.rows.collect(agreed)
        target[call.lanes.at] = call.rows.collect(same)

    return act


_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@_collective("redux")
def _prepare_reduce(machine: Machine, ins: Instruction):
    if ins.type.startswith("f"):
        raise Unsupported(f"`{ins.text}`")
    source = machine.source(ins.operands[1], ins.type, ins)
    target = machine.target(ins.operands[0], ins.type, ins)
    function = next(_REDUCE[m] for m in ins.mods if m in _REDUCE)

    def act(call):
        values = call.take(source)
        if (call.masks == _FULL).all():
            result = function.reduce(values, axis=1, keepdims=True, dtype=values.dtype)
        else:
            result, begun = np.zeros_like(values), np.zeros(values.shape, np.bool_)
            for lane in range(32):
                named = (call.masks & _BITS[lane]) != 0
                value = values[:, lane : lane + 1]
                combined = np.where(begun, function(result, value), value)
                result = np.where(named, combined, result)
                begun |= named
        target[call.lanes.at] = call.rows.collect(result)

    return act


@_collective("elect")
def _prepare_elect(machine: Machine, ins: Instruction):
    leader_target = machine.target(ins.operands[0].first, "b32", ins)
    chosen_target = machine.target(ins.operands[0].second, "pred", ins)

    def act(call):
        lowest = call.masks & (~call.masks + np.uint32(1))
        leader = np.bitwise_count(lowest - np.uint32(1)).astype(np.uint32)
        leader_target[call.lanes.at] = call.rows.collect(leader)
        chosen_target[call.lanes.at] = call.rows.collect(lowest == _BITS)

    return act


def bind_warp_sync(machine: Machine, ins: Instruction):
    """bar.warp.sync: its lanes may arrive from different instructions."""
    mask = machine.source(ins.operands[0], "u32", ins)

    def step(lanes):
        ready = machine.warp_waits.gather(lanes, mask[lanes.at], ins, key="bar.warp.sync")
        if ready is not None:
            arriving = np.unique(machine.warp[ready.ids])
            memory = machine.memory
            if memory.shared_races is not None:
                memory.shared_races.warp_sync(arriving)
                memory.global_races.warp_sync(arriving)
        return ready

    return step


def full_warps(machine: Machine, lanes: Lanes, ins: Instruction) -> Lanes | None:
    """For .aligned instructions: the lanes whose whole warps have arrived."""
    mask = machine.constant(0xFFFFFFFF, np.dtype(np.uint32))
    return machine.warp_waits.gather(lanes, mask[lanes.at], ins)
