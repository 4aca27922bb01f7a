"""Single PTX instructions in the emulator against Python's integers, fractions and math."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest

from ptx_emulator.types import DTYPES, bf16_to_f32, f64_to_bf16
from python_tests.support.ptx_ops import run

RANDOM = np.random.default_rng(7)
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")


def width(t: str) -> int:
    return 8 * DTYPES[t].itemsize


def wrap(value: int, t: str) -> int:
    """A Python integer as the type sees it."""
    value &= (1 << width(t)) - 1
    if t[0] == "s" and value >> (width(t) - 1):
        value -= 1 << width(t)
    return value


def integers(t: str, n: int = 64) -> np.ndarray:
    """Edges and random values of all magnitudes."""
    w = width(t)
    edges = [0, 1, 2, -1, -2, 1 << (w - 1), (1 << (w - 1)) - 1, (1 << (w // 2)) - 1, 255]
    shifts = RANDOM.integers(0, w, n)
    values = [int(RANDOM.integers(0, 1 << 63)) * 2 + int(RANDOM.integers(2)) for _ in range(n)]
    values = edges + [(v & ((1 << w) - 1)) >> int(s) for v, s in zip(values, shifts)]
    values = [wrap(v, t) for v in values[:n]]
    RANDOM.shuffle(values)
    return np.array(values, DTYPES[t])


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b, t: a + b,
    "sub": lambda a, b, t: a - b,
    "mul.lo": lambda a, b, t: a * b,
    "mul.hi": lambda a, b, t: (a * b) >> width(t),
    "min": lambda a, b, t: min(a, b),
    "max": lambda a, b, t: max(a, b),
    "div": lambda a, b, t: truncated(a, b) if b else -1,
    "rem": lambda a, b, t: a - b * truncated(a, b) if b else 0,
}


@pytest.mark.parametrize("t", INTEGERS)
@pytest.mark.parametrize("op", BINARY)
def test_integer_arithmetic(op, t):
    a, b = integers(t), integers(t)
    if op in ("div", "rem"):
        b[b == 0] = 3
    expected = [wrap(BINARY[op](int(x), int(y), t), t) for x, y in zip(a, b)]
    assert run(f"{op}.{t}", t, [t, t], [a, b]).tolist() == expected


@pytest.mark.parametrize("t", ["u16", "s16", "u32", "s32"])
def test_wide_products(t):
    wide = t[0] + str(2 * width(t))
    a, b = integers(t), integers(t)
    c = integers(wide)
    products = [int(x) * int(y) for x, y in zip(a, b)]
    assert run(f"mul.wide.{t}", wide, [t, t], [a, b]).tolist() == products
    sums = [wrap(p + int(z), wide) for p, z in zip(products, c)]
    assert run(f"mad.wide.{t}", wide, [t, t, wide], [a, b, c]).tolist() == sums


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_multiply_add_and_unary(t):
    a, b, c = integers(t), integers(t), integers(t)
    expected = [wrap(int(x) * int(y) + int(z), t) for x, y, z in zip(a, b, c)]
    assert run(f"mad.lo.{t}", t, [t, t, t], [a, b, c]).tolist() == expected
    if t[0] == "s":
        assert run(f"neg.{t}", t, [t], [a]).tolist() == [wrap(-int(x), t) for x in a]
        assert run(f"abs.{t}", t, [t], [a]).tolist() == [wrap(abs(int(x)), t) for x in a]


@pytest.mark.parametrize("t", ["b16", "b32", "b64"])
def test_logic_and_shifts(t):
    a, b = integers(t.replace("b", "u")), integers(t.replace("b", "u"))
    n = RANDOM.integers(0, 80, len(a)).astype(np.uint32)
    pairs = [(int(x), int(y)) for x, y in zip(a, b)]
    assert run(f"and.{t}", t, [t, t], [a, b]).tolist() == [x & y for x, y in pairs]
    assert run(f"or.{t}", t, [t, t], [a, b]).tolist() == [x | y for x, y in pairs]
    assert run(f"xor.{t}", t, [t, t], [a, b]).tolist() == [x ^ y for x, y in pairs]
    assert run(f"not.{t}", t, [t], [a]).tolist() == [wrap(~int(x), t) for x in a]
    shifted = [wrap(int(x) << int(k), t) for x, k in zip(a, n)]
    assert run(f"shl.{t}", t, [t, "u32"], [a, n]).tolist() == shifted
    for sign in "us":
        u = t.replace("b", sign)
        values = a.view(DTYPES[u])
        shifted = [int(x) >> int(k) for x, k in zip(values, n)]
        assert run(f"shr.{u}", u, [u, "u32"], [values, n]).tolist() == shifted


@pytest.mark.parametrize("t", ["u32", "u64"])
def test_counting_bits(t):
    a, w = integers(t), width(t)
    b = t.replace("u", "b")
    assert run(f"popc.{b}", "u32", [t], [a]).tolist() == [int(x).bit_count() for x in a]
    assert run(f"clz.{b}", "u32", [t], [a]).tolist() == [w - int(x).bit_length() for x in a]
    found = [wrap(int(x).bit_length() - 1, "u32") for x in a]
    assert run(f"bfind.{t}", "u32", [t], [a]).tolist() == found
    flipped = [int(f"{int(x):0{w}b}"[::-1], 2) for x in a]
    assert run(f"brev.{b}", t, [t], [a]).tolist() == flipped


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_bit_fields(t):
    a, base = integers(t), integers(t)
    w = width(t)
    position = RANDOM.integers(0, w, len(a)).astype(np.uint32)
    length = RANDOM.integers(0, w + 1, len(a)).astype(np.uint32)
    extracted, inserted = [], []
    for x, y, p, n in zip(a.tolist(), base.tolist(), position.tolist(), length.tolist()):
        mask = (1 << n) - 1
        if t[0] == "u":
            extracted.append((x >> p) & mask)
        else:  # the field's top bit fills up; beyond the value there are copies of its sign
            field = (x >> p) & mask
            sign = n and field >> (n - 1) & 1
            extracted.append(wrap(field - (sign << n), t))
        inserted.append(wrap((y & ~(mask << p)) | ((x & mask) << p), t))
    assert run(f"bfe.{t}", t, [t, "u32", "u32"], [a, position, length]).tolist() == extracted
    if t[0] == "u":
        types = [t, t, "u32", "u32"]
        b = t.replace("u", "b")
        result = run(f"bfi.{b}", t, types, [a, base, position, length])
        assert result.tolist() == inserted


def test_funnel_shift_and_permuted_bytes():
    low, high, n = integers("u32"), integers("u32"), integers("u32")
    both = [(int(h) << 32) | int(x) for x, h in zip(low, high)]
    types = ["u32"] * 3
    for mode, amount in (("wrap", lambda k: k & 31), ("clamp", lambda k: min(k, 32))):
        left = [((v << amount(int(k))) >> 32) & 0xFFFFFFFF for v, k in zip(both, n)]
        right = [(v >> amount(int(k))) & 0xFFFFFFFF for v, k in zip(both, n)]
        assert run(f"shf.l.{mode}.b32", "b32", types, [low, high, n]).tolist() == left
        assert run(f"shf.r.{mode}.b32", "b32", types, [low, high, n]).tolist() == right
    chosen = []
    for v, k in zip(both, n.tolist()):
        octets = v.to_bytes(8, "little")
        picked = []
        for i in range(4):
            nibble = k >> (4 * i) & 15
            octet = octets[nibble & 7]
            picked.append(octet if nibble < 8 else 255 * (octet >> 7))
        chosen.append(int.from_bytes(bytes(picked), "little"))
    assert run("prmt.b32", "b32", types, [low, high, n]).tolist() == chosen


@pytest.mark.parametrize("table", [0xE8, 0x96, 0x1B])
def test_lop3(table):
    a, b, c = (integers("u32") for _ in range(3))
    expected = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist()):
        bits = [
            table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1 for i in range(32)
        ]
        expected.append(sum(v << i for i, v in enumerate(bits)))
    tables = np.full(len(a), table, np.uint32)
    assert run("lop3.b32", "b32", ["u32"] * 4, [a, b, c, tables]).tolist() == expected


# ---- floats
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, 3.4e38, 1.5, 2.5, -3.5]


def floats(n: int = 64, dtype=np.float32) -> np.ndarray:
    values = RANDOM.standard_normal(n) * np.exp2(RANDOM.integers(-20, 20, n))
    values[: len(SPECIAL)] = RANDOM.permutation(SPECIAL)
    return values.astype(dtype)


def same(a, b) -> None:
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def f32(value: float) -> float:
    """A Python float rounded to binary32 by the struct module."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


@pytest.mark.parametrize("op", ["add.f32", "sub.f32", "mul.f32", "div.rn.f32"])
def test_float_arithmetic(op):
    a, b = floats(), floats()
    function = {
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul": lambda x, y: x * y,
        "div": lambda x, y: x / y if y else math.nan if x == 0 or x != x else None,
    }[op[:3]]
    result = run(op, "f32", ["f32", "f32"], [a, b])
    for x, y, r in zip(a.tolist(), b.tolist(), result.tolist()):
        expected = function(x, y)
        if expected is None:
            expected = math.copysign(math.inf, x) * math.copysign(1, y)
        same(r, f32(expected))


def test_fused_multiply_add_rounds_once():
    values = RANDOM.standard_normal((3, 200)).astype(np.float32)
    values[2] = -values[0] * values[1]  # what is left is the product's rounding error
    a, b, c = values
    result = run("fma.rn.f32", "f32", ["f32"] * 3, [a, b, c])
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(*values.tolist())]
    same(result, [f32(float(v)) for v in exact])
    assert (result != 0).any()


def test_extrema_prefer_numbers():
    a, b = floats(), floats()
    for name, pick in (("min", min), ("max", max)):
        for r, x, y in zip(run(f"{name}.f32", "f32", ["f32"] * 2, [a, b]), a, b):
            numbers = [v for v in (x, y) if v == v]
            same(r, pick(numbers) if numbers else math.nan)
        propagated = run(f"{name}.NaN.f32", "f32", ["f32"] * 2, [a, b])
        same(np.isnan(propagated), np.isnan(a) | np.isnan(b))


def test_functions():
    x = np.abs(floats(64))
    x = x[np.isfinite(x) & (x > 1e-30) & (x < 1e30)]
    small = (x % 8).astype(np.float32)
    for op, function, source in (
        ("ex2.approx.f32", lambda v: 2.0**v, small),
        ("lg2.approx.f32", math.log2, x),
        ("rcp.approx.f32", lambda v: 1 / v, x),
        ("sqrt.rn.f32", math.sqrt, x),
        ("rsqrt.approx.f32", lambda v: 1 / math.sqrt(v), x),
        ("tanh.approx.f32", math.tanh, small),
        ("sin.approx.f32", math.sin, small),
        ("cos.approx.f32", math.cos, small),
    ):
        expected = [function(v) for v in source.tolist()]
        np.testing.assert_allclose(run(op, "f32", ["f32"], [source]), expected, 3e-7, 3e-7)


COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a == a and b == b and a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("name", COMPARE)
def test_comparisons(name):
    a, b = floats(), floats()
    a[::5] = b[::5]
    pairs = list(zip(a.tolist(), b.tolist()))
    ordered = [int(COMPARE[name](x, y)) for x, y in pairs]
    assert run(f"setp.{name}.f32", "pred", ["f32"] * 2, [a, b], True).tolist() == ordered
    either = [int(COMPARE[name](x, y) or x != x or y != y) for x, y in pairs]
    assert run(f"setp.{name}u.f32", "pred", ["f32"] * 2, [a, b], True).tolist() == either
    for t in ("u32", "s32", "s64"):
        c, d = integers(t), integers(t)
        c[::3] = d[::3]
        expected = [int(COMPARE[name](int(x), int(y))) for x, y in zip(c, d)]
        assert run(f"setp.{name}.{t}", "pred", [t, t], [c, d], True).tolist() == expected


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("packed", [False, True])
def test_half_arithmetic_rounds_once(kind, packed):
    shape = (3, 128)
    values = RANDOM.standard_normal(shape) * np.exp2(RANDOM.integers(-6, 6, shape))
    if kind == "f16":
        bits = values.astype(np.float16).view(np.uint16)
        exact = bits.view(np.float16).astype(np.float64)
    else:
        bits = f64_to_bf16(values)
        exact = bf16_to_f32(bits).astype(np.float64)

    def rounded(fraction: Fraction) -> float:
        """To nearest even, by integers."""
        digits, lowest = (11, -24) if kind == "f16" else (8, -133)
        if fraction == 0:
            return 0.0
        magnitude = abs(fraction)
        exponent = math.floor(math.log2(float(magnitude))) - digits + 1
        unit = Fraction(2) ** max(exponent, lowest)
        count = round(magnitude / unit)  # Python rounds halves to even
        if count >= 1 << digits:  # the logarithm was rounded up or the mantissa overflowed
            unit *= 2
            count = round(magnitude / unit)
        return float(count * unit) * (1 if fraction > 0 else -1)

    t = kind + "x2" if packed else kind
    arrays = [b.view(DTYPES[t]) for b in bits]
    for op, function in (
        ("add", lambda x, y, z: x + y),
        ("mul", lambda x, y, z: x * y),
        ("fma.rn", lambda x, y, z: x * y + z),
    ):
        count = 3 if op == "fma.rn" else 2
        result = run(f"{op}.{t}", t, [t] * count, arrays[:count])
        result = np.ascontiguousarray(result).view(np.uint16)
        got = result.view(np.float16).astype(float) if kind == "f16" else bf16_to_f32(result)
        fractions = [[Fraction(v) for v in row] for row in exact.tolist()]
        expected = [rounded(function(*v)) for v in zip(*fractions)]
        same(got, expected)


# ---- conversions
def test_float_to_integer_saturates_and_rounds():
    x = floats()
    rounding = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for mode, function in rounding.items():
        for t in ("s32", "u32", "s64", "u64"):
            low, high = np.iinfo(DTYPES[t]).min, np.iinfo(DTYPES[t]).max
            expected = []
            for v in x.tolist():
                if v != v:
                    expected.append(0)
                elif math.isinf(v):
                    expected.append(high if v > 0 else low)
                else:
                    expected.append(min(max(function(v), low), high))
            assert run(f"cvt.{mode}.{t}.f32", t, ["f32"], [x]).tolist() == expected


def test_integer_conversions_wrap_and_extend():
    for source in INTEGERS:
        for target in INTEGERS:
            a = integers(source)
            expected = [wrap(int(v), target) for v in a]
            assert run(f"cvt.{target}.{source}", target, [source], [a]).tolist() == expected
    for t in ("s32", "u32", "s64"):
        a = integers(t)
        same(run(f"cvt.rn.f32.{t}", "f32", [t], [a]), a.astype(np.float32))


def test_float_conversions():
    x = floats(256)
    same(run("cvt.f64.f32", "f64", ["f32"], [x]), x.astype(np.float64))
    with np.errstate(over="ignore"):
        same(run("cvt.rn.f16.f32", "f16", ["f32"], [x]), x.astype(np.float16))
    bits = run("cvt.rn.bf16.f32", "bf16", ["f32"], [x])
    back = run("cvt.f32.bf16", "f32", ["bf16"], [bits])
    for v, r in zip(x.tolist(), back.tolist()):
        if not math.isfinite(v):
            same(r, v)
            continue
        # the nearest multiple of 2^16 in units of the last place; ties to even
        pattern = struct.unpack("<I", struct.pack("<f", v))[0]
        nearest = round(Fraction(pattern, 1 << 16)) << 16
        same(r, struct.unpack("<f", struct.pack("<I", nearest))[0])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_conversion_puts_the_first_value_on_top(kind):
    a, b = floats(), floats()
    both = run(f"cvt.rn.{kind}x2.f32", f"{kind}x2", ["f32", "f32"], [a, b])
    upper = run(f"cvt.rn.{kind}.f32", kind, ["f32"], [a]).view(np.uint16)
    lower = run(f"cvt.rn.{kind}.f32", kind, ["f32"], [b]).view(np.uint16)
    same(both, (upper.astype(np.uint32) << 16) | lower)
