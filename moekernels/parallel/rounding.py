"""Stochastic rounding of moments to bf16.

A moment moves by (1 - beta) of a difference, which from beta 0.99 on is less than half a step of
bf16: rounded to nearest it stands still. Rounded up or down by chance, each as likely as it is
near, it is right on average. Chance is a hash of seed, step, name and place in the full tensor: a
resumed run and any layout draw the same.

Legend: R rows and C columns of a parameter's local part, seen as a matrix by its last dimension.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moekernels.parallel.shard import ShardInfo

WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class _Part:
    """A parameter in a flat buffer."""

    name: str
    begin: int
    info: ShardInfo

    @property
    def width(self) -> int:
        """C."""
        return self.info.local_shape[-1]

    @property
    def height(self) -> int:
        """R."""
        return math.prod(self.info.local_shape[:-1])

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where its rows [R] and columns [C] lie in the full tensor, int64."""
        index = []
        for d in range(len(self.info.full_shape)):
            spans = sorted({(p.local[d], p.full[d], p.size[d]) for p in self.info.pieces})
            ranges = [torch.arange(full, full + n, device=device) for _, full, n in spans]
            index.append(torch.cat(ranges))
        *leading, columns = index
        rows = torch.zeros(1, dtype=torch.int64, device=device)
        for length, inner in zip(self.info.full_shape, leading):
            rows = (rows[:, None] * length + inner).flatten()
        return rows, columns


class Noise:
    """32 random bits for every element of a flat buffer of parameters, a chunk at a time."""

    def __init__(
        self,
        seed: int,
        parameters: Iterable[tuple[str, int, ShardInfo]],
        size: int,
        align: int,
        device: torch.device,
    ) -> None:
        """parameters: each one's name, place in the buffer and shard, in the buffer's order; size:
        elements of a chunk, more where rows that fill whole lines have more. A line is `align`
        elements: parameters begin with one, chunks begin and end with one."""
        self.seed, self.device, self.align = seed, device, align
        self._plan: list[tuple[int, list[tuple[_Part, int, int]]]] = []  # begin, rows of parameters
        for parameter in parameters:
            part, done = _Part(*parameter), 0
            width, height = part.width, part.height
            unit = align // math.gcd(width, align)  # rows that fill whole lines
            while width and done < height:
                first = part.begin + done * width
                room = size - (first - self._plan[-1][0]) if self._plan else 0
                if room < width * min(unit, height - done):
                    self._plan.append((first, []))
                    room = size
                end = min(height, done + max(1, room // (width * unit)) * unit)
                self._plan[-1][1].append((part, done, end))
                done = end
        self._longest = max((self._end(pieces) - begin for begin, pieces in self._plan), default=0)

    def chunks(self, step: int, own: slice) -> Iterator[tuple[int, int, Tensor]]:
        """(begin, end, bits [end - begin] int32) of what lies in `own`, whole lines, in order; the
        bits hold until the next one. What lies between two parameters is in no chunk, or gets bits
        without a meaning."""
        buffer = torch.zeros(self._longest, dtype=torch.int32, device=self.device)
        hashed = None
        for low, high, begin, pieces in self._within(own):
            for part, first, last in pieces:
                if part is not hashed:
                    hashed, rows, columns = part, *self._hashes(step, part)
                at, size = part.begin + first * part.width - begin, (last - first) * part.width
                place = buffer[at : at + size].view(last - first, part.width)
                torch.bitwise_xor(rows[first:last, None], columns, out=place)
            yield low, high, buffer[low - begin : high - begin]

    def spans(self, own: slice) -> list[tuple[int, int]]:
        """(begin, end) of the same."""
        return [(low, high) for low, high, *_ in self._within(own)]

    def _within(self, own: slice) -> Iterator[tuple[int, int, int, list[tuple[_Part, int, int]]]]:
        """Of every chunk that has some of `own`: from where to where, where the chunk begins, and
        its rows of parameters."""
        for begin, pieces in self._plan:
            low, high = max(begin, own.start), min(self._end(pieces), own.stop)
            if low < high:
                yield low, high, begin, pieces

    def _end(self, pieces: list[tuple[_Part, int, int]]) -> int:
        part, _, last = pieces[-1]
        return -(-(part.begin + last * part.width) // self.align) * self.align

    def _hashes(self, step: int, part: _Part) -> tuple[Tensor, Tensor]:
        """[R] and [C] int32, evenly spread; their xor is independent between any two elements."""
        digest = hashlib.sha256(f"{self.seed}/{step}/{part.name}".encode()).digest()
        rows, columns = part.places(self.device)
        keys = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
        return (
            _hash(rows, *keys[:2]).to(torch.int32),
            _hash(columns, *keys[2:]).to(torch.int32),
        )


def _hash(index: Tensor, low: int, high: int) -> Tensor:
    """index [n] int64 from 0 -> [n] int64 in [0, 2^32)."""
    return _mixed(_mixed(index & WORD ^ low) ^ (index >> 32) ^ high)


def _mixed(x: Tensor) -> Tensor:
    """x [n] int64 in [0, 2^32), every bit of the result hanging on every bit of it."""
    for _ in range(2):
        x = (x ^ x >> 16) * 0x45D9F3B & WORD
    return x ^ x >> 16


def round_(wide: Tensor, noise: Tensor, out: Tensor) -> None:
    """wide [n] fp32, spoilt -> out [n] bf16; noise [n] int32 in [0, 2^16) is added to the bits that
    bf16 has not. What bf16 holds exactly stays as it is."""
    bits = wide.view(torch.int32).add_(noise)
    out.view(torch.int16).copy_(bits.bitwise_right_shift_(16))
