"""What the contract test knows of rms_norm and add_rms_norm: cases, messages, bytes kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from moekernels import reference
from moekernels.ops.rms_norm import (
    _rms_norm,
    _rms_norm_backward,
    add_rms_norm,
    plainly_added,
    rms_norm,
)
from python_tests.support.spec import Case, OpSpec, nbytes, randn, register, wide

# Rows: of one piece of the weight's gradient, of several; widths that fill vectors, and do not.
SHAPES = {
    "ordinary": (37, 64),
    "odd": (131, 37),
    "no_rows": (0, 8),
    "one_row": (1, 5),
    "one_column": (3, 1),
    "narrow": (200, 16),
}


def _inputs(dtype: torch.dtype, rows: int, hidden: int, added: bool) -> dict:
    inputs = {"x": randn(dtype, rows, hidden)}
    if added:
        inputs["added"] = randn(dtype, rows, hidden, seed=1)
    return inputs | {"weight": 1 + randn(dtype, hidden, seed=2, scale=0.2), "eps": 1e-5}


def _cases(added: bool) -> Callable[[torch.dtype], Iterator[Case]]:
    def cases(dtype: torch.dtype) -> Iterator[Case]:
        for name, shape in SHAPES.items():
            small = shape[0] * shape[1] < 2400
            inputs = _inputs(dtype, *shape, added)
            yield Case(name, inputs, gradcheck=small, compile=name == "odd")
        zeros = _inputs(dtype, 4, 6, added)
        for name in ("x", "added") if added else ("x",):
            zeros[name] = torch.zeros_like(zeros[name])
        yield Case("zeros", zeros, gradcheck=False)

    return cases


def _large(added: bool) -> Callable[[torch.dtype], dict]:
    return lambda dtype: _inputs(dtype, 3000, 130, added)


def _sized(added: bool) -> Callable[[int], dict]:
    return lambda tokens: _inputs(torch.float32, tokens, 12, added)


def _messages():
    x, weight = torch.zeros(3, 4), torch.zeros(4)
    yield (
        lambda: rms_norm(x[0], weight),
        "rms_norm: x must be float32|bfloat16|float16|float64 [R, H], got float32 [4]",
    )
    yield (
        lambda: rms_norm(x, weight[:3]),
        "rms_norm: weight must be float32 [H=4], got float32 [3]",
    )
    yield (
        lambda: rms_norm(x, weight.double()),
        "rms_norm: weight must be float32 [H=4], got float64 [4]",
    )
    yield (
        lambda: _rms_norm(x.T.contiguous().T, None, weight, 0.0),
        "rms_norm: x must be contiguous, got strides [1, 3]",
    )
    yield (
        lambda: _rms_norm_backward(x[:2], None, x, weight, torch.zeros(3)),
        "rms_norm_backward: dy must be float32 [R=3, H=4], got float32 [2, 4]",
    )
    yield (
        lambda: _rms_norm_backward(x, None, x, weight, torch.zeros(2)),
        "rms_norm_backward: rstd must be float32 [R=3], got float32 [2]",
    )


def _add_messages():
    x, weight = torch.zeros(3, 4), torch.zeros(4)
    yield (
        lambda: add_rms_norm(x, x[:2], weight),
        "rms_norm: added must be float32 [R=3, H=4], got float32 [2, 4]",
    )


def _saved(inputs: dict) -> int:
    """x or the sum, the weight, and a number a row."""
    x = inputs["x"]
    return nbytes(x, inputs["weight"]) + x.shape[0] * wide(x.dtype).itemsize


register(
    OpSpec(
        name="rms_norm",
        fn=rms_norm,
        reference=reference.rms_norm,
        cases=_cases(False),
        sized=_sized(False),
        differentiable=("x", "weight"),
        messages=_messages,
        large=_large(False),
        saved=_saved,
    )
)
register(
    OpSpec(
        name="add_rms_norm",
        fn=add_rms_norm,
        reference=plainly_added,
        cases=_cases(True),
        sized=_sized(True),
        differentiable=("x", "added", "weight"),
        messages=_add_messages,
        large=_large(True),
        saved=_saved,
    )
)
