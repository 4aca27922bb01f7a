"""Tensor cores of sm_80 and the matrix moves of a warp: mma.sync, ldmatrix, stmatrix."""

import re

import numpy as np

from .errors import Unsupported
from .machine import Machine, instruction
from .syntax import Instruction, Vector
from .types import bf16_to_f32
from .warp import full_warps

_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def _e4m3_values() -> np.ndarray:
    """What each of the 256 codes means: no infinity, NaN where all bits but the sign are set."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(8.0 + mantissa, exponent - 10)
    values = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    values = np.where(code & 127 == 127, np.nan, values)
    return np.where(code & 128, -values, values).astype(np.float32)


_E4M3 = _e4m3_values()


def unpack_floats(words: np.ndarray, ptx_type: str) -> np.ndarray:
    """uint32 registers -> float32 with one more axis: the 4 (e4m3), 2 (bf16, f16) or 1 (tf32)
    values."""
    if ptx_type == "e4m3":
        return _E4M3[np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)]
    if ptx_type == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    if ptx_type == "bf16":
        return bf16_to_f32(halves)
    return halves.view(np.float16).astype(np.float32)


def fragment(words: list[np.ndarray], ptx_type: str, rows_first: bool) -> np.ndarray:
    """Registers of [warps, 32] -> matrices [warps, rows, k], k contiguous within a register.

    rows_first: successive registers go 8 rows down before they go along k (operand A has 16 rows).
    """
    per = 1 if ptx_type == "tf32" else 2
    step = 4 * per  # values of k that one register of all lanes covers
    row_blocks = 2 if rows_first else 1
    k = len(words) // row_blocks * step
    result = np.empty((len(words[0]), 8 * row_blocks, k), np.float32)
    for i, word in enumerate(words):
        block, along = i % row_blocks, i // row_blocks
        values = unpack_floats(word, ptx_type)
        for j in range(per):
            result[:, _GROUP + 8 * block, along * step + per * _IN_GROUP + j] = values[..., j]
    return result


@instruction("mma", blocking=True)
def _bind_mma(machine: Machine, ins: Instruction):
    shape = next((m for m in ins.mods if re.fullmatch(r"m\d+n\d+k\d+", m)), "")
    d_type, a_type, b_type, c_type = ins.types[:4] if len(ins.types) >= 4 else ("",) * 4
    registers = {"m16n8k16": (4, 2), "m16n8k8": (2, 1)}
    if a_type == "tf32":
        registers = {"m16n8k8": (4, 2), "m16n8k4": (2, 1)}
    known = a_type == b_type in ("bf16", "f16", "tf32") and d_type == c_type == "f32"
    if not known or shape not in registers or "row" not in ins.mods:
        raise Unsupported(f"`{ins.text}`")
    d, a, b, c = (o.items for o in ins.operands)
    if (len(a), len(b)) != registers[shape]:
        raise Unsupported(f"`{ins.text}`")
    a = [machine.source(o, "b32", ins) for o in a]
    b = [machine.source(o, "b32", ins) for o in b]
    c = [machine.source(o, "f32", ins) for o in c]
    d = [machine.target(o, "f32", ins) for o in d]

    def step(lanes):
        lanes = full_warps(machine, lanes, ins)
        if lanes is None:
            return None
        left = fragment([s[lanes.at].reshape(-1, 32) for s in a], a_type, True)
        right = fragment([s[lanes.at].reshape(-1, 32) for s in b], a_type, False)
        product = left @ right.transpose(0, 2, 1)  # [warps, 16, 8]
        sums = []
        for i, source in enumerate(c):
            part = product[:, _GROUP + 8 * (i // 2), 2 * _IN_GROUP + i % 2]
            sums.append(part.reshape(-1) + source[lanes.at])
        for target, value in zip(d, sums):
            target[lanes.at] = value
        return lanes

    return step


def _matrices(ins: Instruction) -> int:
    if "m8n8" not in ins.mods or ins.type != "b16":
        raise Unsupported(f"`{ins.text}`")
    return int(next(m for m in ins.mods if m in ("x1", "x2", "x4"))[1])


def _row_lanes(lanes, count: int):
    """The lanes that hold row addresses: 8 for every matrix."""
    return lanes.where(np.tile(_LANE < 8 * count, lanes.n // 32))


def _row_address(machine: Machine, operand, ins: Instruction):
    address = machine.address(operand, ins)
    if ins.state_space() == "shared":
        return address
    return lambda lanes: machine.memory.split_generic(address(lanes), lanes)[0][1]


@instruction("ldmatrix", blocking=True)
def _bind_load_matrix(machine: Machine, ins: Instruction):
    count, transposed = _matrices(ins), "trans" in ins.mods
    result = ins.operands[0]
    items = result.items if isinstance(result, Vector) else (result,)
    targets = [machine.target(o, "b32", ins) for o in items]
    address = _row_address(machine, ins.operands[1], ins)

    def step(lanes):
        lanes = full_warps(machine, lanes, ins)
        if lanes is None:
            return None
        holders = _row_lanes(lanes, count)
        _, offsets = machine.memory.locate("shared", address(holders), 16, holders, ins)
        rows = machine.memory.shared.reshape(-1, 16)[offsets // 16]
        values = rows.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            values = np.ascontiguousarray(values.transpose(0, 1, 3, 2))
        words = values.view(np.uint32).reshape(-1, count, 32)
        for i, target in enumerate(targets):
            target[lanes.at] = words[:, i].reshape(-1)
        return lanes

    return step


@instruction("stmatrix", blocking=True)
def _bind_store_matrix(machine: Machine, ins: Instruction):
    count, transposed = _matrices(ins), "trans" in ins.mods
    value = ins.operands[1]
    items = value.items if isinstance(value, Vector) else (value,)
    sources = [machine.source(o, "b32", ins) for o in items]
    address = _row_address(machine, ins.operands[0], ins)

    def step(lanes):
        lanes = full_warps(machine, lanes, ins)
        if lanes is None:
            return None
        words = np.stack([s[lanes.at].reshape(-1, 32) for s in sources], 1)
        values = words.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            values = np.ascontiguousarray(values.transpose(0, 1, 3, 2))
        holders = _row_lanes(lanes, count)
        _, offsets = machine.memory.locate("shared", address(holders), 16, holders, ins, True)
        machine.memory.shared.reshape(-1, 16)[offsets // 16] = values.reshape(-1, 8).view(np.uint8)
        return lanes

    return step
