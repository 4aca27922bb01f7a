"""What the contract test knows of combine: cases, messages, bytes kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moekernels import reference
from moekernels.ops.combine import _combine, _combine_backward, combine
from python_tests.support.spec import (
    Case,
    OpSpec,
    large_routing,
    nbytes,
    randn,
    register,
    routed,
    routing_cases,
    wide,
)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, ids, _, routing in routing_cases():
        for weighted in (False, True):
            weights = randn(wide(dtype), *ids.shape, seed=1) if weighted else None
            inputs = {
                "rows": randn(dtype, routing.token_of.shape[0], 10),
                "row_of": routing.row_of,
                "token_of": routing.token_of,
                "weights": weights,
            }
            label = f"{name}-weighted" if weighted else name
            yield Case(label, inputs, compile=name == "ordinary")


def _large(dtype: torch.dtype) -> dict:
    routing = large_routing()
    return {
        "rows": randn(dtype, routing.token_of.shape[0], 130),
        "row_of": routing.row_of,
        "token_of": routing.token_of,
        "weights": randn(wide(dtype), *routing.row_of.shape, seed=1),
    }


def _sized(tokens: int) -> dict:
    routing = routed(tokens)
    return {
        "rows": randn(torch.float32, 2 * tokens, 12),
        "row_of": routing.row_of,
        "token_of": routing.token_of,
        "weights": randn(torch.float32, tokens, 2, seed=1),
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
    routing = nbytes(inputs["row_of"], inputs["token_of"])
    if inputs["weights"] is None:
        return routing
    return routing + nbytes(inputs["rows"], inputs["weights"])


register(
    OpSpec(
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
