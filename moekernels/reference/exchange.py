"""The exchange in plain torch: what ranks pack, what each takes in, and the order of its rows.

Legend: T tokens, H hidden, K top-k, R routed rows, P peers, e local experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _weight_elements(dtype: torch.dtype) -> int:
    """How many elements of `dtype` hold one routing weight (fp32, or fp64 beside fp64 rows)."""
    return {torch.float64: 1, torch.float32: 1}.get(dtype, 2)


def pack(x: Tensor, weights: Tensor | None, slot_of: Tensor, top_k: int) -> Tensor:
    """x [T, H], weights [T, K] -> message [R, H + w]: rows in routing order, the bits of each
    row's weight behind it."""
    used = (slot_of >= 0)[:, None]
    slot = slot_of.clamp_min(0).long()
    rows = (
        torch.where(used, x[slot // max(top_k, 1)], 0)
        if len(x)
        else x.new_zeros(len(slot), x.shape[1])
    )
    if weights is None:
        return rows
    flat = weights.to(torch.promote_types(torch.float32, x.dtype)).reshape(-1, 1)
    picked = torch.where(used, flat[slot], 0) if len(flat) else flat.new_zeros(len(slot), 1)
    return torch.cat([rows, picked.contiguous().view(x.dtype)], dim=1)


def exchange(
    messages: list[Tensor], counts: list[Tensor], width: int
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """What every rank takes in, as `regroup` says it: messages[p] [R, H + w] of rank p in routing
    order, counts[p] [P, e] of its rows for each expert of each rank (those behind are unused)."""
    arrived = []
    for rank in range(len(messages)):
        parts = [m[: c.sum()].split(c.sum(1).tolist())[rank] for m, c in zip(messages, counts)]
        arrived.append(regroup(torch.cat(parts), torch.stack([c[rank] for c in counts]), width))
    return arrived


def _local_order(counts: Tensor) -> Tensor:
    """counts [P, e] -> [R'] the source-major row of each row in expert-major order."""
    begins = counts.flatten().cumsum(0).sub(counts.flatten()).view_as(counts)
    ends = begins + counts
    order = [
        torch.arange(int(begins[p, e]), int(ends[p, e]))
        for e in range(counts.shape[1])
        for p in range(counts.shape[0])
    ]
    return torch.cat(order) if order else torch.empty(0, dtype=torch.int64)


def regroup(message: Tensor, counts: Tensor, width: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """message [R', H + w] by source, then expert; counts [P, e] -> rows [R', H] by expert,
    weights [R'], offsets [e+1]."""
    order = _local_order(counts.cpu()).to(message.device)
    rows = message[order]
    offsets = F.pad(counts.sum(0).cumsum(0), (1, 0)).to(message.device)
    if width == message.shape[1]:
        return rows, None, offsets
    wide = torch.promote_types(torch.float32, message.dtype)
    weights = rows[:, width:].clone(memory_format=torch.contiguous_format).view(wide).reshape(-1)
    return rows[:, :width].contiguous(), weights, offsets


def ungroup(rows: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """The inverse of `regroup`: rows [R', H] (and weights [R']) by expert -> message [R', H + w]
    by source."""
    order = _local_order(counts.cpu()).to(rows.device)
    if weights is not None:
        wide = weights.to(torch.promote_types(torch.float32, rows.dtype)).reshape(-1, 1)
        rows = torch.cat([rows, wide.view(rows.dtype)], dim=1)
    message = torch.empty_like(rows)
    message[order] = rows
    return message
