"""How a rank's parameter lies in the full one: to initialise, to save, for norms, to compare."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A box that the local and the full tensor share."""

    local: tuple[int, ...]  # where it begins in the local tensor
    full: tuple[int, ...]  # where it begins in the full tensor
    size: tuple[int, ...]

    def of_local(self, x: Tensor) -> Tensor:
        return x[tuple(slice(b, b + n) for b, n in zip(self.local, self.size))]

    def of_full(self, x: Tensor) -> Tensor:
        return x[tuple(slice(b, b + n) for b, n in zip(self.full, self.size))]


@dataclass(frozen=True)
class ShardInfo:
    """The pieces of a full tensor that a rank holds, and the groups of the mesh (by name) that
    share them.

    `reduce_over`: the ranks whose gradients are to be summed; `copies`: the ranks that hold the
    same pieces. `apart`: dimension 0 counts experts, which may lie on any rank in any order; the
    optimiser sums squares an expert at a time. `stacked`: the rows of each matrix, where several
    lie one below the other in the last two dimensions.
    """

    full_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    reduce_over: str = "dp"
    copies: str = "dp"
    apart: bool = False
    stacked: tuple[int, ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(
            max(p.local[d] + p.size[d] for p in self.pieces) for d in range(len(self.full_shape))
        )

    def held(self) -> list[int]:
        """Which indices of the full tensor's dimension 0 lie here, in the order they lie in."""
        spans = sorted({(p.local[0], p.full[0], p.size[0]) for p in self.pieces})
        return [full + i for _, full, size in spans for i in range(size)]

    def holding(self, indices: Sequence[int]) -> ShardInfo:
        """The same shard of other indices of dimension 0, which lie in the order given."""
        runs: list[tuple[int, int, int]] = []  # (local, full, size)
        for local, full in enumerate(indices):
            if runs and runs[-1][1] + runs[-1][2] == full:
                runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
            else:
                runs.append((local, full, 1))
        rest = sorted({(p.local[1:], p.full[1:], p.size[1:]) for p in self.pieces})
        pieces = [
            Piece(*((one, *others) for one, others in zip(run, other)))
            for run, other in product(runs, rest)
        ]
        return replace(self, pieces=tuple(pieces))

    def within(self, at: Sequence[int], size: Sequence[int], copies: str) -> ShardInfo:
        """The shard of a box of the local tensor, which begins `at` and is of that `size`."""
        pieces = []
        for p in self.pieces:
            low = [max(a, b) for a, b in zip(at, p.local)]
            high = [min(a + n, b + m) for a, n, b, m in zip(at, size, p.local, p.size)]
            if all(a < b for a, b in zip(low, high)):
                local = tuple(a - b for a, b in zip(low, at))
                full = tuple(f + a - b for f, a, b in zip(p.full, low, p.local))
                pieces.append(Piece(local, full, tuple(b - a for a, b in zip(low, high))))
        return replace(self, pieces=tuple(pieces), copies=copies)

    def take(self, full: Tensor) -> Tensor:
        """The local tensor out of the full one."""
        local = full.new_empty(self.local_shape)
        for piece in self.pieces:
            piece.of_local(local).copy_(piece.of_full(full))
        return local

    def put(self, local: Tensor, full: Tensor) -> None:
        """Write the local tensor to its place in the full one."""
        for piece in self.pieces:
            piece.of_full(full).copy_(piece.of_local(local))


def shard(
    full_shape: Sequence[int],
    ranges: dict[int, Sequence[tuple[int, int]]] | None = None,
    *,
    reduce_over: str = "dp",
    copies: str = "dp",
    apart: bool = False,
    stacked: Sequence[int] = (),
) -> ShardInfo:
    """Describe a shard by the ranges (begin, end) of each split dimension that it holds, one after
    the other."""
    per_dim = []
    for d, length in enumerate(full_shape):
        local, spans = 0, []
        for begin, end in (ranges or {}).get(d, [(0, length)]):
            spans.append((local, begin, end - begin))
            local += end - begin
        per_dim.append(spans)
    pieces = tuple(Piece(*map(tuple, zip(*spans))) for spans in product(*per_dim))
    return ShardInfo(tuple(full_shape), pieces, reduce_over, copies, apart, tuple(stacked))


def boxes(
    shape: tuple[int, ...], begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements begin ... end-1 of a tensor, in memory's order, as (origin, size) of boxes, each of
    which lies in one piece: part of a row, whole rows, part of a row."""
    if begin >= end:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    inner, rest = math.prod(shape[1:]), (0,) * (len(shape) - 1)
    first, last = -(-begin // inner), end // inner  # whole rows
    if first > last:
        first = last  # it lies within one row
        head = [(last, begin - last * inner, end - last * inner)]
        tail = []
    else:
        head = [(first - 1, begin - (first - 1) * inner, inner)] if begin < first * inner else []
        tail = [(last, 0, end - last * inner)] if last * inner < end else []
    for row, low, high in head:
        for at, size in boxes(shape[1:], low, high):
            yield (row, *at), (1, *size)
    if first < last:
        yield (first, *rest), (last - first, *shape[1:])
    for row, low, high in tail:
        for at, size in boxes(shape[1:], low, high):
            yield (row, *at), (1, *size)


def even_range(length: int, index: int, parts: int) -> tuple[int, int]:
    """Part `index` of `parts` that differ by at most one."""
    return length * index // parts, length * (index + 1) // parts


_blank = False


@contextlib.contextmanager
def blank() -> Iterator[None]:
    """Modules made within begin with zeros where chance would have filled them: what they hold is
    loaded next."""
    global _blank
    before, _blank = _blank, True
    try:
        yield
    finally:
        _blank = before


def seeded_normal(shape: Sequence[int], std: float, seed: int, name: str) -> Tensor:
    """A full fp32 tensor that depends on the seed and its own name alone, whatever the layout."""
    if _blank:
        return torch.zeros(*shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(*shape).normal_(0.0, std, generator=generator)
