"""What the contract test knows of all_to_all: cases, messages, bytes kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops.all_to_all import _pack, pack, regroup, ungroup
from python_tests.support.spec import (
    Case,
    OpSpec,
    large_routing,
    randn,
    register,
    routed,
    routing_cases,
    wide,
)


def _pack_cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, ids, _, routing in routing_cases():
        x = randn(dtype, ids.shape[0], 7)
        weights = randn(wide(dtype), *ids.shape, seed=1)
        inputs = {"x": x, "weights": weights, "slot_of": routing.slot_of, "top_k": ids.shape[1]}
        yield Case(name, inputs, compile=name == "ordinary")
        yield Case(f"{name}-no_weights", {**inputs, "weights": None})


def _counts_cases() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    yield "ordinary", torch.randint(0, 9, (4, 3), generator=generator)
    yield "one_peer", torch.randint(0, 9, (1, 5), generator=generator)
    yield "one_expert", torch.randint(0, 9, (5, 1), generator=generator)
    yield "zero_splits", torch.tensor([[0, 0, 0], [5, 0, 1], [0, 0, 0], [0, 3, 0]])
    yield "nothing", torch.zeros(2, 4, dtype=torch.int64)
    yield "all_to_one", torch.tensor([[0, 0], [0, 33], [0, 0]])


def _message(dtype: torch.dtype, counts: Tensor, width: int, weighted: bool) -> Tensor:
    rows = int(counts.sum())
    slots = torch.arange(rows, dtype=torch.int32)
    weights = randn(wide(dtype), rows, 1, seed=1) if weighted else None
    return reference.pack(randn(dtype, rows, width), weights, slots, 1)


def _regroup_cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, counts in _counts_cases():
        for weighted in (True, False):
            message = _message(dtype, counts, 6, weighted)
            inputs = {"message": message, "counts": counts, "width": 6}
            label = name if weighted else f"{name}-no_weights"
            yield Case(label, inputs, compile=name == "ordinary")


def _ungroup_cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, counts in _counts_cases():
        rows = int(counts.sum())
        inputs = {"rows": randn(dtype, rows, 5), "counts": counts}
        yield Case(f"{name}-no_weights", inputs)
        weights = randn(wide(dtype), rows, seed=1)
        yield Case(name, {**inputs, "weights": weights}, compile=name == "ordinary")


def _pack_large(dtype: torch.dtype) -> dict:
    routing = large_routing()
    x = randn(dtype, routing.row_of.shape[0], 130)
    weights = randn(wide(dtype), *routing.row_of.shape, seed=1)
    return {"x": x, "weights": weights, "slot_of": routing.slot_of, "top_k": weights.shape[1]}


def _regroup_large(dtype: torch.dtype) -> dict:
    counts = torch.arange(32).view(8, 4) * 8
    return {"message": _message(dtype, counts, 130, True), "counts": counts, "width": 130}


def _ungroup_large(dtype: torch.dtype) -> dict:
    counts = torch.arange(32).view(8, 4) * 8
    return {"rows": randn(dtype, int(counts.sum()), 130), "counts": counts}


def _pack_sized(tokens: int) -> dict:
    x, weights = randn(torch.float32, tokens, 12), randn(torch.float32, tokens, 2)
    return {"x": x, "weights": weights, "slot_of": routed(tokens).slot_of, "top_k": 2}


def _even_counts(tokens: int) -> Tensor:
    return torch.full((2, 3), tokens)


def _regroup_sized(tokens: int) -> dict:
    counts = _even_counts(tokens)
    return {"message": _message(torch.float32, counts, 12, True), "counts": counts, "width": 12}


def _ungroup_sized(tokens: int) -> dict:
    return {"rows": randn(torch.float32, 6 * tokens, 12), "counts": _even_counts(tokens)}


def _pack_messages():
    x, slot_of = torch.zeros(3, 4), torch.zeros(6, dtype=torch.int32)
    yield (
        lambda: pack(x.long(), None, slot_of, 2),
        "pack: x must be float32|bfloat16|float16|float64 [T, H], got int64 [3, 4]",
    )
    yield (
        lambda: pack(x, torch.zeros(3, 1), slot_of, 2),
        "pack: weights must be float32 [T=3, K=2], got float32 [3, 1]",
    )
    yield lambda: pack(x, None, slot_of, -1), "pack: top_k must be at least 0, got -1"
    yield lambda: _pack(x.T, None, slot_of, 2), "pack: x must be contiguous, got strides [1, 4]"


def _regroup_messages():
    message, counts = torch.zeros(6, 5), torch.tensor([[1, 2], [3, 0]])
    yield (
        lambda: regroup(message, counts.int(), 4),
        "regroup: counts must be int64 [P, e], got int32 [2, 2]",
    )
    yield (
        lambda: regroup(message, counts + 1, 4),
        "regroup: counts add up to 10 rows, got [6, 5]",
    )
    yield (
        lambda: regroup(message, -counts, 4),
        "regroup: counts must not be negative, got -1",
    )
    # Added up in 64 bits they are the six rows of the message.
    overflowing = torch.tensor([[2**62, 2**62], [2**63 - 1, 7]])
    yield (
        lambda: regroup(message, overflowing, 4),
        "regroup: counts add up to more rows than int64 counts, got [6, 5]",
    )
    yield (
        lambda: regroup(message, counts, 3),
        "regroup: message [6, 5] must hold width=3 elements a row, or 4 with weights",
    )


def _ungroup_messages():
    rows, counts = torch.zeros(6, 5), torch.tensor([[1, 2], [3, 0]])
    yield (
        lambda: ungroup(rows[:4], counts),
        "ungroup: counts add up to 6 rows, got [4, 5]",
    )
    overflowing = torch.tensor([[2**62, 2**62], [2**63 - 1, 7]])
    yield (
        lambda: ungroup(rows, overflowing),
        "ungroup: counts add up to more rows than int64 counts, got [6, 5]",
    )
    yield (
        lambda: ungroup(rows, counts, torch.zeros(5)),
        "ungroup: weights must be float32 [R=6], got float32 [5]",
    )


for _fn, _reference, _cases, _large, _sized, _messages in (
    (pack, reference.pack, _pack_cases, _pack_large, _pack_sized, _pack_messages),
    (regroup, reference.regroup, _regroup_cases, _regroup_large, _regroup_sized, _regroup_messages),
    (ungroup, reference.ungroup, _ungroup_cases, _ungroup_large, _ungroup_sized, _ungroup_messages),
):
    register(
        OpSpec(
            name=_fn.__name__,
            fn=_fn,
            reference=_reference,
            cases=_cases,
            sized=_sized,
            exact=True,
            messages=_messages,
            large=_large,
        )
    )
