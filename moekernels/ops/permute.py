"""permute: token rows into expert order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moekernels import ops, reference
from moekernels.ops import _spec
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op, require_tensor
from moekernels.reference import Routing

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


def _cases(dtype: torch.dtype) -> Iterator[_spec.Case]:
    for name, ids, _, routing in _spec.routing_cases():
        x = _spec.randn(dtype, ids.shape[0], 10)
        inputs = {"x": x, "token_of": routing.token_of, "row_of": routing.row_of}
        yield _spec.Case(name, inputs, compile=name == "ordinary")


def _large(dtype: torch.dtype) -> dict:
    routing = _spec.large_routing()
    x = _spec.randn(dtype, routing.row_of.shape[0], 130)
    return {"x": x, "token_of": routing.token_of, "row_of": routing.row_of}


def _sized(tokens: int) -> dict:
    routing = _spec.routed(tokens)
    x = _spec.randn(torch.float32, tokens, 12)
    return {"x": x, "token_of": routing.token_of, "row_of": routing.row_of}


def _messages():
    x, token_of = torch.zeros(3, 4), torch.zeros(6, dtype=torch.int32)
    row_of = torch.zeros(3, 2, dtype=torch.int32)
    yield (
        lambda: permute(x[0], token_of, row_of),
        "permute: x must be float32|bfloat16|float16|float64 [T, H], got float32 [4]",
    )
    yield (
        lambda: permute(x, token_of.long(), row_of),
        "permute: token_of must be int32 [R], got int64 [6]",
    )
    yield (
        lambda: permute(x, token_of[::2], row_of),
        "permute: token_of must be contiguous, got strides [2]",
    )
    yield (
        lambda: permute(x, token_of, row_of[:2]),
        "permute: row_of must be int32 [T=3, K], got int32 [2, 2]",
    )
    yield (
        lambda: permute(x.clone().requires_grad_(), token_of, row_of.flatten()),
        "permute: row_of must be int32 [T=3, K], got int32 [6]",
    )
    yield (
        lambda: _permute(x.T, token_of),
        "permute: x must be contiguous, got strides [1, 4]",
    )


_spec.register(
    _spec.OpSpec(
        name="permute",
        fn=permute,
        reference=reference.permute,
        cases=_cases,
        sized=_sized,
        differentiable=("x",),
        messages=_messages,
        large=_large,
        saved=lambda i: _spec.nbytes(i["token_of"], i["row_of"]),
    )
)
