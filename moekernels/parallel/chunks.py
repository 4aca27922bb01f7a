"""An exchange in parts: while one part's experts compute, another's rows travel.

    posted = post(x, weights, plan, parts)           # rows of all parts are on their way
    for part in parts:
        rows, row_weights, offsets = arrive(posted, part)
        tokens.append(give(experts(rows, row_weights, offsets), posted, part))  # and back at once
    y = home(tokens, posted)                         # [T, H], each token's rows summed

A part is a run of every rank's experts. All rows come home to their places before they are summed,
so the bits are those of one exchange. Backward runs through the parts from the last to the first,
with gradients for rows, and computes those of weights under the last way home.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import _deferred, _derivatives
from moekernels.parallel.exchange import Home, Part, PendingBack, PendingOut
from moekernels.parallel.expert import ExchangePlan, by_slot

ONCE = "an exchange in parts; --exchange-parts 1 has it"


class Posted:
    """A layer's exchange under way. `anchor` is an empty tensor that ties its parts together for
    autograd, as the tokens of `give` do."""

    def __init__(self, plan: ExchangePlan, parts: Sequence[Part]) -> None:
        self.plan, self.parts = plan, tuple(parts)
        self.anchor: Tensor | None = None
        self.out: dict[Part, PendingOut] = {}
        self.back: dict[Part, PendingBack] = {}
        self.room: Home | None = None


def _only_once() -> None:
    if _derivatives.needs_plain():
        raise RuntimeError(f"a gradient of a gradient is not computed through {ONCE}")


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, posted: Posted) -> Tensor:
        ctx.posted = posted
        for part in posted.parts:
            posted.out[part] = posted.plan.exchange.post_out(x, weights, posted.plan, part)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _: Tensor):
        _only_once()
        posted, plan = ctx.posted, ctx.posted.plan
        if plan.last:
            _deferred.run()  # weights' gradients, while the last rows come home
        for part in reversed(posted.parts):
            posted.back.pop(part).wait(posted.room)
        drows, dweights = posted.room
        posted.room = None
        dx = ops.combine(drows, plan.row_of, plan.token_of)
        return dx, by_slot(dweights, plan.row_of), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor: Tensor, posted: Posted, part: Part):
        ctx.posted, ctx.part = posted, part
        rows, weights, offsets = posted.out.pop(part).wait()
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(True)
        return rows, weights, offsets

    @staticmethod
    def backward(ctx, drows: Tensor, dweights: Tensor, _):
        _only_once()
        posted, plan = ctx.posted, ctx.posted.plan
        if posted.room is None:
            posted.room = plan.home(drows, dweights)
        posted.back[ctx.part] = plan.exchange.post_back(drows, dweights, plan, ctx.part)
        return drows.new_empty(0), None, None


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, posted: Posted, part: Part) -> Tensor:
        ctx.posted, ctx.part = posted, part
        if posted.room is None:
            posted.room = posted.plan.home(rows, None)
        posted.back[part] = posted.plan.exchange.post_back(rows, None, posted.plan, part)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx, _: Tensor):
        _only_once()
        return ctx.posted.out.pop(ctx.part).wait().rows, None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx, posted: Posted, *tokens: Tensor) -> Tensor:
        ctx.posted, plan = posted, posted.plan
        for part in posted.parts:
            posted.back.pop(part).wait(posted.room)
        room, posted.room = posted.room, None
        assert room is not None  # the first part's `give` made it
        return ops.combine(room.rows, plan.row_of, plan.token_of)

    @staticmethod
    def backward(ctx, dout: Tensor):
        _only_once()
        _deferred.begin()
        posted, plan = ctx.posted, ctx.posted.plan
        for part in reversed(posted.parts):
            posted.out[part] = plan.exchange.post_out(dout, None, plan, part)
        return None, *[dout.new_empty(0) for _ in posted.parts]


def post(x: Tensor, weights: Tensor, plan: ExchangePlan, parts: Sequence[Part]) -> Posted:
    """x [T, H], weights [T, K] to their experts, a part after the other."""
    _derivatives.refuse_transforms("dispatch")
    posted = Posted(plan, parts)
    posted.anchor = _Post.apply(x, weights, posted)
    return posted


def arrive(posted: Posted, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """rows [R', H] of the part's local experts, their weights [R'] and offsets [n+1]."""
    return _Arrive.apply(posted.anchor, posted, part)


def give(rows: Tensor, posted: Posted, part: Part) -> Tensor:
    """Weighted rows [R', H] of the part on their way home; what `home` is to be given of it."""
    return _Give.apply(rows, posted, part)


def home(tokens: Sequence[Tensor], posted: Posted) -> Tensor:
    """[T, H], each token's rows summed."""
    return _Home.apply(posted, *tokens)
