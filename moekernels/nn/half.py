"""The attention's half of a layer in one autograd function: norm, projections, attention, and the
way through tensor-parallel ranks.

On small inputs autograd and Python take longer between the kernels than those: this is what
`Attention` computes of a norm, step by step, from the same kernels. Legend: T tokens, H hidden, hd
head dimension, hq/hk query and key-value heads of this rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekernels import reference
from moekernels.nn.rotary import Packing
from moekernels.ops import _deferred, _dense, _derivatives, _main_grad
from moekernels.ops import attention as op
from moekernels.ops.rms_norm import _rms_norm, _rms_norm_backward
from moekernels.parallel.mesh import Group
from moekernels.parallel.tensor import (
    all_gather,
    all_reduce,
    copy_to,
    gather_tokens,
    reduce_from,
    reduce_scatter,
    scatter_tokens,
)


class Way(NamedTuple):
    """What stands beside the weights. `split`: tokens are split over tp between the halves."""

    packing: Packing
    how: op.How
    eps: float  # of the first norm
    tp: Group
    split: bool
    width: int  # hd

    def gathered(self, x: Tensor) -> Tensor:
        return all_gather(x, self.tp) if self.split else x

    def summed(self, x: Tensor) -> Tensor:
        return reduce_scatter(x, self.tp) if self.split else all_reduce(x, self.tp)


class Weights(NamedTuple):
    """norm [H], qkv [(hq + 2 hk) hd, H], out [H, hq hd], q_norm and k_norm [hd] or None."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, norm, qkv, out, q_norm, k_norm, way: Way, main_grads) -> Tensor:
        normed, _, rstd = _rms_norm(x, None, norm, way.eps)
        whole = way.gathered(normed)
        heads = _dense.product(whole, qkv).unflatten(1, (-1, way.width))
        at = (*way.packing.angles, way.packing.bounds)
        attended, lse = op._attention(heads, *at, q_norm, k_norm, *way.how)
        ctx.save_for_backward(x, norm, qkv, out, q_norm, k_norm, rstd, whole, heads, attended, lse)
        ctx.way, ctx.main_grads = way, main_grads
        return way.summed(_dense.product(attended.flatten(1), out))

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, *weights, rstd, whole, heads, attended, lse = ctx.saved_tensors
        norm, qkv, out, q_norm, k_norm = weights
        way: Way = ctx.way
        inputs = (x, *weights)
        main = _main_grad.reached(ctx, (None, None, *ctx.main_grads, None, None), inputs)
        if _derivatives.needs_plain():
            _derivatives.refuse_transforms("attention between norm and residual")
            return *_plain_backward(ctx, inputs, main, dy), None, None
        dy = way.gathered(dy.contiguous())
        dattended = _dense.dgrad(dy, out).view(attended.shape)
        dout = _wgrad(main[3], attended.flatten(1), dy)
        at = (*way.packing.angles, way.packing.bounds)
        dheads, dweights = op._attention_backward(
            dattended, heads, *at, attended, lse, q_norm, k_norm, *way.how
        )
        dheads = dheads.flatten(1)
        dnormed = way.summed(_dense.dgrad(dheads, qkv))
        dqkv = _wgrad(main[2], whole, dheads)
        dx, dnorm = _rms_norm_backward(dnormed, None, x, norm, rstd)
        dq, dk = (None, None) if q_norm is None else dweights.to(q_norm.dtype).unbind()
        return dx, dnorm, dqkv, dout, dq, dk, None, None


# Without what torch's own does for tensors of `torch.func`, which `fits` keeps away.
_apply = super(torch.autograd.Function, _Half).apply


def _wgrad(main_grad: Tensor | None, x: Tensor, dy: Tensor) -> Tensor | None:
    if main_grad is None:
        return dy.t().mm(x)
    _deferred.later(partial(_dense.add_wgrad, main_grad, x, dy, x.dtype))
    return None


def _plain_backward(ctx, inputs, main, dy: Tensor) -> list[Tensor | None]:
    """All gradients, by functions that are differentiable themselves."""

    def alias(i: int, t: Tensor) -> Tensor:
        main_grad = main[i]
        return t.view_as(t) if main_grad is None else _main_grad.Collect.apply(t, main_grad)

    needed = ctx.needs_input_grad[: len(inputs)]
    return _derivatives.vjp(partial(plain, way=ctx.way), inputs, needed, (dy,), alias)


def plain(x: Tensor, *weights: Any, way: Way) -> Tensor:
    """`half` in plain torch."""
    w = Weights(*weights)
    normed = reference.rms_norm(x, w.norm, way.eps)
    whole = gather_tokens(normed, way.tp) if way.split else copy_to(normed, way.tp)
    heads = F.linear(whole, w.qkv).unflatten(1, (-1, way.width))
    at = (*way.packing.angles, way.packing.bounds)
    attended = op.plain(heads, w.q_norm, w.k_norm, *at, way.how)
    y = F.linear(attended.flatten(1), w.out)
    return scatter_tokens(y, way.tp) if way.split else reduce_from(y, way.tp)


def fits(x: Tensor, weights: Weights) -> bool:
    """Whether this is a step of training, into main gradients, with nothing to cast or trace."""
    projections = (weights.qkv, weights.out)
    return (
        torch.is_grad_enabled()
        and all(_main_grad.main_grad_of(w) is not None for w in projections)
        and all(w is None or w.dtype == x.dtype for w in weights)
        and not torch.compiler.is_compiling()
        and not _derivatives.transformed()
        and not torch.is_autocast_enabled(x.device.type)
    )


def half(x: Tensor, weights: Weights, way: Way) -> Tensor:
    """x [T/tp, H] where tokens are split, else [T, H] -> the same shape, to be added to x."""
    main_grads = weights.qkv.main_grad, weights.out.main_grad  # type: ignore[attr-defined]
    return _apply(x.contiguous(), *weights, way, main_grads)
