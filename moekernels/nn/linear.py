"""A product with a weight whose gradient can be put off. Legend: T tokens, I inputs, O outputs."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moekernels.ops import _deferred, _dense, _derivatives, _main_grad


class _Linear(torch.autograd.Function):
    """`F.linear` that hands the gradient of a parameter to its `main_grad`, now or later."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor) -> Tensor:
        wide = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, None if wide is weight else wide)
        ctx.main_grad = main_grad
        y = _dense.product(x, wide)
        return y if bias is None else y.add_(bias.to(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, wide = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        differentiable = _derivatives.needs_plain()
        if wide is None or differentiable:
            wide = weight.to(x.dtype)
        _, main_grad = _main_grad.reached(ctx, (None, ctx.main_grad), (x, weight))
        dx = None if not need_x else dy.mm(wide) if differentiable else _dense.dgrad(dy, wide)
        dbias = dy.sum(0).to(weight.dtype) if need_bias else None
        dweight = None
        if need_weight and main_grad is not None and not differentiable:
            _deferred.later(partial(_dense.add_wgrad, main_grad, x, dy, weight.dtype))
        elif need_weight:
            dweight = _main_grad.add(main_grad, dy.t().mm(x).to(weight.dtype))
        return dx, dweight, dbias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, I], weight [O, I], bias [O] -> [T, O] in x's dtype, to which both are cast.

    A backward that reaches a parameter `weight` with a `main_grad` adds its gradient to that, or
    has it put off (`ops._deferred`), and returns none; the bias's gradient is never put off.
    """
    main_grad = _main_grad.main_grad_of(weight)
    if (
        main_grad is None
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or _derivatives.transformed()
        or torch.is_autocast_enabled(x.device.type)
    ):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return _Linear.apply(x, weight, bias, main_grad)
