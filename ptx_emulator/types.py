"""PTX types as numpy dtypes, and the roundings that numpy does not know."""

import numpy as np

# Registers are bags of bits, so bf16 and the packed types live in unsigned integers.
DTYPES = {
    "pred": np.dtype(np.bool_),
    "b8": np.dtype(np.uint8),
    "u8": np.dtype(np.uint8),
    "s8": np.dtype(np.int8),
    "b16": np.dtype(np.uint16),
    "u16": np.dtype(np.uint16),
    "s16": np.dtype(np.int16),
    "b32": np.dtype(np.uint32),
    "u32": np.dtype(np.uint32),
    "s32": np.dtype(np.int32),
    "b64": np.dtype(np.uint64),
    "u64": np.dtype(np.uint64),
    "s64": np.dtype(np.int64),
    "b128": np.dtype([("lo", np.uint64), ("hi", np.uint64)]),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "tf32": np.dtype(np.float32),
    "e4m3": np.dtype(np.uint8),
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def size_of(ptx_type: str) -> int:
    return DTYPES[ptx_type].itemsize


def is_signed(ptx_type: str) -> bool:
    return ptx_type[0] == "s"


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """float32 -> bf16 bits, to nearest even (or toward zero); NaN becomes the canonical 0x7fff."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if not toward_zero:
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def round_to_odd_f32(values: np.ndarray) -> np.ndarray:
    """float64 -> float32 rounded to odd, so that a second rounding to 8 or 11 bits is correct."""
    nearest = values.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = np.atleast_1d(nearest).view(np.uint32).copy()
    inexact = np.atleast_1d(back != values) & np.isfinite(np.atleast_1d(values))
    overshoot = np.atleast_1d(np.abs(back) > np.abs(values))
    bits[inexact & overshoot] -= np.uint32(1)
    bits[inexact] |= np.uint32(1)
    return bits.view(np.float32).reshape(np.shape(values))


def f64_to_bf16(values: np.ndarray) -> np.ndarray:
    return f32_to_bf16(round_to_odd_f32(values))


def to_float(bits: np.ndarray, ptx_type: str) -> np.ndarray:
    """16-bit float patterns (f16 or bf16, uint16 each) -> float32."""
    return bf16_to_f32(bits) if ptx_type.startswith("bf16") else bits.view(np.float16).astype("f4")


def from_double(values: np.ndarray, ptx_type: str) -> np.ndarray:
    """float64 -> f16 or bf16 bits (uint16), rounded once."""
    if ptx_type.startswith("bf16"):
        return f64_to_bf16(values)
    return values.astype(np.float16).view(np.uint16)
