"""A layer's experts between the two ways of an exchange, in one function: the first product reads
rows while they come, the last brings its results home (`ops/_exchange_experts.py`), and backward
the same; the weights' gradients are computed while x's is on its way.

What it computes is `combine(experts(dispatch(x, weights, plan)), plan)`, to the bit.

Legend: T tokens, H hidden, K top-k, F expert hidden, e local experts, R' rows that come.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import _derivatives, _main_grad
from moekernels.ops import _exchange_experts as products
from moekernels.ops._ffn import (
    Ffn,
    Learnt,
    dbias_or_accumulate,
    tf32,
    wgrad_or_accumulate,
)
from moekernels.ops._main_grad import main_grad_of
from moekernels.parallel import expert
from moekernels.parallel.device_exchange import DeviceExchange

_STYLE = ("activation", "alpha", "limit", "interleaved", "transposed")
_DEFAULTS = {"activation": "swiglu", "alpha": 1.702, "limit": 7.0}
_DEFAULTS |= {"interleaved": False, "transposed": False}


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weights: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        plan: expert.ExchangePlan,
        how: dict[str, Any],
        main_grads: list[Tensor | None],
    ) -> Tensor:
        exchange = plan.exchange
        assert isinstance(exchange, DeviceExchange)
        style = [how[key] for key in _STYLE]
        offsets = x.new_empty(0)  # the pending exchange knows them
        empty = Ffn._make((x[:0], None, w1, w2, offsets, None, b1, b2, *style, tf32(x)))
        ffn, h, a = exchange.post_beside(x, weights, plan).up(empty, not how["recompute"])
        pending = exchange.results(partial(products.down, ffn, a), plan, x, False)
        del a
        ctx.save_for_backward(x, weights, *ffn[:8], h)
        ctx.plan, ctx.how, ctx.main_grads = plan, how, main_grads
        return ops.combine(pending.wait().rows, plan.row_of, plan.token_of)

    @staticmethod
    def backward(ctx, dout: Tensor):
        x, weights, *tensors, h = ctx.saved_tensors
        ffn = Ffn._make((*tensors, *(ctx.how[key] for key in _STYLE), tf32(x)))
        need = Learnt(*ctx.needs_input_grad[:6])
        inputs = (x, weights, ffn.w1, ffn.w2, ffn.b1, ffn.b2)
        main = Learnt(*_main_grad.reached(ctx, (None, None, *ctx.main_grads), inputs))
        if _derivatives.needs_plain():
            found = _plain_backward(ctx, inputs, need, dout)
            grads = Learnt(*map(_main_grad.add, main, found))
        else:
            grads = _backward(ctx.plan, ffn, h, dout, need, main)
        return *grads, None, None, None


def _backward(
    plan: expert.ExchangePlan, ffn: Ffn, h: Tensor, dout: Tensor, need: Learnt, main: Learnt
) -> Learnt:
    exchange, offsets, transposed = plan.exchange, ffn.offsets, ffn.transposed
    assert isinstance(exchange, DeviceExchange)
    dy, dh, weighted_a, dweights = exchange.post_beside(dout, None, plan).dact(ffn, h, need.w2)
    # All ranks send what they have, whatever each needs.
    home = partial(products.product, dh, ffn.w1, offsets, not transposed, ffn.tf32, dweights)
    pending = exchange.results(home, plan, dy, True)
    dw1 = dw2 = db1 = db2 = None
    if need.b2:
        db2 = dbias_or_accumulate(main.b2, dy, ffn.weights, offsets, None, 0)
    if need.w2:
        dw2 = wgrad_or_accumulate(main.w2, weighted_a, dy, offsets, transposed)
    if need.w1:
        dw1 = wgrad_or_accumulate(main.w1, ffn.x, dh, offsets, transposed)
    if need.b1:
        db1 = dbias_or_accumulate(main.b1, dh, None, offsets, None, 0)
    rows, row_weights = pending.wait()
    assert row_weights is not None  # sent beside the rows
    dx = ops.combine(rows, plan.row_of, plan.token_of) if need.x else None
    dx_weights = expert.by_slot(row_weights, plan.row_of) if need.weights else None
    return Learnt(dx, dx_weights, dw1, dw2, db1, db2)


def _plain_backward(ctx, inputs: tuple, need: Learnt, dout: Tensor) -> list[Tensor | None]:
    """All gradients, by functions that are differentiable themselves."""

    def steps(x, weights, w1, w2, b1, b2) -> Tensor:
        rows, row_weights, offsets = expert.dispatch(x, weights, ctx.plan)
        y = ops.experts(rows, row_weights, w1, w2, offsets, b1=b1, b2=b2, **ctx.how)
        return expert.combine(y, ctx.plan)

    def alias(i: int, t: Tensor) -> Tensor:
        main_grad = (None, None, *ctx.main_grads)[i]
        return t.view_as(t) if main_grad is None else _main_grad.Collect.apply(t, main_grad)

    return _derivatives.vjp(steps, inputs, need, (dout,), alias)


def experts(
    x: Tensor,
    weights: Tensor,
    plan: expert.ExchangePlan,
    w1: Tensor,
    w2: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    recompute: bool = False,
    **style: Any,
) -> Tensor:
    """x [T, H], weights [T, K] -> [T, H], the sum of each token's experts over a plan of a
    `DeviceExchange`; w1, w2, b1, b2 of the local experts, `recompute` and `style` (activation,
    alpha, limit, interleaved, transposed) as `ops.experts` takes them.

    All ranks of the group call it together. Deterministic, and whatever the order in which rows
    come.
    """
    _derivatives.refuse_transforms("experts over an exchange")
    main_grads = [main_grad_of(p) for p in (w1, w2, b1, b2)]
    how = {**_DEFAULTS, **style, "recompute": recompute or not torch.is_grad_enabled()}
    weights = weights if x.dtype == torch.float64 else weights.float()
    return _Straight.apply(x, weights, w1, w2, b1, b2, plan, how, main_grads)
