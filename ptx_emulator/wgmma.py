"""Warpgroup products of sm_90a: wgmma.mma_async with its descriptors, groups and waits."""

import functools
import re
from dataclasses import dataclass, field

import numpy as np

from .errors import AsyncHazard, DescriptorError, OutOfBounds, Unsupported
from .machine import Lanes, Machine, instruction
from .matrix import fragment, unpack_floats
from .memory import NO_TILE
from .schedule import Waits
from .syntax import Instruction, Vector
from .tensor_map import swizzle

ITEM = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1}  # bytes of an element
_SPANS = {0: 0, 1: 128, 2: 64, 3: 32}


@functools.lru_cache(1024)
def operand_chunks(descriptor: int, extent: int, mn_major: bool, item: int) -> np.ndarray:
    """Byte addresses of a matrix operand's 16-byte chunks.

    K-major: [extent, 2], MN-major: [k, extent / 8]; extent is M or N, a product has 32 bytes of K.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = ((descriptor >> 16) & 0x3FFF) << 4
    stride = ((descriptor >> 32) & 0x3FFF) << 4
    span = _SPANS[descriptor >> 62]
    if mn_major:
        k = np.arange(32 // item)[:, None]
        chunk = np.arange(extent * item // 16)[None, :]
        if span == 0:
            return start + chunk * stride + k % 8 * 16 + k // 8 * leading
        per = span // 16
        linear = chunk // per * leading + chunk % per * 16 + k % 8 * span + k // 8 * stride
        return swizzle(start + linear, span)
    row = np.arange(extent)[:, None]
    chunk = np.arange(2)[None, :]
    if span == 0:
        return start + row // 8 * stride + row % 8 * 16 + chunk * leading
    return swizzle(start + row // 8 * stride + row % 8 * span + chunk * 16, span)


@functools.lru_cache(1024)
def _overlaps(descriptor: int, extent: int, mn_major: bool, item: int) -> bool:
    chunks = operand_chunks(descriptor, extent, mn_major, item)
    return len(np.unique(chunks)) < chunks.size


@dataclass
class _Product:
    """One wgmma of one warpgroup, issued and perhaps not yet computed."""

    lanes: Lanes
    compute: object
    registers: frozenset
    epoch: int
    ins: Instruction


@dataclass
class _Warpgroup:
    open: list = field(default_factory=list)
    groups: list = field(default_factory=list)
    late: bool = False


class WarpgroupProducts(Waits):
    """The products in flight, by the first warp of their warpgroup."""

    def __init__(self, machine: Machine, lazy: bool):
        self.machine, self.lazy = machine, lazy
        self.pending: dict[int, _Warpgroup] = {}

    def issue(self, row: int, product: _Product) -> None:
        group = self.pending.setdefault(row, _Warpgroup())
        if not group.open and not any(group.groups):  # products add up in order: all or none late
            group.late = self.lazy or self.machine.scheduler.delays()
        if not group.late:
            product.compute()
        group.open.append(product)
        in_flight = self.machine.scheduler.in_flight
        for name in product.registers:
            in_flight[name] = in_flight.get(name, 0) + 1

    def commit(self, row: int) -> None:
        group = self.pending.setdefault(row, _Warpgroup())
        group.groups.append(group.open)
        group.open = []

    def wait(self, row: int, groups_left: int) -> None:
        machine = self.machine
        group = self.pending.setdefault(row, _Warpgroup())
        groups, late = group.groups, group.late
        in_flight, races = machine.scheduler.in_flight, machine.memory.shared_races
        while len(groups) > groups_left:
            for product in groups.pop(0):
                if late:
                    product.compute()
                for name in product.registers:
                    in_flight[name] -= 1
                    if not in_flight[name]:
                        del in_flight[name]
                if races is not None:
                    actor = races.async_actor(row)
                    races.async_done(np.arange(row, row + 4), actor, product.epoch)

    def refuse_touch(self, ins: Instruction, lanes: Lanes) -> None:
        """Accumulators belong to the tensor cores until wait_group."""
        if ins.op == "wgmma":
            return
        rows = np.unique(self.machine.warp[lanes.ids])
        for row in np.unique(self._first_warp(rows)):
            group = self.pending.get(int(row))
            for product in (p for g in [group.open, *group.groups] for p in g) if group else ():
                touched = product.registers & ins.registers
                if touched:
                    holder = self.machine.quote(product.ins)
                    what = f"{min(touched)} is touched while {holder} holds it"
                    self.machine.fail(AsyncHazard, what, lanes.ids[0], ins)

    def _first_warp(self, rows: np.ndarray) -> np.ndarray:
        within = rows % self.machine.warps_per_block
        return rows - within % 4

    def finish(self) -> None:
        for group in self.pending.values():
            for product in (p for g in [group.open, *group.groups] for p in g):
                what = "the kernel ended without waiting for this wgmma"
                self.machine.fail(AsyncHazard, what, product.lanes.ids[0], product.ins)


@instruction("wgmma", blocking=True)
def _bind_wgmma(machine: Machine, ins: Instruction):
    products = machine.products
    if "fence" in ins.mods:
        return lambda lanes: lanes
    if "mma_async" in ins.mods:
        act = _bind_product(machine, ins)
    elif "commit_group" in ins.mods:

        def act(row, lanes):
            products.commit(row)
    else:
        left = ins.operands[0].value

        def act(row, lanes):
            products.wait(row, left)

    def step(lanes):
        lanes = _warpgroups(machine, lanes, ins)
        if lanes is None:
            return None
        for start in range(0, lanes.n, 128):
            group = Lanes(lanes.ids[start : start + 128])
            act(int(machine.warp[group.ids[0]]), group)
        return lanes

    return step


def _warpgroups(machine: Machine, lanes: Lanes, ins: Instruction) -> Lanes | None:
    """Lanes of whole warpgroups; the others are parked until their warpgroup is complete."""
    waiting = machine.warp_waits.groups.pop(machine.pc, None)
    ids = lanes.ids if waiting is None else np.sort(np.concatenate([lanes.ids, waiting]))
    group = machine.block_of[ids] * 64 + machine.thread[ids] // 128
    names, where, counts = np.unique(group, return_inverse=True, return_counts=True)
    whole = counts[where] == 128
    if not whole.all():
        machine.warp_waits.groups[machine.pc] = ids[~whole]
        ids = ids[whole]
    return Lanes(ids) if len(ids) else None


def _uniform(machine: Machine, values: np.ndarray, lanes: Lanes, ins: Instruction) -> int:
    if (values != values[0]).any():
        what = "a wgmma operand differs among the threads of a warpgroup"
        machine.fail(DescriptorError, what, lanes.ids[0], ins)
    return int(values[0])


def _bind_product(machine: Machine, ins: Instruction):
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", next(m for m in ins.mods if m.startswith("m64n")))
    columns, (d_type, a_type, b_type) = int(shape[1]), ins.types[:3]
    if d_type != "f32" or a_type != b_type or a_type not in ITEM:
        raise Unsupported(f"`{ins.text}`")
    item = ITEM[a_type]
    if int(shape[2]) * item != 32 or (item != 2 and len(ins.operands) > 6):
        raise Unsupported(f"`{ins.text}`")  # along M or N lie operands of 16 bits alone
    result, a, b, keep, scale_a, scale_b, *transposed = ins.operands
    from_registers = isinstance(a, Vector)
    flags = [bool(t.value) for t in transposed]
    a_transposed = flags[0] if len(flags) == 2 else False
    b_transposed = flags[-1] if flags else False
    targets = [machine.target(o, "f32", ins) for o in result.items]
    if from_registers:
        a_sources = [machine.source(o, "b32", ins) for o in a.items]
    else:
        a_source = machine.source(a, "u64", ins)
    b_source = machine.source(b, "u64", ins)
    keep_type = "pred" if not hasattr(keep, "value") else "u32"
    keep_source = machine.source(keep, keep_type, ins)
    sign = np.float32(scale_a.value * scale_b.value)
    registers = frozenset(o.name for o in result.items)

    def chunks_of(source, lanes, extent, mn_major):
        descriptor = _uniform(machine, source[lanes.at], lanes, ins)
        chunks = operand_chunks(descriptor, extent, mn_major, item)
        if _overlaps(descriptor, extent, mn_major, item):
            what = f"the strides of the wgmma descriptor {descriptor:#018x} make its rows overlap"
            machine.fail(DescriptorError, what, lanes.ids[0], ins)
        if int(chunks.max()) + 16 > machine.memory.limit:
            what = f"a wgmma operand reaches shared byte {int(chunks.max()) + 16}"
            machine.fail(OutOfBounds, what, lanes.ids[0], ins)
        chunks = chunks + machine.memory.block_base[lanes.ids[0]]
        written = machine.memory.tile_swizzle[chunks >> 4]
        other = (written != NO_TILE) & (written != _SPANS[descriptor >> 62])
        if other.any():
            what = (
                f"a wgmma descriptor with a swizzle of {_SPANS[descriptor >> 62]} bytes reads what "
                f"TMA wrote with one of {written[other][0]}"
            )
            machine.fail(DescriptorError, what, lanes.ids[0], ins)
        return chunks

    def fetch(chunks, mn_major):
        """-> float32 [extent, k]"""
        data = machine.memory.shared.reshape(-1, 16)[chunks // 16]
        values = unpack_floats(data.view(np.uint32), a_type).reshape(len(chunks), -1)
        return values.T if mn_major else values

    def act(first_row, lanes):
        b_chunks = chunks_of(b_source, lanes, columns, b_transposed)
        a_chunks = None if from_registers else chunks_of(a_source, lanes, 64, a_transposed)
        adds = keep_source[lanes.at].copy() != 0
        keeps, words = adds.any(), None
        if from_registers:
            words = [s[lanes.at].reshape(-1, 32).copy() for s in a_sources]
        epoch, races = 0, machine.memory.shared_races
        if races is not None:
            used = [c.reshape(-1) for c in (a_chunks, b_chunks) if c is not None]
            cells, _ = races.cells(np.concatenate(used), 16)
            rows = np.arange(first_row, first_row + 4)
            epoch = races.async_read(cells, rows, lanes.ids, ins)

        def compute():
            if from_registers:
                left = fragment(words, a_type, True).reshape(64, -1)
            else:
                left = fetch(a_chunks, a_transposed)
            # In double, so that an element is the same whatever N is: float32 sums of BLAS are not.
            # Of e4m3 that is exact; what the hardware drops of such sums is its own.
            right = fetch(b_chunks, b_transposed).T.astype(np.float64)
            product = (left.astype(np.float64) @ right).astype(np.float32) * sign  # [64, N]
            # Rows are (warp, half, 8 groups), columns (block of 8, 4 in a group, pair).
            parts = product.reshape(4, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
            at = lanes.at
            for target, value in zip(targets, parts.reshape(-1, 128)):
                if keeps:
                    value = np.where(adds, target[at] + value, value)
                target[at] = value

        block = int(machine.block_of[lanes.ids[0]])
        machine.note("product", block, int(lanes.ids[0]), 0, columns)
        machine.products.issue(first_row, _Product(lanes, compute, registers, epoch, ins))

    return act
