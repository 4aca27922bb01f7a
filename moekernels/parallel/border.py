"""Between nodes one copy of a token a node: the first half of an exchange in two levels.

    x, weights, ids, plan = cross(x, weights, ids, ...)   # every token comes to the nodes it chose
    y = whatever the node makes of them                   # [T', H], its own experts' rows summed
    y = expert.combine(y, plan)                           # [T, H], summed node by node

A copy travels between ranks in the same place of their nodes (a rail), with the token's choices on
that node and their weights behind it, bit for bit, in elements of the row's dtype.

Legend: T tokens, T' copies that come, H hidden, K top-k, N nodes, R copies that leave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import _deferred, _derivatives
from moekernels.parallel.exchange import wide
from moekernels.parallel.expert import ExchangePlan, Kept, _differentiable, _kept
from moekernels.parallel.mesh import Group


def plan_crossing(
    ids: Tensor, experts: int, rail: Group, kept: Kept | None = None, layer: int = 0
) -> ExchangePlan:
    """ids [T, K] of experts, `experts` on each node, -1 for none: a copy of a token to each node
    that holds one of its choices. As `ExchangePlan.make`, with nodes for experts."""
    nowhere = rail.size
    node = torch.where(ids < 0, nowhere, ids.long() // experts)
    met = torch.zeros(ids.shape[0], nowhere + 1, dtype=torch.bool, device=ids.device)
    met = met.scatter_(1, node, True)[:, :nowhere]
    nodes = torch.arange(nowhere, dtype=torch.int32, device=ids.device)
    return ExchangePlan.make(torch.where(met, nodes, -1), 1, rail, kept, layer)


def _as(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of a part in elements of a dtype. A copy: what has one row or none counts as
    contiguous wherever it lies."""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def _beside(x: Tensor, *parts: Tensor) -> Tensor:
    """x [T, H] and the bits of parts [T, K] as one matrix of x's dtype."""
    return torch.cat([x, *(_as(part, x.dtype) for part in parts)], dim=1)


def _apart(message: Tensor, width: int, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    """The inverse: x [T, width], then a part of each dtype, of equal sizes."""
    x, bits = message[:, :width].contiguous(), message[:, width:]
    parts = bits.chunk(len(dtypes), dim=1)
    return x, *(_as(part, dtype) for part, dtype in zip(parts, dtypes))


def _numbers(dtype: torch.dtype) -> torch.dtype:
    """Of ids that are as wide as the weights beside rows of a dtype."""
    return torch.int64 if dtype == torch.float64 else torch.int32


def _send(plan: ExchangePlan, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """x [T, H] and parts [T, K] of every peer's copies, [T', H] and [T', K] each."""
    rows = plan.exchange.post_out(_beside(x, *parts), None, plan).wait().rows
    return _apart(rows, x.shape[1], *(part.dtype for part in parts))


def _out(x: Tensor, weights: Tensor, plan: ExchangePlan) -> tuple[Tensor, Tensor]:
    x2, weights2 = _send(plan, x, weights.to(wide(x.dtype)))
    return x2, weights2


def _back(dx: Tensor, dweights: Tensor, plan: ExchangePlan) -> tuple[Tensor, Tensor]:
    """Its transpose: sums over a token's copies [T, H], node by node, and [T, K]."""
    message = _beside(dx, dweights.to(wide(dx.dtype)))
    pending = plan.exchange.post_back(message, None, plan)
    _deferred.run()
    rows, weights = _apart(pending.wait().rows, dx.shape[1], wide(dx.dtype))
    sums = [ops.combine(part, plan.row_of, plan.token_of) for part in (rows, weights)]
    return sums[0], sums[1]


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weights: Tensor, ids: Tensor, plan: ExchangePlan, kept: Kept | None
    ):
        ctx.plan = plan
        ctx.set_materialize_grads(True)

        def arrive() -> tuple[Tensor, ...]:
            return _send(plan, x, weights.to(wide(x.dtype)), ids.to(_numbers(x.dtype)))

        x2, weights2, ids2 = _kept(kept, arrive)
        ctx.mark_non_differentiable(ids2)
        return x2, weights2, ids2

    @staticmethod
    def backward(ctx, dx: Tensor, dweights: Tensor, _):
        if _differentiable("dispatch"):
            return *_Linear.apply(dx, dweights, ctx.plan, True), None, None, None
        return *_back(dx, dweights, ctx.plan), None, None, None


class _Linear(torch.autograd.Function):
    """The backward of `cross`, or without `back` its backward: each is the other's transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, plan: ExchangePlan, back: bool):
        ctx.plan, ctx.back = plan, back
        ctx.set_materialize_grads(True)
        return (_back if back else _out)(x, weights, plan)

    @staticmethod
    def backward(ctx, dx: Tensor, dweights: Tensor):
        if _differentiable("dispatch"):
            return *_Linear.apply(dx, dweights, ctx.plan, not ctx.back), None, None
        return *(_out if ctx.back else _back)(dx, dweights, ctx.plan), None, None


def cross(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: int,
    rail: Group,
    kept: Kept | None = None,
    layer: int = 0,
) -> tuple[Tensor, Tensor, Tensor, ExchangePlan]:
    """x [T, H], weights and ids [T, K] -> the copies that come to this rank [T', H], their weights
    and choices [T', K], numbered from the node's first expert and -1 for those of other nodes; and
    by what they go home. `experts` lie on each node, in the order of the rail."""
    _derivatives.refuse_transforms("dispatch")
    plan = plan_crossing(ids, experts, rail, kept, layer)
    x2, weights2, ids2 = _Cross.apply(x, weights, ids, plan, kept)
    local = ids2 - rail.rank * experts
    here = (ids2 >= 0) & (local >= 0) & (local < experts)
    return x2, weights2, torch.where(here, local, -1), plan
