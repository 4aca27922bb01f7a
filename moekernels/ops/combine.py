"""combine: each token's rows, summed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moekernels import ops, reference
from moekernels.ops import _derivatives, _spec
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op, require_tensor

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
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None, Tensor]:
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
    require_tensor(token_of)
    rows = rows.contiguous()
    if weights is None:
        if rows.requires_grad and torch.is_grad_enabled():
            return _Combine.apply(rows, row_of, token_of)
        return _combine(rows, row_of, None, token_of)
    weights = weights.to(_spec.wide(rows.dtype)).contiguous()
    if (rows.requires_grad or weights.requires_grad) and torch.is_grad_enabled():
        return _WeightedCombine.apply(rows, row_of, token_of, weights)
    return _combine(rows, row_of, weights, token_of)


def _cases(dtype: torch.dtype) -> Iterator[_spec.Case]:
    for name, ids, _, routing in _spec.routing_cases():
        for weighted in (False, True):
            weights = _spec.randn(_spec.wide(dtype), *ids.shape, seed=1) if weighted else None
            inputs = {
                "rows": _spec.randn(dtype, routing.token_of.shape[0], 10),
                "row_of": routing.row_of,
                "token_of": routing.token_of,
                "weights": weights,
            }
            label = f"{name}-weighted" if weighted else name
            yield _spec.Case(label, inputs, compile=name == "ordinary")


def _large(dtype: torch.dtype) -> dict:
    routing = _spec.large_routing()
    return {
        "rows": _spec.randn(dtype, routing.token_of.shape[0], 130),
        "row_of": routing.row_of,
        "token_of": routing.token_of,
        "weights": _spec.randn(_spec.wide(dtype), *routing.row_of.shape, seed=1),
    }


def _sized(tokens: int) -> dict:
    routing = _spec.routed(tokens)
    return {
        "rows": _spec.randn(torch.float32, 2 * tokens, 12),
        "row_of": routing.row_of,
        "token_of": routing.token_of,
        "weights": _spec.randn(torch.float32, tokens, 2, seed=1),
    }


def _messages():
    rows, row_of = torch.zeros(6, 4), torch.zeros(3, 2, dtype=torch.int32)
    token_of, weights = torch.zeros(6, dtype=torch.int32), torch.zeros(3, 2)
    yield (
        lambda: combine(rows[0], row_of, token_of),
        "combine: rows must be float32|bfloat16|float16|float64 [R, H], got float32 [4]",
    )
    yield (
        lambda: combine(rows, row_of[0], token_of),
        "combine: row_of must be int32 [T, K], got int32 [2]",
    )
    yield (
        lambda: combine(rows, row_of, token_of, weights[:2]),
        "combine: weights must be float32 [T=3, K=2], got float32 [2, 2]",
    )
    yield (
        lambda: combine(rows, row_of, token_of[:5]),
        "combine: token_of must be int32 [R=6], got int32 [5]",
    )
    yield (
        lambda: combine(rows.clone().requires_grad_(), row_of, token_of.long(), weights),
        "combine: token_of must be int32 [R=6], got int64 [6]",
    )
    yield (
        lambda: _combine(rows.T, row_of, None),
        "combine: rows must be contiguous, got strides [1, 4]",
    )
    yield (
        lambda: _combine_backward(rows[:2], rows, row_of, token_of, weights),
        "combine_backward: dout must be float32 [T=3, H=4], got float32 [2, 4]",
    )


def _saved(inputs: dict) -> int:
    routing = _spec.nbytes(inputs["row_of"], inputs["token_of"])
    if inputs["weights"] is None:
        return routing
    return routing + _spec.nbytes(inputs["rows"], inputs["weights"])


_spec.register(
    _spec.OpSpec(
        name="combine",
        fn=combine,
        reference=reference.combine,
        cases=_cases,
        sized=_sized,
        differentiable=("rows", "weights"),
        messages=_messages,
        large=_large,
        saved=_saved,
    )
)
