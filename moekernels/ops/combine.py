"""combine: each token's rows, summed."""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels import ops, reference
from moekernels.ops import _derivatives
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op, require_tensor, wide

__all__ = ["combine"]

_combine = raw._combine.default
_combine_backward = raw._combine_backward.default


@fake("_combine")
def _(
    rows: Tensor, row_of: Tensor, weights: Tensor | None, token_of: Tensor | None = None
) -> Tensor:
    return rows.new_empty(row_of.shape[0], rows.shape[1])


@fake("_combine_backward")
def _(dout: Tensor, rows: Tensor, row_of: Tensor, token_of: Tensor, weights: Tensor):
    return torch.empty_like(rows), torch.empty_like(weights)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, row_of: Tensor, token_of: Tensor) -> Tensor:
        ctx.save_for_backward(row_of, token_of)
        return _combine(rows, row_of, None, token_of)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None]:
        row_of, token_of = ctx.saved_tensors
        return ops.permute(dout, token_of, row_of), None, None


class _WeightedCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, row_of: Tensor, token_of: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, row_of, token_of, weights)
        return _combine(rows, row_of, weights, token_of)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        rows, row_of, token_of, weights = ctx.saved_tensors
        if _derivatives.needs_plain():
            drows, dweights = _derivatives.vjp(
                lambda rows, weights: reference.combine(rows, row_of, token_of, weights),
                (rows, weights),
                (ctx.needs_input_grad[0], ctx.needs_input_grad[3]),
                (dout,),
            )
            return drows, None, None, dweights
        drows, dweights = _combine_backward(dout.contiguous(), rows, row_of, token_of, weights)
        return drows, None, None, dweights


@op(reference.combine)
def combine(
    rows: Tensor, row_of: Tensor, token_of: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Sums the K rows of each token, in the order of k.

        out[t] = sum over k of (weights[t, k] *) rows[row_of[t, k]], without those outside [0, R)

    Args:
        rows: [R, H] fp32, bf16, fp16 or fp64.
        row_of: [T, K] int32, the row of each choice (`Routing.row_of`), -1 where dropped.
        token_of: [R] int32, the token of each row (`Routing.token_of`); only the backward reads it.
        weights: [T, K] or None; taken as fp32 (fp64 beside fp64 rows).

    Returns:
        [T, H], in rows' dtype; zero for tokens without rows.

    Raises:
        TypeError: an argument that is no tensor or number where it must be one.
        RuntimeError: a wrong dtype, rank, shape or device, with the values in the message.

    Notes:
        The sum is kept in fp32 (fp64 for fp64) and rounded once. Deterministic for any number of
        threads. Without weights nothing but the routing is kept for backward, which is
        `permute(dout, token_of)`; with weights the rows are kept, and one pass yields
        drows = weight * dout and dweights = <dout, row>. A layer whose experts apply the weights
        (`experts`) therefore combines without them.

    Examples:
        >>> routing = ops.route(torch.tensor([[1, 0], [0, 1]]), 2)
        >>> rows = torch.tensor([[1.0], [2.0], [30.0], [40.0]])
        >>> ops.combine(rows, routing.row_of, routing.token_of).tolist()  # 30 + 1, 2 + 40
        [[31.0], [42.0]]
    """
    if token_of is None:
        require_tensor(token_of)
    rows = rows.contiguous()
    if weights is None:
        if rows.requires_grad and torch.is_grad_enabled():
            return _Combine.apply(rows, row_of, token_of)
        return _combine(rows, row_of, None, token_of)
    weights = weights.to(wide(rows.dtype)).contiguous()
    if (rows.requires_grad or weights.requires_grad) and torch.is_grad_enabled():
        return _WeightedCombine.apply(rows, row_of, token_of, weights)
    return _combine(rows, row_of, weights, token_of)
