"""TMA tensor maps: what cuTensorMapEncodeTiled would hold, and the boxes they cut out."""

import copy
import math

import numpy as np

from .errors import DescriptorError
from .machine import GLOBAL_BASE


def swizzle(offsets: np.ndarray, span: int) -> np.ndarray:
    """Byte addresses with 16-byte chunks permuted over `span` (0, 32, 64 or 128) bytes."""
    if span == 0:
        return offsets
    return offsets ^ (((offsets >> 7) & (span // 16 - 1)) << 4)


class TensorMap:
    """A tiled view of an array. Its dimensions are the array's, or `shape` over its first bytes.

    box: extents of a tile, outermost first as in numpy (the hardware counts from the innermost).
    swizzle_span: 0, 32, 64 or 128 bytes. Elements outside load as zeros and are not stored.
    """

    def __init__(self, array, box, swizzle_span=128, shape=None, strides=None):
        if not array.flags.c_contiguous:
            raise DescriptorError("the array of a tensor map is not contiguous")
        self.array, self.item = array, array.itemsize
        self.shape = tuple(shape or array.shape)
        self.box, self.swizzle_span = tuple(box), swizzle_span
        if strides is None:  # bytes, outermost first
            strides = [self.item * math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        self.strides = tuple(strides)
        self.address = None
        self._check()

    def _check(self) -> None:
        inner = self.box[-1] * self.item
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + self.item
        problems = {
            f"box {self.box} has another rank than {self.shape}": len(self.box) != len(self.shape),
            f"a box extent of {self.box} is not in 1..256": not all(0 < b <= 256 for b in self.box),
            f"the inner box has {inner} bytes, no multiple of 16": inner % 16 != 0,
            f"the inner box has {inner} bytes, more than the swizzle span {self.swizzle_span}": (
                self.swizzle_span != 0 and inner > self.swizzle_span
            ),
            f"swizzle span {self.swizzle_span} is none of 0, 32, 64, 128": (
                self.swizzle_span not in (0, 32, 64, 128)
            ),
            f"the strides {self.strides[:-1]} are no multiples of 16 bytes": (
                any(s % 16 for s in self.strides[:-1])
            ),
            "shape and strides reach beyond the array": (
                min(self.shape) > 0 and last > self.array.nbytes
            ),
        }
        for text, is_bad in problems.items():
            if is_bad:
                raise DescriptorError(f"tensor map: {text}")

    def at(self, address: int) -> "TensorMap":
        """The same map over the array's place in global memory."""
        if address % 16:
            raise DescriptorError("tensor map: the array is not aligned to 16 bytes")
        bound = copy.copy(self)
        bound.address = address - GLOBAL_BASE
        return bound

    @property
    def tile_bytes(self) -> int:
        return math.prod(self.box) * self.item

    def cut(self, coordinates: list[int]) -> tuple[int, np.ndarray, np.ndarray]:
        """A tile at `coordinates` (innermost first) in chunks: (bytes a chunk, offsets, inside).

        The offsets are into global memory and in the tile's own order.
        """
        start = coordinates[0] * self.item
        chunk = math.gcd(16, start, self.shape[-1] * self.item, self.box[-1] * self.item)
        rank, offsets, inside = len(self.box), np.int64(self.address), np.True_
        for axis in range(rank):
            extent, size, step = self.box[axis], self.shape[axis], self.strides[axis]
            first = coordinates[rank - 1 - axis]
            if axis == rank - 1:
                per = chunk // self.item if chunk >= self.item else 1
                index = np.arange(0, extent, per) + first
            else:
                index = np.arange(extent) + first
            index = index.reshape([-1 if a == axis else 1 for a in range(rank)])
            offsets = offsets + index * step
            inside = inside & (index >= 0) & (index < size)
        offsets, inside = np.broadcast_arrays(offsets, inside)
        return max(chunk, self.item), offsets.reshape(-1), inside.reshape(-1)
