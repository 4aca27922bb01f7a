"""all_to_all: packs the rows that ranks exchange, and regroups what arrives by local expert.

The collective itself is `parallel/expert.py`'s; these only move bytes and refuse inputs that ask
for gradients (`parallel` builds the autograd function around pack, exchange and regroup). A message
is a matrix of x's dtype: each row's H elements and, behind them, the bits of its routing weight
(fp32, or fp64 beside fp64 rows) in w elements: 1 for fp32 and fp64, 2 for bf16 and fp16, and 0
without weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels.ops import _derivatives
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op, wide

__all__ = ["pack", "regroup", "ungroup"]

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
        message.new_empty(weighted, dtype=wide(message.dtype)),
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
        weights = weights.to(wide(x.dtype)).contiguous()
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
        weights = weights.to(wide(rows.dtype)).contiguous()
    return _ungroup(rows, counts, weights)
