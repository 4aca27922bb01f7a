"""Rotary positions over packed sequences. Legend: T tokens, hd head dimension, rd rotated of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekernels.ops import _derivatives

if TYPE_CHECKING:
    from moekernels.nn.cache import Cache


@dataclass(frozen=True, eq=False)
class Packing:
    """What attention needs to know of a microbatch, made once for all layers."""

    cos: Tensor  # [T, 1, rd/2] fp32 at least
    sin: Tensor
    # (segments, tokens of each): neighbours of equal length go through together
    runs: list[tuple[int, int]]
    cu_seqlens: list[int]
    pairs: bool = False  # (i, i + 1) turn together, not (i, i + rd/2)
    cache: Cache | None = None  # of a model that generates

    @cached_property
    def bounds(self) -> Tensor:
        """cu_seqlens [S+1] int64, on the CPU."""
        return torch.tensor(self.cu_seqlens, dtype=torch.int64)

    @cached_property
    def angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin [T, rd/2]."""
        return self.cos[:, 0], self.sin[:, 0]

    @staticmethod
    def make(
        positions: Tensor,
        cu_seqlens: list[int],
        radians: Sequence[float],
        dtype: torch.dtype,
        *,
        magnitude: float = 1.0,
        pairs: bool = False,
        cache: Cache | None = None,
    ) -> Packing:
        """positions [T], cu_seqlens on the host, radians a position of each of the rd/2 pairs."""
        turns = torch.tensor(radians, dtype=torch.float64, device=positions.device)
        angle = positions[:, None].double() * turns
        wide = torch.promote_types(dtype, torch.float32)
        runs: list[tuple[int, int]] = []
        for begin, end in zip(cu_seqlens, cu_seqlens[1:]):
            if end == begin:
                continue
            if runs and runs[-1][1] == end - begin:
                runs[-1] = (runs[-1][0] + 1, end - begin)
            else:
                runs.append((1, end - begin))
        cos, sin = (magnitude * angle.cos()).to(wide), (magnitude * angle.sin()).to(wide)
        return Packing(cos[:, None], sin[:, None], runs, cu_seqlens, pairs, cache)


class _Rotate(torch.autograd.Function):
    """Rotary positions; the backward is the rotation by the opposite angle, so x is not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = cos, sin
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.angles
        if _derivatives.needs_plain():
            return _plainly_rotated(grad, cos, -sin), None, None
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, hd]: the pair (i, i + rd/2) turns by the angle of its position; what lies beyond
    the first rd elements stays."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    out[..., :half] = (a * cos).addcmul_(b, sin, value=-1)
    out[..., half : 2 * half] = (b * cos).addcmul_(a, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def _plainly_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same, for derivatives that write nothing in place."""
    half = cos.shape[-1]
    a, b, rest = x.tensor_split([half, 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def rotate(x: Tensor, packing: Packing) -> Tensor:
    """x [T, heads, hd] -> the same shape. Where neighbours turn together they are parted first, in
    queries and keys alike, which their products do not see."""
    if packing.pairs:
        turning = 2 * packing.cos.shape[-1]
        x = torch.cat([x[..., 0:turning:2], x[..., 1:turning:2], x[..., turning:]], dim=-1)
    if _derivatives.transformed():
        return _plainly_rotated(x, packing.cos, packing.sin)
    return _Rotate.apply(x, packing.cos, packing.sin)
