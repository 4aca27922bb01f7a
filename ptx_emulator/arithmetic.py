"""Integer and floating-point arithmetic, comparison and selection."""

import numpy as np

from .errors import Unsupported
from .machine import Machine, instruction
from .syntax import Instruction, Pair
from .types import DTYPES, SIGNED, UNSIGNED, from_double, to_float

_HALF = ("f16", "bf16", "f16x2", "bf16x2")


def _refuse(ins: Instruction, *mods: str) -> None:
    found = [m for m in mods if m in ins.mods]
    if found:
        raise Unsupported(f".{found[0]} in `{ins.text}`")


def elementwise(machine: Machine, ins: Instruction, function, arity: int):
    """target = function(sources), all of the instruction's type."""
    sources = [machine.source(o, ins.type, ins) for o in ins.operands[1 : 1 + arity]]
    target = machine.target(ins.operands[0], ins.type, ins)
    in_place = isinstance(function, np.ufunc) and getattr(target, "dtype", None) == DTYPES[ins.type]
    if arity == 2 and in_place:
        first, second = sources

        def binary(lanes):
            at = lanes.at
            if type(at) is slice:
                function(first[at], second[at], out=target[at])
            else:
                target[at] = function(first[at], second[at])

        return binary

    def step(lanes):
        at = lanes.at
        target[at] = function(*[s[at] for s in sources])

    return step


def halves(machine: Machine, ins: Instruction, function, arity: int):
    """The same for f16, bf16 and their packed forms: computed in double, rounded once."""
    raw = "b32" if ins.type.endswith("x2") else "b16"
    sources = [machine.source(o, raw, ins) for o in ins.operands[1 : 1 + arity]]
    target = machine.target(ins.operands[0], raw, ins)
    kind, dtype, relu = ins.type, DTYPES[raw], "relu" in ins.mods
    saturate = "sat" in ins.mods

    def step(lanes):
        at = lanes.at
        values = []
        for source in sources:
            bits = np.ascontiguousarray(source[at]).view(np.uint16)
            values.append(to_float(bits, kind).astype(np.float64))
        result = function(*values)
        if relu:
            result = np.maximum(result, 0)
        if saturate:
            result = np.clip(result, 0, 1)
        target[at] = from_double(result, kind).view(dtype)

    return step


def _saturated(function, ins: Instruction):
    if "sat" not in ins.mods:
        return function
    if not ins.type.startswith("f"):
        raise Unsupported(f".sat of integers in `{ins.text}`")
    return lambda *values: np.clip(np.nan_to_num(function(*values)), 0, 1)


def _arithmetic(name: str, arity: int, function, double=None):
    """Register an operation with one numpy meaning for all types."""

    def bind(machine: Machine, ins: Instruction):
        _refuse(ins, "cc")
        if ins.type in _HALF:
            return halves(machine, ins, double or function, arity)
        return elementwise(machine, ins, _saturated(function, ins), arity)

    instruction(name)(bind)


_arithmetic("add", 2, np.add)
_arithmetic("sub", 2, np.subtract)
_arithmetic("neg", 1, np.negative)
_arithmetic("abs", 1, np.abs)
_arithmetic("and", 2, np.bitwise_and)
_arithmetic("or", 2, np.bitwise_or)
_arithmetic("xor", 2, np.bitwise_xor)
_arithmetic("not", 1, np.invert)
_arithmetic("ex2", 1, np.exp2)
_arithmetic("lg2", 1, np.log2)
_arithmetic("rcp", 1, lambda a: a.dtype.type(1) / a)
_arithmetic("sqrt", 1, np.sqrt)
_arithmetic("rsqrt", 1, lambda a: a.dtype.type(1) / np.sqrt(a))
_arithmetic("tanh", 1, np.tanh)
_arithmetic("sin", 1, np.sin)
_arithmetic("cos", 1, np.cos)
_arithmetic("copysign", 2, lambda a, b: np.copysign(b, a))
_arithmetic("cnot", 1, lambda a: (a == 0).astype(a.dtype))


@instruction("min", "max")
def _bind_extremum(machine: Machine, ins: Instruction):
    names = (np.minimum, np.fmin) if ins.op == "min" else (np.maximum, np.fmax)
    # Of a number and a NaN the number wins, unless .NaN is written.
    is_float = ins.type in _HALF or ins.type.startswith("f")
    function = names[1] if is_float and "NaN" not in ins.mods else names[0]
    if ins.type in _HALF:
        return halves(machine, ins, function, 2)
    sources = len(ins.operands) - 1
    if sources == 3:
        return elementwise(machine, ins, lambda a, b, c: function(function(a, b), c), 3)
    return elementwise(machine, ins, function, 2)


def _high_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the double-width product."""
    size, signed = a.dtype.itemsize, a.dtype.kind == "i"
    if size < 8:
        wide = (SIGNED if signed else UNSIGNED)[2 * size]
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = ua & low, ua >> half, ub & low, ub >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> half) + (other >> half)
    if signed:
        zero = np.uint64(0)
        high = high - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)
    return high.view(a.dtype)


@instruction("mul", "mad", "mul24", "mad24")
def _bind_multiply(machine: Machine, ins: Instruction):
    _refuse(ins, "cc")
    if ins.type in _HALF:
        return halves(machine, ins, np.multiply, 2)
    if ins.type.startswith("f"):
        if ins.op == "mad":
            return _bind_fma(machine, ins)
        return elementwise(machine, ins, _saturated(np.multiply, ins), 2)
    _refuse(ins, "sat")
    dtype = DTYPES[ins.type]
    result_type = ins.type
    if "wide" in ins.mods:
        result_type = ins.type[0] + str(16 * dtype.itemsize)
        wide = DTYPES[result_type]

        def product(a, b):
            return a.astype(wide) * b.astype(wide)
    elif "hi" in ins.mods:
        product = _high_half
    else:
        product = np.multiply
    a, b = (machine.source(o, ins.type, ins) for o in ins.operands[1:3])
    target = machine.target(ins.operands[0], result_type, ins)
    if ins.op.startswith("mul"):

        def multiply(lanes):
            target[lanes.at] = product(a[lanes.at], b[lanes.at])

        return multiply
    c = machine.source(ins.operands[3], result_type, ins)

    def multiply_add(lanes):
        at = lanes.at
        target[at] = product(a[at], b[at]) + c[at]

    return multiply_add


@instruction("fma")
def _bind_fma(machine: Machine, ins: Instruction):
    if ins.type in _HALF:
        return halves(machine, ins, lambda a, b, c: a * b + c, 3)
    if ins.type == "f64":

        def fused(a, b, c):
            wide = np.longdouble
            return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(np.float64)
    else:
        # The product of two floats is exact in double; the sum rounds once more than hardware's.
        def fused(a, b, c):
            return (a.astype(np.float64) * b + c).astype(np.float32)

    return elementwise(machine, ins, _saturated(fused, ins), 3)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    # Division by zero has no defined result; hardware gives all ones.
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe if a.dtype.kind == "u" else (a - np.fmod(a, safe)) // safe
    return np.where(b == 0, ~a.dtype.type(0), quotient)


_arithmetic("div", 2, _divide, np.divide)
_arithmetic("rem", 2, lambda a, b: np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


# ---- comparison and selection
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_UNORDERED = {name + "u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(ins: Instruction):
    name = next(
        m for m in ins.mods if m in _COMPARE or m in _UNORDERED or m in ("num", "nan", "equ", "neu")
    )
    is_float = ins.type in _HALF or ins.type.startswith("f")

    def compare(a, b):
        if is_float:
            nan = np.isnan(a) | np.isnan(b)
            if name in ("num", "nan"):
                return nan if name == "nan" else ~nan
            if name in _UNORDERED:
                return _COMPARE[_UNORDERED[name]](a, b) | nan
            return _COMPARE[name](a, b) & ~nan
        return _COMPARE[name](a, b)

    return compare if is_float else _COMPARE[name]


@instruction("setp", "set")
def _bind_compare(machine: Machine, ins: Instruction):
    kind = ins.type if ins.op == "setp" else ins.types[1]
    if kind.endswith("x2"):
        raise Unsupported(f"a packed comparison, `{ins.text}`")
    raw = "b16" if kind in _HALF else kind
    a, b = (machine.source(o, raw, ins) for o in ins.operands[1:3])
    compare = _comparison(ins)
    combine = next((_COMBINE[m] for m in ins.mods if m in _COMBINE), None)
    third = machine.source(ins.operands[3], "pred", ins) if combine else None
    result, inverse = ins.operands[0], None
    if isinstance(result, Pair):
        result, inverse = result.first, result.second
        inverse = machine.target(inverse, "pred", ins)
    if ins.op == "setp":
        target = machine.target(result, "pred", ins)
    else:
        target = machine.target(result, ins.types[0], ins)
    ones = 1.0 if ins.op == "set" and ins.types[0][0] == "f" else -1

    def step(lanes):
        at = lanes.at
        x, y = a[at], b[at]
        if kind in _HALF:
            x, y = to_float(x, kind), to_float(y, kind)
        value = compare(x, y)
        if inverse is not None:
            inverse[at] = combine(~value, third[at]) if combine else ~value
        if combine:
            value = combine(value, third[at])
        if ins.op == "set":
            value = np.where(value, ones, 0).astype(target.dtype)
        target[at] = value

    return step


@instruction("selp")
def _bind_select(machine: Machine, ins: Instruction):
    a, b = (machine.source(o, ins.type, ins) for o in ins.operands[1:3])
    chosen = machine.source(ins.operands[3], "pred", ins)
    target = machine.target(ins.operands[0], ins.type, ins)

    def step(lanes):
        at = lanes.at
        target[at] = np.where(chosen[at], a[at], b[at])

    return step


@instruction("slct")
def _bind_slct(machine: Machine, ins: Instruction):
    kind = ins.types[0]
    a, b = (machine.source(o, kind, ins) for o in ins.operands[1:3])
    sign = machine.source(ins.operands[3], ins.types[1], ins)
    target = machine.target(ins.operands[0], kind, ins)

    def step(lanes):
        at = lanes.at
        target[at] = np.where(sign[at] >= 0, a[at], b[at])

    return step


@instruction("testp")
def _bind_testp(machine: Machine, ins: Instruction):
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda v: ~np.isnan(v),
        "notanumber": np.isnan,
        "normal": lambda v: np.isfinite(v) & (np.abs(v) >= np.finfo(v.dtype).tiny),
        "subnormal": lambda v: (v != 0) & (np.abs(v) < np.finfo(v.dtype).tiny),
    }
    test = next(tests[m] for m in ins.mods if m in tests)
    a = machine.source(ins.operands[1], ins.type, ins)
    target = machine.target(ins.operands[0], "pred", ins)

    def step(lanes):
        target[lanes.at] = test(a[lanes.at])

    return step


@instruction("sad")
def _bind_sad(machine: Machine, ins: Instruction):
    return elementwise(
        machine, ins, lambda a, b, c: c + np.where(a < b, b - a, a - b).astype(c.dtype), 3
    )
