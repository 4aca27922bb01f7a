"""route: a stable order of the choices by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op, wide
from moekernels.reference import Routing

__all__ = ["Routing", "route"]

_route = raw._route.default
_DROP = ("position", "weight")


@fake("_route")
def _(ids: Tensor, num_experts: int, weights: Tensor | None, capacity: int, alignment: int):
    tokens, top_k = ids.shape
    rows = tokens * top_k + num_experts * (alignment - 1)
    return (
        ids.new_empty(num_experts, dtype=torch.int64),
        ids.new_empty(num_experts + 1, dtype=torch.int64),
        ids.new_empty(tokens, top_k, dtype=torch.int32),
        ids.new_empty(rows, dtype=torch.int32),
        ids.new_empty(rows, dtype=torch.int32),
    )


@op(reference.route)
def route(
    ids: Tensor,
    num_experts: int,
    *,
    weights: Tensor | None = None,
    capacity: int | None = None,
    drop: str = "position",
    alignment: int = 1,
) -> Routing:
    """Orders the T*K choices by expert, and by token and k within an expert.

        row_of[t, k] = offsets[ids[t, k]] + (how many earlier choices went to the same expert)

    Args:
        ids: [T, K] int32 or int64, the experts of each token; ids outside [0, E) are dropped.
        num_experts: E.
        weights: [T, K] routing weights, needed for `drop="weight"`.
        capacity: most rows an expert takes; the choices over it are dropped. None: no limit.
        drop: "position" drops the last ones, "weight" the lightest (where weights tie, the later).
        alignment: every expert's rows begin at a multiple of it; the gaps are unused rows.

    Returns:
        Routing(counts, offsets, row_of, token_of, slot_of):
        counts [E] int64, the rows that each expert keeps;
        offsets [E+1] int64, where its rows begin: offsets[e+1] - offsets[e] is counts[e] rounded up
        to `alignment`; row_of [T, K] int32, -1 where dropped; token_of [R] and slot_of [R] int32,
        the t and t*K + k of each row, -1 for unused rows. R = T*K + E*(alignment-1), the most rows
        there can be: no size depends on the data, so nothing waits for the device.

    Raises:
        RuntimeError: a wrong dtype, rank or shape, or T*K past int32.
        ValueError: an unknown `drop`, "weight" without weights, a negative capacity.

    Notes:
        A stable counting sort: exact, and the same for any number of threads. Not differentiable.

    Examples:
        >>> routing = ops.route(torch.tensor([[1, 0], [1, 2], [0, 1]]), 3)
        >>> routing.counts.tolist(), routing.offsets.tolist()
        ([2, 3, 1], [0, 2, 5, 6])
        >>> routing.token_of.tolist()  # of rows in expert order
        [0, 2, 0, 1, 2, 1]
        >>> routing.row_of.tolist()
        [[2, 0], [3, 5], [1, 4]]
    """
    if drop not in _DROP:
        raise ValueError(f"route: drop must be position|weight, got {drop!r}")
    if capacity is None:
        capacity, weights = -1, None
    elif capacity < 0:
        raise ValueError(f"route: capacity must be at least 0, got {capacity}")
    elif drop == "position":
        weights = None
    elif weights is None:
        raise ValueError('route: drop="weight" needs weights')
    else:
        weights = weights.detach().to(wide(weights.dtype)).contiguous()
    return Routing(*_route(ids.contiguous(), num_experts, weights, capacity, alignment))
