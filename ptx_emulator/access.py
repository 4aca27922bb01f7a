"""Loads, stores, atomics and fences."""

import numpy as np

from .errors import GlobalRace, SharedRace, Unsupported
from .machine import Lanes, Machine, instruction
from .syntax import Instruction, Sink, Vector
from .types import DTYPES, SIGNED, UNSIGNED, from_double, is_signed, to_float

_STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio")


def _located(machine: Machine, ins: Instruction, operand, nbytes: int, write, atomic):
    """A function of lanes that yields (views, offsets, lanes) for every space they address."""
    memory, space = machine.memory, ins.state_space()
    address = machine.address(operand, ins)
    if space != "generic":

        def direct(lanes):
            views, offsets = memory.locate(space, address(lanes), nbytes, lanes, ins, write, atomic)
            return [(views, offsets, lanes, space)]

        return direct

    def generic(lanes):
        parts = []
        for where, at, some, _ in memory.split_generic(address(lanes), lanes):
            views, offsets = memory.locate(where, at, nbytes, some, ins, write, atomic)
            parts.append((views, offsets, some, where))
        return parts

    return generic


@instruction("ld", "ldu")
def _bind_load(machine: Machine, ins: Instruction):
    result = ins.operands[0]
    items = result.items if isinstance(result, Vector) else (result,)
    dtype = DTYPES[ins.type]
    if dtype.fields:
        raise Unsupported(f"128-bit items in `{ins.text}`")
    size = dtype.itemsize
    strong = any(m in _STRONG for m in ins.mods)
    located = _located(machine, ins, ins.operands[1], size * len(items), False, strong)
    targets = [
        (i, None if isinstance(item, Sink) else _load_target(machine, item, ins))
        for i, item in enumerate(items)
    ]

    def step(lanes):
        races = machine.memory.global_races if strong else None
        for views, offsets, some, space in located(lanes):
            view = views[size]
            index = offsets // size if size > 1 else offsets
            for i, target in targets:
                values = view[index + i if i else index]
                if races is not None and space == "global":
                    values = races.loaded(some, offsets + i * size, ins, values)
                if target is not None:
                    target[some.at] = values.view(dtype)

    return step


def _load_target(machine: Machine, item, ins: Instruction):
    """Loads widen: s types extend the sign, all others fill with zeros."""
    array = machine.register(item.name)
    kinds = SIGNED if is_signed(ins.type) else UNSIGNED
    dtype = DTYPES[ins.type]
    if dtype.kind == "f":
        return machine.target(item, ins.type, ins)
    return array.view(kinds[array.dtype.itemsize])


@instruction("st")
def _bind_store(machine: Machine, ins: Instruction):
    if ins.state_space() == "param":  # arguments of a call, and calls only ever trap
        return lambda lanes: None
    value = ins.operands[1]
    items = value.items if isinstance(value, Vector) else (value,)
    if DTYPES[ins.type].fields:
        raise Unsupported(f"128-bit items in `{ins.text}`")
    size = DTYPES[ins.type].itemsize
    strong = any(m in _STRONG for m in ins.mods)
    located = _located(machine, ins, ins.operands[0], size * len(items), True, strong)
    sources = [machine.source(item, ins.type, ins) for item in items]
    unsigned = UNSIGNED[size]

    def step(lanes):
        memory = machine.memory
        races = memory.global_races if strong else None
        for views, offsets, some, space in located(lanes):
            view = views[size]
            index = offsets // size if size > 1 else offsets
            checked = not strong and space != "local" and memory.shared_races is not None
            for i, source in enumerate(sources):
                where = index + i if i else index
                values = np.ascontiguousarray(source[some.at]).view(unsigned)
                view[where] = values
                if races is not None and space == "global":
                    races.stored(some, offsets + i * size, ins, values)
                if checked:
                    _check_collisions(machine, ins, view[where] != values, some, space)

    return step


def _check_collisions(machine, ins, lost: np.ndarray, lanes: Lanes, space: str) -> None:
    """Different values stored to one place by one instruction."""
    if lost.any():
        i = int(np.flatnonzero(lost)[0])
        error = SharedRace if space == "shared" else GlobalRace
        what = f"{space}-memory race: threads store different values to one place at once"
        machine.fail(error, what, lanes.ids[i], ins)


# ---- atomics
def _wrap_inc(old, bound):
    return np.where(old >= bound, 0, old + 1).astype(old.dtype)


def _wrap_dec(old, bound):
    return np.where((old == 0) | (old > bound), bound, old - 1).astype(old.dtype)


_ATOMIC = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": _wrap_inc,
    "dec": _wrap_dec,
}


def _packed(function, kind: str):
    """An atomic on f16, bf16 or a pair of them, kept as bits."""

    def apply(old, new):
        parts = [
            to_float(np.ascontiguousarray(v).view(np.uint16), kind).astype(np.float64)
            for v in (old, new)
        ]
        return from_double(function(*parts), kind).view(old.dtype)

    return apply


def _first_of_each(index: np.ndarray) -> np.ndarray:
    """Positions of the first occurrence of every distinct index."""
    return np.unique(index, return_index=True)[1]


@instruction("atom", "red")
def _bind_atomic(machine: Machine, ins: Instruction):
    if any(isinstance(o, Vector) for o in ins.operands):
        raise Unsupported(f"vector atomics, `{ins.text}`")
    returns = ins.op == "atom"
    place, *values = ins.operands[1:] if returns else ins.operands
    name = next((m for m in ins.mods if m in _ATOMIC or m == "cas"), None)
    kind = ins.type
    if name is None or DTYPES[kind].fields:
        raise Unsupported(f"`{ins.text}`")
    half = kind in ("f16", "bf16", "f16x2", "bf16x2")
    raw = {2: "b16", 4: "b32"}[DTYPES[kind].itemsize] if half else kind
    dtype = DTYPES[raw]
    size = dtype.itemsize
    function = None if name == "cas" else _ATOMIC[name]
    if half:
        function = _packed(function, kind)
    located = _located(machine, ins, place, size, True, True)
    sources = [machine.source(v, raw, ins) for v in values]
    target = None
    if returns and not isinstance(ins.operands[0], Sink):
        target = machine.target(ins.operands[0], raw, ins)
    commutes = isinstance(function, np.ufunc)

    def step(lanes):
        races = machine.memory.global_races
        for views, offsets, some, space in located(lanes):
            view, index = views[size].view(dtype), offsets // size
            operands, turns = [s[some.at] for s in sources], np.arange(len(index))
            if target is None and commutes:
                function.at(view, index, operands[0])
            else:
                old, turns = _one_by_one(view, index, operands)
                if target is not None:
                    target[some.at] = old
            if races is not None and space == "global":
                races.stored(Lanes.listed(some.ids[turns]), offsets[turns], ins, view[index[turns]])

    def _one_by_one(view, index, operands):
        """Lanes that share a place take turns, in an order that the schedule may shuffle: what
        each saw, and that order."""
        old, turns = np.empty(len(index), dtype), []
        random = machine.scheduler.random
        rest = np.arange(len(index)) if random is None else random.permutation(len(index))
        while len(rest):
            turn = rest[_first_of_each(index[rest])]
            turns.append(turn)
            where = index[turn]
            before = old[turn] = view[where]
            if name == "cas":
                view[where] = np.where(before == operands[0][turn], operands[1][turn], before)
            else:
                view[where] = function(before, operands[0][turn])
            if len(turn) == len(rest):
                break
            left = np.ones(len(index), np.bool_)
            left[turn] = False
            rest = rest[left[rest]]
        return old, np.concatenate(turns)

    return step


# ---- fences, and what has no effect here
@instruction("membar", "fence")
def _bind_fence(machine: Machine, ins: Instruction):
    def step(lanes):
        memory = machine.memory
        if "proxy" in ins.mods:
            if memory.shared_races is not None and any(m.startswith("async") for m in ins.mods):
                memory.shared_races.proxy_fence(lanes)
                memory.global_races.proxy_fence(lanes)
        elif memory.global_races is not None:
            memory.global_races.fence(lanes, ins)

    return step


@instruction(
    "setmaxnreg",
    "nanosleep",
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "pmevent",
    "createpolicy",
)
def _bind_nothing(machine: Machine, ins: Instruction):
    return lambda lanes: None


@instruction("activemask")
def _bind_active_mask(machine: Machine, ins: Instruction):
    target = machine.target(ins.operands[0], "b32", ins)

    def step(lanes):
        masks = np.zeros(machine.num_blocks * machine.warps_per_block, np.uint32)
        np.bitwise_or.at(masks, machine.warp[lanes.at], machine.lane_bit[lanes.at])
        target[lanes.at] = masks[machine.warp[lanes.at]]

    return step
