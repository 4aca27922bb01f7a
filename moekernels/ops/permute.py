"""permute: token rows into expert order."""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels import ops, reference
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op, require_tensor
from moekernels.reference import Routing

__all__ = ["permute", "permute_weights"]

_permute = raw._permute.default


@fake("_permute")
def _(x: Tensor, token_of: Tensor, row_of: Tensor | None = None) -> Tensor:
    return x.new_empty(token_of.shape[0], x.shape[1])


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, token_of: Tensor, row_of: Tensor) -> Tensor:
        ctx.save_for_backward(token_of, row_of)
        return _permute(x, token_of, row_of)

    @staticmethod
    def backward(ctx, drows: Tensor) -> tuple[Tensor, None, None]:
        token_of, row_of = ctx.saved_tensors
        return ops.combine(drows, row_of, token_of), None, None


@op(reference.permute)
def permute(x: Tensor, token_of: Tensor, row_of: Tensor) -> Tensor:
    """Copies each token's row to the places that `route` gave it.

        rows[r] = x[token_of[r]], and zero where token_of[r] is outside [0, T)

    Args:
        x: [T, H] fp32, bf16, fp16 or fp64.
        token_of: [R] int32, the token of each row (`Routing.token_of`), -1 for unused rows.
        row_of: [T, K] int32, the row of each choice (`Routing.row_of`); only the backward reads it.

    Returns:
        rows [R, H], in x's dtype.

    Raises:
        TypeError: an argument that is no tensor or number where it must be one.
        RuntimeError: a wrong dtype, rank, shape or device, with the values in the message.

    Notes:
        Only moves bytes. The gradient is `combine(drows, row_of, token_of)`, the sum of a token's
        rows in the order of k, so `row_of` and `token_of` must be each other's inverse.
        Deterministic; T = 0 and R = 0 are ordinary.

    Examples:
        >>> routing = ops.route(torch.tensor([[1], [0], [1]]), 2)
        >>> x = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
        >>> rows = ops.permute(x, routing.token_of, routing.row_of)
        >>> rows.flatten().tolist()
        [2.0, 1.0, 3.0]
        >>> (rows * torch.tensor([[10.0], [20.0], [30.0]])).sum().backward()
        >>> x.grad.flatten().tolist()
        [20.0, 10.0, 30.0]
    """
    if row_of is None:
        require_tensor(row_of)
    x = x.contiguous()
    if x.requires_grad and torch.is_grad_enabled():
        return _Permute.apply(x, token_of, row_of)
    return _permute(x, token_of, row_of)


@op(reference.permute_weights)
def permute_weights(weights: Tensor, routing: Routing) -> Tensor:
    """The routing weight of each row, differentiable: weights [T, K] -> [R], zero if unused.

    Examples:
        >>> routing = ops.route(torch.tensor([[1, 0], [0, 1]]), 2)
        >>> ops.permute_weights(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), routing).tolist()
        [0.25, 0.5, 0.75, 0.5]
    """
    flat = permute(weights.reshape(-1, 1), routing.slot_of, routing.row_of.reshape(-1, 1))
    return flat.reshape(-1)
