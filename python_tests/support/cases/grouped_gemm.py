"""What the contract test knows of grouped_gemm: cases, messages, bytes kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moekernels import reference
from moekernels.ops.grouped_gemm import (
    _grouped_gemm,
    grouped_gemm,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
)
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


def _inputs(dtype: torch.dtype, transposed: bool, width: int, out: int) -> Iterator[tuple]:
    for name, _, experts, routing in routing_cases():
        rows = randn(dtype, routing.token_of.shape[0], width)
        shape = (experts, width, out) if transposed else (experts, out, width)
        w = randn(dtype, *shape, seed=1)
        suffix = "_transposed" if transposed else ""
        yield name + suffix, rows, w, routing.offsets


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for transposed in (False, True):
        for name, rows, w, offsets in _inputs(dtype, transposed, 11, 7):
            inputs = {"rows": rows, "w": w, "offsets": offsets, "transposed": transposed}
            yield Case(name, inputs, compile=name == "ordinary")


def _large(dtype: torch.dtype) -> dict:
    routing = large_routing(tokens=300, experts=6, top_k=2)
    rows, w = randn(dtype, 600, 64), randn(dtype, 6, 72, 64, seed=1)
    return {"rows": rows, "w": w, "offsets": routing.offsets}


def _dgrad_cases(dtype: torch.dtype) -> Iterator[Case]:
    for transposed in (False, True):
        for name, rows, w, offsets in _inputs(dtype, transposed, 9, 13):
            drows = randn(dtype, rows.shape[0], 13, seed=2)
            inputs = {"drows": drows, "w": w, "offsets": offsets, "transposed": transposed}
            yield Case(name, inputs, compile=name == "ordinary")


def _wgrad_cases(dtype: torch.dtype) -> Iterator[Case]:
    for transposed in (False, True):
        for name, rows, _, offsets in _inputs(dtype, transposed, 10, 12):
            drows = randn(dtype, rows.shape[0], 12, seed=2)
            inputs = {"rows": rows, "drows": drows, "offsets": offsets, "transposed": transposed}
            yield Case(name, inputs, compile=name == "ordinary")


def _sized(tokens: int, **shapes: tuple[int, ...]) -> dict:
    inputs = {name: randn(torch.float32, *shape) for name, shape in shapes.items()}
    return inputs | {"offsets": routed(tokens).offsets}


def _messages():
    rows, w = torch.zeros(6, 4), torch.zeros(2, 3, 4)
    offsets = torch.tensor([0, 2, 6])
    yield (
        lambda: grouped_gemm(rows[0], w, offsets),
        "grouped_gemm: rows must be float32|bfloat16|float16|float64 [R, I], got float32 [4]",
    )
    yield (
        lambda: grouped_gemm(rows, w, offsets, transposed=True),
        "grouped_gemm: w must be float32 [E, I=4, O], got float32 [2, 3, 4]",
    )
    yield (
        lambda: grouped_gemm(rows, w.bfloat16(), offsets),
        "grouped_gemm: w must be float32 [E, O, I=4], got bfloat16 [2, 3, 4]",
    )
    yield (
        lambda: grouped_gemm(rows, w, offsets.int()),
        "grouped_gemm: offsets must be int64 [E+1=3], got int32 [3]",
    )
    yield (
        lambda: grouped_gemm(rows, w, offsets + 1),
        "grouped_gemm: offsets must ascend from 0 to at most R=6, got 1 ... 7",
    )
    yield (
        lambda: grouped_gemm(rows, w, torch.tensor([0, 5, 4])),
        "grouped_gemm: offsets must ascend, got offsets[1] = 5 and offsets[2] = 4",
    )
    yield (
        lambda: _grouped_gemm(rows.T, torch.zeros(2, 3, 6), offsets, False),
        "grouped_gemm: rows must be contiguous, got strides [1, 4]",
    )


register(
    OpSpec(
        name="grouped_gemm",
        fn=grouped_gemm,
        reference=reference.grouped_gemm,
        cases=_cases,
        sized=lambda t: _sized(t, rows=(2 * t, 10), w=(5, 14, 10)),
        differentiable=("rows", "w"),
        messages=_messages,
        large=_large,
        saved=lambda i: nbytes(i["rows"], i["w"], i["offsets"]),
    )
)
register(
    OpSpec(
        name="grouped_gemm_dgrad",
        fn=grouped_gemm_dgrad,
        reference=reference.grouped_gemm_dgrad,
        cases=_dgrad_cases,
        sized=lambda t: _sized(t, drows=(2 * t, 14), w=(5, 14, 10)),
        differentiable=("drows", "w"),
    )
)
register(
    OpSpec(
        name="grouped_gemm_wgrad",
        fn=grouped_gemm_wgrad,
        reference=reference.grouped_gemm_wgrad,
        cases=_wgrad_cases,
        sized=lambda t: _sized(t, rows=(2 * t, 10), drows=(2 * t, 14)),
        differentiable=("rows", "drows"),
    )
)
