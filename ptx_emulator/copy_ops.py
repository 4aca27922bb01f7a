"""The instructions of asynchronous copies: cp.async, bulk copies, TMA tiles."""

import numpy as np

from .copies import BulkLoad, BulkStore, ThreadCopy
from .errors import ClusterError, DescriptorError, Unsupported
from .machine import GLOBAL_BASE, PARAM_BASE, Lanes, Machine, instruction
from .mbarriers import shared_address
from .syntax import Address, Imm, Instruction, TensorAddress
from .tensor_map import swizzle


@instruction("cp")
def _bind_copy(machine: Machine, ins: Instruction):
    mods = ins.mods
    if "async" in mods[:2] and "bulk" in mods[1:3]:
        return bind_bulk(machine, ins)
    if mods[0] != "async":
        raise Unsupported(f"`{ins.text}`")
    copies = machine.copies
    if "commit_group" in mods:
        return copies.commit
    if "wait_group" in mods:
        left = ins.operands[0].value
        return lambda lanes: copies.land(lanes, left)
    if "wait_all" in mods:
        return lambda lanes: copies.land(lanes, None)
    if "mbarrier" in mods:
        return _bind_copy_arrive(machine, ins)
    return _bind_thread_copy(machine, ins)


def _bind_thread_copy(machine: Machine, ins: Instruction):
    target = machine.address(ins.operands[0], ins)
    source = machine.address(ins.operands[1], ins)
    size = ins.operands[2].value
    valid = machine.source(ins.operands[3] if len(ins.operands) > 3 else Imm(size), "u32", ins)
    memory, copies = machine.memory, machine.copies

    def step(lanes):
        at, origin = target(lanes), source(lanes)
        count = np.minimum(valid[lanes.at].astype(np.int64), size)
        if (at % size).any():
            memory.locate("shared", at, size, lanes, ins, True)  # reports the misaligned address
        shared = memory.shared_offsets(at, size, lanes, ins, True)
        for n in np.unique(count[count > 0]):  # all but ragged edges copy `size` bytes
            some = lanes if (count == n).all() else lanes.where(count == n)
            part = origin[count == n]
            width = int(n) & -int(n)
            starts = (part[:, None] + np.arange(0, int(n), width)).reshape(-1)
            many = Lanes.repeated(0, len(starts))
            many.ids = many.at = np.repeat(some.ids, int(n) // width)
            memory.locate("global", starts, width, many, ins)
        group = copies.committed[lanes.at].copy()
        source_offsets = origin - GLOBAL_BASE
        copies.issue(ThreadCopy(lanes.ids, group, shared, source_offsets, size, count, ins))

    return step


def _bind_copy_arrive(machine: Machine, ins: Instruction):
    address = shared_address(machine, ins.operands[0], ins)
    if "noinc" not in ins.mods:
        raise Unsupported(f"without .noinc: `{ins.text}`")

    def step(lanes):
        machine.copies.land(lanes, None)
        for block, where, members in machine.mbarriers.groups(lanes, address(lanes)):
            ids = lanes.ids[members]
            machine.mbarriers.arrive(block, where, len(ids), 0, ids, ins)

    return step


def bind_bulk(machine: Machine, ins: Instruction):
    mods, copies = ins.mods, machine.copies
    if "commit_group" in mods:
        return copies.commit_stores
    if "wait_group" in mods:
        left = ins.operands[0].value
        return lambda lanes: copies.finish_stores(lanes, left, "read" in mods)
    multicast = any(m.startswith("multicast") for m in mods)
    if "im2col" in mods or (multicast and "tensor" not in mods):
        raise Unsupported(f"`{ins.text}`")
    stores = isinstance(ins.operands[0], TensorAddress) or "bulk_group" in mods
    if "prefetch" in mods:
        kind, bind = "prefetch", _bind_prefetch
    elif "tensor" in mods:
        kind, bind = ("store", _bind_tensor_store) if stores else ("load", _bind_tensor_load)
    else:
        kind, bind = ("store", _bind_flat_store) if stores else ("load", _bind_flat_load)
    step, warps = bind(machine, ins), copies.bulk_warps.setdefault(kind, set())

    def noting(lanes):
        warps.update(np.unique(machine.warp_in_block[lanes.ids]).tolist())
        return step(lanes)

    return noting


def _bind_prefetch(machine: Machine, ins: Instruction):
    """Moves nothing that a kernel could see; what it names must exist."""
    if "tensor" in ins.mods:
        raise Unsupported(f"`{ins.text}`")
    origin = machine.address(ins.operands[0], ins)
    size = machine.source(ins.operands[1], "u32", ins)

    def step(lanes):
        for i, (at, nbytes) in enumerate(zip(origin(lanes), size[lanes.at].tolist())):
            if at % 16 or nbytes % 16:
                what = f"a bulk prefetch of {nbytes} bytes that is not aligned to 16"
                machine.fail(DescriptorError, what, lanes.ids[i], ins)
            chunks = np.arange(0, nbytes, 16)
            many = Lanes.repeated(int(lanes.ids[i]), len(chunks))
            if machine.memory.globals.outside(at - GLOBAL_BASE + chunks, 16) is not None:
                machine.memory.locate("global", at + chunks, 16, many, ins)

    return step


def _tile(machine: Machine, operand: TensorAddress, ins: Instruction):
    """A function of lanes that gives (map, coordinates) for each."""
    address = machine.address(operand.base, ins)
    coordinates = [machine.source(c, "s32", ins) for c in operand.coordinates.items]
    maps = machine.copies.maps

    def tiles(lanes):
        columns = [c[lanes.at].tolist() for c in coordinates]
        for i, at in enumerate(address(lanes).tolist()):
            found = maps.get(at - PARAM_BASE if at >= PARAM_BASE else at)
            if found is None:
                what = f"no tensor map at {at:#x}"
                machine.fail(DescriptorError, what, lanes.ids[i], ins)
            if len(found.box) != len(columns):
                what = f"a map of rank {len(found.box)} with {len(columns)} coordinates"
                machine.fail(DescriptorError, what, lanes.ids[i], ins)
            yield found, [column[i] for column in columns]

    return tiles


def _tile_in_shared(machine, tile, chunk: int, at: int, thread_id: int, ins, write: bool):
    """Offsets of a tile's chunks in shared memory, swizzled."""
    if at % 128:
        what = f"a tile at shared address {at:#x}, which is not aligned to 128 bytes"
        machine.fail(DescriptorError, what, thread_id, ins)
    linear = swizzle(at + np.arange(0, tile.tile_bytes, chunk), tile.swizzle_span)
    lanes = Lanes.repeated(thread_id, len(linear))
    return machine.memory.shared_offsets(linear, chunk, lanes, ins, write)


def _bind_tensor_load(machine: Machine, ins: Instruction):
    target = machine.address(ins.operands[0], ins)
    tiles = _tile(machine, ins.operands[1], ins)
    mbarrier = shared_address(machine, ins.operands[2], ins)
    mask = None
    if any(m.startswith("multicast") for m in ins.mods):
        mask = machine.source(ins.operands[3], "u16", ins)
    memory = machine.memory

    def step(lanes):
        places, barriers = target(lanes).tolist(), mbarrier(lanes).tolist()
        masks = None if mask is None else mask[lanes.at]
        for i, (tile, coordinates) in enumerate(tiles(lanes)):
            thread_id = int(lanes.ids[i])
            chunk, offsets, inside = tile.cut(coordinates)
            shared = _tile_in_shared(machine, tile, chunk, places[i], thread_id, ins, True)
            values = np.zeros((len(offsets), chunk), np.uint8)
            if inside.any():
                offsets = offsets[inside]
                many = Lanes.repeated(thread_id, len(offsets))
                memory.locate("global", offsets + GLOBAL_BASE, chunk, many, ins)
                values[inside] = memory.globals.data.reshape(-1, chunk)[offsets // chunk]
            own = int(machine.block_of[thread_id])
            for block in _targets(machine, ins, thread_id, masks, i):
                there = shared + (block - own) * memory.stride
                if memory.tile_swizzle is not None:
                    memory.tile_swizzle[there >> 4] = tile.swizzle_span
                machine.mbarriers.find(block, barriers[i], thread_id, ins)
                machine.mbarriers.check_remote(block, barriers[i], thread_id, ins)
                machine.copies.begin_load(
                    BulkLoad(
                        thread_id,
                        block,
                        barriers[i],
                        tile.tile_bytes,
                        chunk,
                        there,
                        values,
                        None,
                        0,
                        ins,
                    )
                )

    return step


def _targets(machine: Machine, ins: Instruction, thread_id: int, masks, i: int) -> list[int]:
    """The blocks that a load goes to: its own, or those of the cluster that the mask names."""
    own = int(machine.block_of[thread_id])
    if masks is None:
        return [own]
    mask, first = int(masks[i]), own - own % machine.cluster
    if not mask or mask >> machine.cluster:
        what = f"a multicast to {mask:#b} in a cluster of {machine.cluster}"
        machine.fail(ClusterError, what, thread_id, ins)
    return [first + rank for rank in range(machine.cluster) if mask >> rank & 1]


def _reduction(ins: Instruction) -> bool:
    """Whether a store adds to what is there, in f32; other reductions are not modelled.

    It counts as a read and a plain write of its thread: two of one place that nothing orders are a
    race, as the sum's last bits would depend on their order."""
    if "reduce" not in ins.mods:
        return False
    if "add" not in ins.mods:
        raise Unsupported(f"`{ins.text}`")
    return True


def _bind_tensor_store(machine: Machine, ins: Instruction):
    adds = _reduction(ins)
    tiles = _tile(machine, ins.operands[0], ins)
    source = machine.address(ins.operands[1], ins)

    def step(lanes):
        places = source(lanes).tolist()
        for i, (tile, coordinates) in enumerate(tiles(lanes)):
            thread_id = int(lanes.ids[i])
            if adds and tile.item != 4:
                raise Unsupported(f"`{ins.text}` of items of {tile.item} bytes")
            chunk, offsets, inside = tile.cut(coordinates)
            shared = _tile_in_shared(machine, tile, chunk, places[i], thread_id, ins, False)
            offsets = offsets[inside]
            if len(offsets):
                many = Lanes.repeated(thread_id, len(offsets))
                for write in (False, True) if adds else (True,):
                    machine.memory.locate("global", offsets + GLOBAL_BASE, chunk, many, ins, write)
            machine.copies.begin_store(
                BulkStore(thread_id, chunk, shared[inside], offsets, 0, ins, adds=adds)
            )

    return step


def _flat(machine: Machine, ins: Instruction, shared_operand: Address, global_operand: Address):
    """A plain bulk copy: (thread, offsets in shared, generic addresses), in chunks of 16 bytes."""
    shared = machine.address(shared_operand, ins)
    origin = machine.address(global_operand, ins)
    size = machine.source(ins.operands[2], "u32", ins)

    def copies(lanes, write_shared: bool):
        places, others, sizes = shared(lanes), origin(lanes), size[lanes.at]
        for i, (at, other, nbytes) in enumerate(zip(places, others, sizes.tolist())):
            if at % 16 or other % 16 or nbytes % 16:
                what = f"a bulk copy of {nbytes} bytes that is not aligned to 16"
                machine.fail(DescriptorError, what, lanes.ids[i], ins)
            chunks = np.arange(0, nbytes, 16)
            many = Lanes.repeated(int(lanes.ids[i]), len(chunks))
            inside = machine.memory.shared_offsets(at + chunks, 16, many, ins, write_shared)
            machine.memory.locate("global", other + chunks, 16, many, ins, not write_shared)
            yield int(lanes.ids[i]), inside, other + chunks - GLOBAL_BASE

    return copies


def _bind_flat_load(machine: Machine, ins: Instruction):
    copies = _flat(machine, ins, ins.operands[0], ins.operands[1])
    mbarrier = shared_address(machine, ins.operands[3], ins)

    def step(lanes):
        barriers = mbarrier(lanes).tolist()
        for i, (thread_id, shared, offsets) in enumerate(copies(lanes, True)):
            values = machine.memory.globals.data.reshape(-1, 16)[offsets // 16]
            block = int(machine.block_of[thread_id])
            nbytes = 16 * len(offsets)
            machine.mbarriers.find(block, barriers[i], thread_id, ins)
            machine.copies.begin_load(
                BulkLoad(thread_id, block, barriers[i], nbytes, 16, shared, values, None, 0, ins)
            )

    return step


def _bind_flat_store(machine: Machine, ins: Instruction):
    copies = _flat(machine, ins, ins.operands[1], ins.operands[0])
    if "reduce" in ins.mods:
        raise Unsupported(f"`{ins.text}`")

    def step(lanes):
        for thread_id, shared, offsets in copies(lanes, False):
            machine.copies.begin_store(BulkStore(thread_id, 16, shared, offsets, 0, ins))

    return step
