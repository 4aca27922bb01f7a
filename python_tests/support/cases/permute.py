"""What the contract test knows of permute: cases, messages, bytes kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moekernels import reference
from moekernels.ops.permute import _permute, permute
from python_tests.support.spec import (
    Case,
    OpSpec,
    large_routing,
    nbytes,
    randn,
    register,
    routed,
    routing_cases,
)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, ids, _, routing in routing_cases():
        x = randn(dtype, ids.shape[0], 10)
        inputs = {"x": x, "token_of": routing.token_of, "row_of": routing.row_of}
        yield Case(name, inputs, compile=name == "ordinary")


def _large(dtype: torch.dtype) -> dict:
    routing = large_routing()
    x = randn(dtype, routing.row_of.shape[0], 130)
    return {"x": x, "token_of": routing.token_of, "row_of": routing.row_of}


def _sized(tokens: int) -> dict:
    routing = routed(tokens)
    x = randn(torch.float32, tokens, 12)
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


register(
    OpSpec(
        name="permute",
        fn=permute,
        reference=reference.permute,
        cases=_cases,
        sized=_sized,
        differentiable=("x",),
        messages=_messages,
        large=_large,
        saved=lambda i: nbytes(i["token_of"], i["row_of"]),
    )
)
