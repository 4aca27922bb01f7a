"""rms_norm: rows over their root mean square, alone or behind a sum."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import _derivatives
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op, require_tensor, wide

__all__ = ["add_rms_norm", "rms_norm"]

_rms_norm = raw._rms_norm.default
_rms_norm_backward = raw._rms_norm_backward.default


@fake("_rms_norm")
def _(x: Tensor, added: Tensor | None, weight: Tensor, eps: float):
    rows, hidden = x.shape
    sums = x.new_empty(0 if added is None else rows, hidden)
    return torch.empty_like(x), sums, x.new_empty(rows, dtype=wide(x.dtype))


@fake("_rms_norm_backward")
def _(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor):
    return torch.empty_like(x), torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, _, rstd = _rms_norm(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        if _derivatives.needs_plain():
            plain, needed = partial(reference.rms_norm, eps=ctx.eps), ctx.needs_input_grad[:2]
            return *_derivatives.vjp(plain, (x, weight), needed, (dy,)), None
        return *_rms_norm_backward(dy.contiguous(), None, x, weight, rstd), None


class _AddRMSNorm(torch.autograd.Function):
    """Keeps the sum, which is kept by whoever takes it, too."""

    @staticmethod
    def forward(ctx, x: Tensor, added: Tensor, weight: Tensor, eps: float):
        y, total, rstd = _rms_norm(x, added, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, dy: Tensor | None, dsum: Tensor | None):
        total, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dsum, dsum, None, None
        if _derivatives.needs_plain():
            needed = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2]
            plain = partial(_norm_and_sum, eps=ctx.eps)
            dx, dweight = _derivatives.vjp(plain, (total, weight), needed, (dy, dsum))
        else:
            dsum = None if dsum is None else dsum.contiguous()
            dx, dweight = _rms_norm_backward(dy.contiguous(), dsum, total, weight, rstd)
        return dx, dx, dweight, None


def _norm_and_sum(total: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference.rms_norm(total, weight, eps), total.view_as(total)


@op(reference.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Divides each row by its root mean square.

        y = x / sqrt(mean(x^2) + eps) * weight

    Args:
        x: [R, H] fp32, bf16, fp16 or fp64.
        weight: [H] in x's dtype.
        eps: added to the mean of the squares.

    Returns:
        [R, H] in x's dtype.

    Raises:
        TypeError: an argument that is no tensor or number where it must be one.
        RuntimeError: a wrong dtype, rank, shape or device, with the values in the message.

    Notes:
        Computed in fp32 (fp64 for fp64) and rounded once. Keeps x and one number a row.
        Differentiable any number of times; the weight's gradient is summed over fixed pieces of
        rows, so that it has the same bits on any number of threads.
        Source: Zhang and Sennrich 2019.

    Examples:
        >>> ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
        tensor([[0.8485, 2.2627]])
    """
    if weight is None:
        require_tensor(weight)
    x, weight = x.contiguous(), weight.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return _rms_norm(x, None, weight, eps)[0]


def plainly_added(
    x: Tensor, added: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    total = x + added
    return reference.rms_norm(total, weight, eps), total


@op(plainly_added)
def add_rms_norm(
    x: Tensor, added: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of the sum of a residual stream and what a layer adds to it, and that sum.

        s = x + added,  y = rms_norm(s, weight, eps)

    Args:
        x: [R, H] fp32, bf16, fp16 or fp64.
        added: [R, H] in x's dtype.
        weight: [H] in x's dtype.
        eps: added to the mean of the squares.

    Returns:
        (y, s), both [R, H] in x's dtype.

    Raises:
        TypeError: an argument that is no tensor or number where it must be one.
        RuntimeError: a wrong dtype, rank, shape or device, with the values in the message.

    Notes:
        As `rms_norm`; the sum is rounded before it is normalised. The backward adds the gradient of
        s to that of its norm in one pass, for x and `added` alike.

    Examples:
        >>> x, added = torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 0.0]])
        >>> ops.add_rms_norm(x, added, torch.ones(2), 0.0)
        (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    if weight is None:
        require_tensor(weight)
    x, added, weight = x.contiguous(), added.contiguous(), weight.contiguous()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, added, weight)):
        return _AddRMSNorm.apply(x, added, weight, eps)
    return _rms_norm(x, added, weight, eps)[:2]
