"""Moves, shifts, bit fields and conversions."""

import numpy as np

from .errors import Unsupported
from .machine import (
    GLOBAL_BASE,
    LOCAL_BASE,
    PARAM_BASE,
    SHARED_BASE,
    Machine,
    instruction,
)
from .syntax import Instruction, Sink, Vector
from .types import (
    DTYPES,
    UNSIGNED,
    bf16_to_f32,
    f32_to_bf16,
    f64_to_bf16,
    size_of,
)


@instruction("mov")
def _bind_move(machine: Machine, ins: Instruction):
    result, value = ins.operands
    if isinstance(result, Vector):
        return _unpack(machine, ins, result, value)
    if isinstance(value, Vector):
        return _pack(machine, ins, result, value)
    source = machine.source(value, ins.type, ins)
    target = machine.target(result, ins.type, ins)

    def step(lanes):
        target[lanes.at] = source[lanes.at]

    return step


def _unpack(machine: Machine, ins: Instruction, result: Vector, value):
    bits = 8 * size_of(ins.type) // len(result.items)
    source = machine.source(value, ins.type, ins)
    parts = [
        (machine.target(item, f"b{bits}", ins), i * bits, UNSIGNED[bits // 8])
        for i, item in enumerate(result.items)
        if not isinstance(item, Sink)
    ]

    def step(lanes):
        whole = source[lanes.at]
        for target, shift, dtype in parts:
            target[lanes.at] = (whole >> whole.dtype.type(shift)).astype(dtype)

    return step


def _pack(machine: Machine, ins: Instruction, result, value: Vector):
    bits = 8 * size_of(ins.type) // len(value.items)
    dtype = DTYPES[ins.type].type
    parts = [
        (machine.source(item, f"b{bits}", ins), dtype(i * bits))
        for i, item in enumerate(value.items)
    ]
    target = machine.target(result, ins.type, ins)

    def step(lanes):
        whole = dtype(0)
        for source, shift in parts:
            whole = whole | (source[lanes.at].astype(dtype) << shift)
        target[lanes.at] = whole

    return step


def _simple(name: str, types, function, result=None):
    """Register target = function(sources); `types` per source, None for the instruction's own."""

    @instruction(name)
    def bind(machine: Machine, ins: Instruction):
        sources = [machine.source(o, t or ins.type, ins) for o, t in zip(ins.operands[1:], types)]
        target = machine.target(ins.operands[0], result or ins.type, ins)

        def step(lanes):
            target[lanes.at] = function(ins, *[s[lanes.at] for s in sources])

        return step


def _shift_left(ins, value, amount):
    width = 8 * value.dtype.itemsize
    shifted = value << np.minimum(amount, width - 1).astype(value.dtype)
    return np.where(amount >= width, value.dtype.type(0), shifted)


def _shift_right(ins, value, amount):
    width = 8 * value.dtype.itemsize
    shifted = value >> np.minimum(amount, width - 1).astype(value.dtype)
    if value.dtype.kind == "i":
        return shifted
    return np.where(amount >= width, value.dtype.type(0), shifted)


def _funnel_shift(ins, low, high, amount):
    amount = amount & 31 if "wrap" in ins.mods else np.minimum(amount, 32)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    amount = amount.astype(np.uint64)
    if "l" in ins.mods:
        return ((both << amount) >> np.uint64(32)).astype(np.uint32)
    return (both >> amount).astype(np.uint32)


def _low_ones(count: np.ndarray) -> np.ndarray:
    """uint64 with the lowest `count` bits set, count to 64."""
    count = np.minimum(count, 64).astype(np.uint64)
    full = count >= 64
    ones = (np.uint64(1) << np.where(full, np.uint64(0), count)) - np.uint64(1)
    return np.where(full, ~np.uint64(0), ones)


def _field_insert(ins, field, base, position, length):
    position, length = position & 255, length & 255
    width = 8 * base.dtype.itemsize
    mask = _low_ones(length) << np.minimum(position, 63).astype(np.uint64)
    moved = field.astype(np.uint64) << np.minimum(position, 63).astype(np.uint64)
    merged = ((base.astype(np.uint64) & ~mask) | (moved & mask)).astype(base.dtype)
    return np.where(position >= width, base, merged)


def _field_extract(ins, value, position, length):
    width, signed = 8 * value.dtype.itemsize, value.dtype.kind == "i"
    position, length = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
    wide = value.astype(np.int64).view(np.uint64) if signed else value.astype(np.uint64)
    last = np.minimum(position + length - 1, width - 1)
    filling = (wide >> last.clip(0).astype(np.uint64)) & np.uint64(1)
    filling = np.where((length > 0) & signed & (filling == 1), ~np.uint64(0), np.uint64(0))
    inside = np.where(position < width, wide >> np.minimum(position, 63).astype(np.uint64), filling)
    available = np.clip(width - position, 0, length)
    mask = _low_ones(available)
    return ((inside & mask) | (filling & ~mask)).astype(value.dtype)


def _bit_mask(ins, position, length):
    wrap = "wrap" in ins.mods
    position = position & 31 if wrap else np.minimum(position, 32)
    length = length & 31 if wrap else np.minimum(length, 32)
    return ((_low_ones(length) << position.astype(np.uint64)) & np.uint64(0xFFFFFFFF)).astype(
        np.uint32
    )


def _highest_bit(value: np.ndarray) -> np.ndarray:
    """Position of the highest one, -1 for zero, as int64; exact for 64 bits."""
    wide = value.astype(np.uint64)
    for shift in (1, 2, 4, 8, 16, 32):
        wide = wide | (wide >> np.uint64(shift))
    return np.bitwise_count(wide).astype(np.int64) - 1


def _find_bit(ins, value):
    if value.dtype.kind == "i":
        value = np.where(value < 0, ~value, value).view(UNSIGNED[value.dtype.itemsize])
    position = _highest_bit(value)
    if "shiftamt" in ins.mods:
        position = np.where(position < 0, -1, 8 * value.dtype.itemsize - 1 - position)
    return (position & 0xFFFFFFFF).astype(np.uint32)


def _reverse_bits(ins, value):
    size = value.dtype.itemsize
    octets = np.ascontiguousarray(value).view(np.uint8).reshape(-1, size)[:, ::-1]
    flipped = np.packbits(np.unpackbits(octets, axis=1, bitorder="little"), axis=1)
    return np.ascontiguousarray(flipped).view(value.dtype).reshape(-1)


def _logic3(ins, a, b, c, table):
    table = int(table.flat[0])
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


_simple("shl", (None, "u32"), _shift_left)
_simple("shr", (None, "u32"), _shift_right)
_simple("shf", ("u32", "u32", "u32"), _funnel_shift, "u32")
_simple("bfi", (None, None, "u32", "u32"), _field_insert)
_simple("bfe", (None, "u32", "u32"), _field_extract)
_simple("bmsk", ("u32", "u32"), _bit_mask, "u32")
_simple("popc", (None,), lambda ins, v: np.bitwise_count(v).astype(np.uint32), "u32")
_simple(
    "clz",
    (None,),
    lambda ins, v: (8 * v.dtype.itemsize - 1 - _highest_bit(v)).astype(np.uint32),
    "u32",
)
_simple("bfind", (None,), _find_bit, "u32")
_simple("brev", (None,), _reverse_bits)
_simple("lop3", ("b32", "b32", "b32", "b32"), _logic3, "b32")


@instruction("prmt")
def _bind_permute_bytes(machine: Machine, ins: Instruction):
    modes = ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    if any(m in modes for m in ins.mods):
        raise Unsupported(f"`{ins.text}`")
    a, b, selector = (machine.source(o, "u32", ins) for o in ins.operands[1:4])
    target = machine.target(ins.operands[0], "u32", ins)

    def step(lanes):
        at = lanes.at
        both = (b[at].astype(np.uint64) << np.uint64(32)) | a[at]
        choice, result = selector[at], np.uint32(0)
        for i in range(4):
            nibble = (choice >> np.uint32(4 * i)) & np.uint32(15)
            octet = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(
                np.uint32
            ) & np.uint32(255)
            sign = np.where(octet >= 128, np.uint32(255), np.uint32(0))
            octet = np.where(nibble >= 8, sign, octet)
            result = result | (octet << np.uint32(8 * i))
        target[at] = result

    return step


# ---- conversions
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounded floats -> integers: saturating, NaN becomes zero."""
    info = np.iinfo(dtype)
    wide = values.astype(np.float64)
    inside = (wide > float(info.min)) & (wide < float(info.max) + (dtype.itemsize < 8))
    result = np.where(inside, wide, 0).astype(dtype)
    result = np.where(wide >= float(info.max), info.max, result)
    result = np.where(wide <= float(info.min), info.min, result)
    return result.astype(dtype)


@instruction("cvt")
def _bind_convert(machine: Machine, ins: Instruction):
    to, source_type = ins.types
    if to in ("f16x2", "bf16x2"):
        return _convert_pair(machine, ins)
    source = machine.source(ins.operands[1], source_type, ins)
    target = machine.target(ins.operands[0], to, ins)
    dtype = DTYPES[to]
    rounding = next((_ROUND[m] for m in ins.mods if m in _ROUND), None)
    from_float = source_type in ("f16", "f32", "f64", "bf16")
    to_float = to in ("f16", "f32", "f64", "bf16", "tf32")

    def step(lanes):
        values = source[lanes.at]
        if source_type == "bf16":
            values = bf16_to_f32(values)
        if rounding is not None:
            values = rounding(values)
        if "relu" in ins.mods:
            values = np.where(values > 0, values, 0).astype(values.dtype)
        if "sat" in ins.mods and to_float:
            values = np.clip(np.nan_to_num(values), 0, 1)
        if to == "bf16":
            values = _to_bf16(values, "rz" in ins.mods)
        elif to == "tf32":
            bits = np.ascontiguousarray(values).view(np.uint32)
            values = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
        elif from_float and not to_float:
            values = _to_integer(values, dtype)
        elif "sat" in ins.mods and not to_float:
            info = np.iinfo(dtype)
            values = np.clip(values, max(info.min, np.iinfo(values.dtype).min), info.max)
        elif to == "f32" and "rz" in ins.mods and source_type == "f64":
            raise Unsupported(f"`{ins.text}`")
        target[lanes.at] = values.astype(dtype)

    return step


def _to_bf16(values: np.ndarray, toward_zero: bool) -> np.ndarray:
    if values.dtype == np.float32 or values.dtype == np.float16:
        return f32_to_bf16(values.astype(np.float32), toward_zero)
    return f64_to_bf16(values.astype(np.float64))


def _convert_pair(machine: Machine, ins: Instruction):
    """cvt.rn.{f16x2,bf16x2}.f32 d, a, b: a goes to the upper half."""
    upper, lower = (machine.source(o, "f32", ins) for o in ins.operands[1:3])
    target = machine.target(ins.operands[0], "b32", ins)
    to_bf16, toward_zero = ins.types[0] == "bf16x2", "rz" in ins.mods
    if toward_zero and not to_bf16:
        raise Unsupported(f"`{ins.text}`")

    def narrow(values):
        if "relu" in ins.mods:
            values = np.where(values > 0, values, np.float32(0))
        if to_bf16:
            return f32_to_bf16(values, toward_zero)
        return values.astype(np.float16).view(np.uint16)

    def step(lanes):
        high = narrow(upper[lanes.at]).astype(np.uint32)
        target[lanes.at] = (high << np.uint32(16)) | narrow(lower[lanes.at])

    return step


_BASES = {"shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE, "global": 0, "const": 0}


@instruction("cvta")
def _bind_convert_address(machine: Machine, ins: Instruction):
    base = np.int64(_BASES[ins.state_space()])
    base = -base if "to" in ins.mods else base
    source = machine.source(ins.operands[1], "s64", ins)
    target = machine.target(ins.operands[0], "s64", ins)

    def step(lanes):
        target[lanes.at] = source[lanes.at] + base

    return step


@instruction("isspacep")
def _bind_is_space(machine: Machine, ins: Instruction):
    edges = {
        "shared": (SHARED_BASE, LOCAL_BASE),
        "local": (LOCAL_BASE, PARAM_BASE),
        "param": (PARAM_BASE, GLOBAL_BASE),
        "global": (GLOBAL_BASE, 1 << 62),
        "const": (1 << 62, 1 << 62),
    }
    low, high = edges[ins.state_space()]
    source = machine.source(ins.operands[1], "s64", ins)
    target = machine.target(ins.operands[0], "pred", ins)

    def step(lanes):
        target[lanes.at] = (source[lanes.at] >= low) & (source[lanes.at] < high)

    return step
