"""all_to_all: packs the rows that ranks exchange, and regroups what arrives by local expert.

The collective itself is `parallel/expert.py`'s; these only move bytes and refuse inputs that ask
for gradients (`parallel` builds the autograd function around pack, exchange and regroup). A message
is a matrix of x's dtype: each row's H elements and, behind them, the bits of its routing weight
(fp32, or fp64 beside fp64 rows) in w elements: 1 for fp32 and fp64, 2 for bf16 and fp16, and 0
without weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import _derivatives, _spec
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op

_pack = raw._pack.default
_regroup = raw._regroup.default
_ungroup = raw._ungroup.default
_BITS = "messages hold the bits of weights; moekernels.parallel exchanges with gradients"


def _weight_elements(dtype: torch.dtype) -> int:
    return 1 if dtype in (torch.float32, torch.float64) else 2


@fake("_pack")
def _(x: Tensor, weights: Tensor | None, slot_of: Tensor, top_k: int) -> Tensor:
    extra = 0 if weights is None else _weight_elements(x.dtype)
    return x.new_empty(slot_of.shape[0], x.shape[1] + extra)


@fake("_regroup", on_cpu=("counts",))
def _(message: Tensor, counts: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = message.shape[0]
    weighted = 0 if message.shape[1] == width else rows
    return (
        message.new_empty(rows, width),
        message.new_empty(weighted, dtype=_spec.wide(message.dtype)),
        message.new_empty(counts.shape[1] + 1, dtype=torch.int64),
    )


@fake("_ungroup", on_cpu=("counts",))
def _(rows: Tensor, counts: Tensor, weights: Tensor | None) -> Tensor:
    extra = 0 if weights is None else _weight_elements(rows.dtype)
    return rows.new_empty(rows.shape[0], rows.shape[1] + extra)


@op(None)
def pack(x: Tensor, weights: Tensor | None, slot_of: Tensor, top_k: int) -> Tensor:
    """The message of one rank: its rows in routing order, each with its weight behind it.

        message[r] = x[slot_of[r] // K], bits of weights.flatten()[slot_of[r]]

    Args:
        x: [T, H] fp32, bf16, fp16 or fp64.
        weights: [T, K] routing weights or None; taken as fp32 (fp64 beside fp64 rows).
        slot_of: [R] int32 (`Routing.slot_of`), -1 for unused rows.
        top_k: K.

    Returns:
        message [R, H + w]; unused rows are zero.

    Raises:
        RuntimeError: a wrong dtype, rank or shape, with the values in the message; inputs that ask
            for a gradient.

    Notes:
        Routing order is by expert, hence by the rank that holds it: the rows of a peer are one
        slice. Only moves bytes; T = 0 and R = 0 are ordinary. Not differentiable.

    Examples:
        >>> x, weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5], [0.25]])
        >>> routing = ops.route(torch.tensor([[1], [0]]), 2)
        >>> ops.pack(x, weights, routing.slot_of, 1).tolist()  # in fp32 the bits are the weight
        [[3.0, 4.0, 0.25], [1.0, 2.0, 0.5]]
    """
    _derivatives.refuse_gradients("pack", _BITS, x, weights)
    x = x.contiguous()
    if weights is not None:
        weights = weights.to(_spec.wide(x.dtype)).contiguous()
    return _pack(x, weights, slot_of, top_k)


@op(None)
def regroup(message: Tensor, counts: Tensor, width: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """What arrived from all peers, by local expert.

    Args:
        message: [R', H + w], the peers' rows one after the other, each peer's by local expert.
        counts: [P, e] int64, the rows from each peer for each local expert; on the CPU for messages
            on the CPU.
        width: H; the elements behind it are the weight.

    Returns:
        rows [R', H] by expert, then by peer; weights [R'] fp32 (fp64 for fp64), or None where the
        message holds none; offsets [e+1] int64, where each expert's rows begin.

    Raises:
        RuntimeError: a wrong dtype, rank or shape, counts that do not add up to R'; inputs that
            ask for a gradient.

    Notes:
        Stable: the order of a peer's rows stays. Uneven and zero counts are ordinary.

    Examples:
        >>> message = torch.tensor([[1.0], [2.0], [3.0]])  # two rows of peer 0, one of peer 1
        >>> rows, weights, offsets = ops.regroup(message, torch.tensor([[1, 1], [1, 0]]), 1)
        >>> rows.tolist(), weights, offsets.tolist()
        ([[1.0], [3.0], [2.0]], None, [0, 2, 3])
    """
    _derivatives.refuse_gradients("regroup", _BITS, message)
    rows, weights, offsets = _regroup(message.contiguous(), counts, width)
    return rows, None if message.shape[1] == width else weights, offsets


@op(None)
def ungroup(rows: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """The inverse of `regroup`, for the way back.

    Args:
        rows: [R', H] by local expert, then by peer.
        counts: [P, e] int64, as `regroup` took them.
        weights: [R'] or None, travels behind the rows; taken as fp32 (fp64 beside fp64 rows).

    Returns:
        message [R', H + w] by peer, then by expert.

    Raises:
        RuntimeError: a wrong dtype, rank or shape, counts that do not add up to R'; inputs that
            ask for a gradient.

    Examples:
        >>> rows = torch.tensor([[1.0], [3.0], [2.0]])
        >>> ops.ungroup(rows, torch.tensor([[1, 1], [1, 0]])).tolist()
        [[1.0], [2.0], [3.0]]
    """
    _derivatives.refuse_gradients("ungroup", _BITS, rows, weights)
    rows = rows.contiguous()
    if weights is not None:
        weights = weights.to(_spec.wide(rows.dtype)).contiguous()
    return _ungroup(rows, counts, weights)


def _pack_cases(dtype: torch.dtype) -> Iterator[_spec.Case]:
    for name, ids, _, routing in _spec.routing_cases():
        x = _spec.randn(dtype, ids.shape[0], 7)
        weights = _spec.randn(_spec.wide(dtype), *ids.shape, seed=1)
        inputs = {"x": x, "weights": weights, "slot_of": routing.slot_of, "top_k": ids.shape[1]}
        yield _spec.Case(name, inputs, compile=name == "ordinary")
        yield _spec.Case(f"{name}-no_weights", {**inputs, "weights": None})


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
    weights = _spec.randn(_spec.wide(dtype), rows, 1, seed=1) if weighted else None
    return reference.pack(_spec.randn(dtype, rows, width), weights, slots, 1)


def _regroup_cases(dtype: torch.dtype) -> Iterator[_spec.Case]:
    for name, counts in _counts_cases():
        for weighted in (True, False):
            message = _message(dtype, counts, 6, weighted)
            inputs = {"message": message, "counts": counts, "width": 6}
            label = name if weighted else f"{name}-no_weights"
            yield _spec.Case(label, inputs, compile=name == "ordinary")


def _ungroup_cases(dtype: torch.dtype) -> Iterator[_spec.Case]:
    for name, counts in _counts_cases():
        rows = int(counts.sum())
        inputs = {"rows": _spec.randn(dtype, rows, 5), "counts": counts}
        yield _spec.Case(f"{name}-no_weights", inputs)
        weights = _spec.randn(_spec.wide(dtype), rows, seed=1)
        yield _spec.Case(name, {**inputs, "weights": weights}, compile=name == "ordinary")


def _pack_large(dtype: torch.dtype) -> dict:
    routing = _spec.large_routing()
    x = _spec.randn(dtype, routing.row_of.shape[0], 130)
    weights = _spec.randn(_spec.wide(dtype), *routing.row_of.shape, seed=1)
    return {"x": x, "weights": weights, "slot_of": routing.slot_of, "top_k": weights.shape[1]}


def _regroup_large(dtype: torch.dtype) -> dict:
    counts = torch.arange(32).view(8, 4) * 8
    return {"message": _message(dtype, counts, 130, True), "counts": counts, "width": 130}


def _ungroup_large(dtype: torch.dtype) -> dict:
    counts = torch.arange(32).view(8, 4) * 8
    return {"rows": _spec.randn(dtype, int(counts.sum()), 130), "counts": counts}


def _pack_sized(tokens: int) -> dict:
    x, weights = _spec.randn(torch.float32, tokens, 12), _spec.randn(torch.float32, tokens, 2)
    return {"x": x, "weights": weights, "slot_of": _spec.routed(tokens).slot_of, "top_k": 2}


def _even_counts(tokens: int) -> Tensor:
    return torch.full((2, 3), tokens)


def _regroup_sized(tokens: int) -> dict:
    counts = _even_counts(tokens)
    return {"message": _message(torch.float32, counts, 12, True), "counts": counts, "width": 12}


def _ungroup_sized(tokens: int) -> dict:
    return {"rows": _spec.randn(torch.float32, 6 * tokens, 12), "counts": _even_counts(tokens)}


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
    _spec.register(
        _spec.OpSpec(
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
