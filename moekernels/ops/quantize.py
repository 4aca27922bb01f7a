"""quantize: numbers in FP8, a scale for each block of 128."""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import _derivatives
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op
from moekernels.reference import Quantized

__all__ = ["Quantized", "quantize"]

_quantize = raw._quantize.default


def _blocks(length: int) -> int:
    return (length + reference.BLOCK - 1) // reference.BLOCK


@fake("_quantize")
def _(x: Tensor, tiles: bool, transposed: bool):
    m, n = x.shape[-2:]
    down, across = _blocks(m) if tiles else m, _blocks(n)
    if transposed:
        m, n, down, across = n, m, across, down
    before = x.shape[:-2]
    values = x.new_empty(*before, m, n, dtype=torch.float8_e4m3fn)
    return values, x.new_empty(*before, down, across, dtype=torch.float32)


@op(None)
def quantize(x: Tensor, *, tiles: bool = False, transposed: bool = False) -> Quantized:
    """Rounds numbers to FP8 (e4m3), each block of them over a scale of its own.

        scale = max |x| / 448,  values = round(x / scale)

    Args:
        x: [R, I] fp32, bf16 or fp16, in blocks of 1 x 128 along I; with `tiles` [E, O, I], in
            blocks of 128 x 128.
        tiles: the blocks of weights, which are the same along both axes.
        transposed: with `tiles`, the result is of x's last two axes turned: what a product needs
            that sums over O, with the same values and scales.

    Returns:
        `Quantized`: values [R, I] (or [E, O, I], transposed [E, I, O]) in torch.float8_e4m3fn, and
        scales [R, ceil(I/128)] (or [E, ceil(O/128), ceil(I/128)], transposed the other way) in
        fp32.

    Raises:
        TypeError: an argument that is no tensor or bool where it must be one.
        RuntimeError: a wrong dtype, rank or device, with the values in the message; a tensor that
            asks for a gradient.

    Notes:
        values * scale is within 2^-4 |x|, or 2^-10 of the scale where that is more (times 1 +
        2^-20); zeros stay zeros. A scale is at least 2^-126. A block that holds an infinity or a
        NaN becomes NaN throughout, never a large finite number. Rows are quantized alone: a row has
        the same bits whatever lies beside it.
        Source: DeepSeek-V3 2024, section 3.3.

    Examples:
        >>> values, scales = ops.quantize(torch.tensor([[448.0, 100.0, -3.0]]))
        >>> values.float().tolist(), scales.tolist()
        ([[448.0, 96.0, -3.0]], [[1.0]])
    """
    _derivatives.refuse_gradients("quantize", "it rounds", x)
    return Quantized(*_quantize(x.contiguous(), tiles, transposed))
