"""FP8 in plain torch: quantization in blocks of 128, and products of what was quantized.

The recipe is DeepSeek-V3's (2024, section 3.3): e4m3; activations scaled by blocks of 1 x 128,
weights by blocks of 128 x 128; sums in fp32, to which each 128 of the summed axis are promoted.

A block's scale is amax / 448, never less than 2^-126; a value is x / scale, rounded to nearest
even. So |x - values * scale| <= max(2^-4 |x|, 2^-10 scale) (1 + 2^-20): half a step of three bits
of mantissa, or of the subnormal numbers. A block that holds an infinity or a NaN dequantizes to NaN
throughout.

With u = 2^-24 and B blocks of 128 a product's fp32 sums are within (B + 5) u / (1 - (B + 5) u)
times sum |a b|, of dequantized a and b, of the exact sum: a term is rounded in the sum of its 32,
in at most three sums of those, in the product of the two scales, and B times behind that. (Hopper's
tensor cores keep fewer bits within a block: DeepSeek-V3 found about 14.) With what quantization
loses, a product is within (2^-3 + 2^-8) sum |a b| of that of what was quantized, where no value is
subnormal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # of a scale, and of the summed axis behind which sums are promoted
STEP = 32  # of the summed axis whose products are added exactly, then rounded to fp32
MOST = 448.0  # the largest e4m3
LEAST_AMAX = MOST * 2.0**-126


class Quantized(NamedTuple):
    values: Tensor  # x / scale in torch.float8_e4m3fn
    scales: Tensor  # fp32, one for each block


def _blocks(x: Tensor, rows: int) -> Tensor:
    """x [..., M, N] -> [..., M/rows, rows, N/128, 128], padded with zeros."""
    m, n = x.shape[-2:]
    x = F.pad(x, (0, -n % BLOCK, 0, -m % rows))
    return x.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))


def quantize(x: Tensor, *, tiles: bool = False, transposed: bool = False) -> Quantized:
    """x [R, I] by blocks of 1 x 128, or with `tiles` x [E, O, I] by blocks of 128 x 128;
    `transposed`: of x's last two axes turned."""
    rows = BLOCK if tiles else 1
    if x.numel() == 0:
        if transposed:
            x = x.transpose(-1, -2)
        counts = -(-x.shape[-2] // rows), -(-x.shape[-1] // BLOCK)
        scales = x.new_empty(*x.shape[:-2], *counts, dtype=torch.float32)
        return Quantized(x.to(torch.float8_e4m3fn).contiguous(), scales)
    wide = x.float()
    amax = wide.abs().unsqueeze(0) if not tiles else wide.abs()
    amax = _blocks(amax, rows).amax((-3, -1)).clamp_min(LEAST_AMAX)
    amax = amax if tiles else amax[0]
    inverse = torch.full_like(amax, MOST) / amax  # torch's 448 / amax is rounded twice
    inverse = inverse.repeat_interleave(rows, -2).repeat_interleave(BLOCK, -1)
    scaled = wide * inverse[..., : x.shape[-2], : x.shape[-1]]
    values = scaled.clamp(-MOST, MOST).to(torch.float8_e4m3fn)
    scales = amax / MOST
    if transposed:
        values, scales = values.transpose(-1, -2), scales.transpose(-1, -2)
    return Quantized(values.contiguous(), scales.contiguous())


def dequantize(values: Tensor, scales: Tensor, *, tiles: bool = False) -> Tensor:
    """values * scales in fp64, which is exact."""
    rows = BLOCK if tiles else 1
    each = scales.double().repeat_interleave(rows, -2).repeat_interleave(BLOCK, -1)
    return values.double() * each[..., : values.shape[-2], : values.shape[-1]]


def scaled_product(rows: Tensor, row_scales: Tensor, w: Tensor, w_scales: Tensor) -> Tensor:
    """rows [R, I] x w [O, I] -> [R, O] fp32, with the bits of the kernels: each 32 of I are added
    exactly and rounded, four of those in fp32, and the sum of 128, times both scales, to the whole
    by a fused multiply and add."""
    out = torch.zeros(rows.shape[0], w.shape[0], dtype=torch.float32, device=rows.device)
    a, b = rows.double(), w.double()
    for block, first in enumerate(range(0, rows.shape[1], BLOCK)):
        end = min(first + BLOCK, rows.shape[1])
        steps = [
            (a[:, k : min(k + STEP, end)] @ b[:, k : min(k + STEP, end)].T).float()
            for k in range(first, end, STEP)
        ]
        total = steps[0]
        for step in steps[1:]:
            total = total + step
        of_columns = w_scales[:, block].repeat_interleave(BLOCK)[: w.shape[0]]
        scale = row_scales[:, block, None] * of_columns
        # In fp64 the product is exact, so that all but the sum is rounded once.
        out = (out.double() + scale.double() * total.double()).float()
    return out


class _Product(torch.autograd.Function):
    """rows [R, I] x w [O, I] -> [R, O], both quantized on the way; so is the gradient of rows. The
    gradient of w is of what was not."""

    @staticmethod
    def forward(ctx, rows: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(rows, w)
        (wq,), (ws,) = quantize(w[None], tiles=True)
        return scaled_product(*quantize(rows), wq, ws).to(rows.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, drows: Tensor):
        rows, w = ctx.saved_tensors
        (wq,), (ws,) = quantize(w[None], tiles=True, transposed=True)
        dgrad = scaled_product(*quantize(drows), wq, ws).to(rows.dtype)
        wide = torch.promote_types(torch.float32, rows.dtype)
        return dgrad, (drows.to(wide).T @ rows.to(wide)).to(rows.dtype)


def experts_product(rows: Tensor, w: Tensor, offsets: Tensor, *, transposed: bool) -> Tensor:
    """`grouped_gemm` of rows and w, in FP8: forward and gradient of rows."""
    bounds = offsets.tolist()
    w = w.transpose(1, 2) if transposed else w
    out = [_Product.apply(rows[i:j], one) for one, i, j in zip(w, bounds[:-1], bounds[1:])]
    out.append(rows.new_zeros(rows.shape[0] - bounds[-1], w.shape[1]))
    return torch.cat(out)
