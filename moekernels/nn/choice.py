"""The experts' half of a layer up to the choice in one autograd function: residual sum, norm,
router, gate.

As `half` has the attention's: what `RMSNorm.behind` and `Router` compute step by step, from the
same kernels. Legend: T tokens, H hidden, E experts, K top-k.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekernels import reference
from moekernels.ops import GateOutput, _deferred, _dense, _derivatives, _main_grad
from moekernels.ops.gate import Gating, _gate, _gate_backward
from moekernels.ops.rms_norm import _rms_norm, _rms_norm_backward


class Chosen(NamedTuple):
    """normed and total [T, H]: of the residual stream with what was added to it."""

    normed: Tensor
    total: Tensor
    gate: GateOutput


class Way(NamedTuple):
    """What stands beside the weights. gating: the fields of `Gating` behind the logits."""

    eps: float
    gating: tuple
    segments: Tensor | None
    valid: Tensor | None


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, added: Tensor, norm: Tensor, router: Tensor, way: Way, main_grad):
        normed, total, rstd = _rms_norm(x, added, norm, way.eps)
        logits = _dense.product(normed, router)
        gate = _gate(logits, *way.gating, way.segments, way.valid)
        ctx.save_for_backward(norm, router, total, rstd, normed, logits, gate[1])
        ctx.way, ctx.main_grad = way, main_grad
        ctx.mark_non_differentiable(gate[1], gate[3])
        ctx.set_materialize_grads(False)
        return normed, total, *gate

    @staticmethod
    def backward(ctx, dnormed, dtotal, dweights, _ids, dscore_sum, _counts, dz_sum):
        norm, router, total, rstd, normed, logits, ids = ctx.saved_tensors
        way: Way = ctx.way
        grads = (dweights, dscore_sum, dz_sum)
        main_grads = (None, None, None, ctx.main_grad)
        main = _main_grad.reached(ctx, main_grads, (total, total, norm, router))[3]
        chosen = any(g is not None for g in grads)
        if dnormed is None and not chosen:
            return dtotal, dtotal, None, None, None, None
        if _derivatives.needs_plain():
            dx, dnorm, drouter = _plain_backward(ctx, main, (dnormed, dtotal, *grads))
            return dx, dx, dnorm, drouter, None, None
        drouter = None
        if chosen:
            weighing = Gating(logits, *way.gating)
            scoring = weighing.score, weighing.renormalize, weighing.scale
            whole = [None if g is None else g.contiguous() for g in grads]
            dlogits = _gate_backward(logits, ids, *whole, *scoring, way.segments)
            through = _dense.dgrad(dlogits, router)
            dnormed = through if dnormed is None else through.add_(dnormed)
            if main is None:
                drouter = dlogits.t().mm(normed)
            else:
                _deferred.later(partial(_dense.add_wgrad, main, normed, dlogits, router.dtype))
        dtotal = None if dtotal is None else dtotal.contiguous()
        dx, dnorm = _rms_norm_backward(dnormed.contiguous(), dtotal, total, norm, rstd)
        return dx, dx, dnorm, drouter, None, None


# Without what torch's own does for tensors of `torch.func`, which `fits` keeps away.
_apply = super(torch.autograd.Function, _Choice).apply


def _plain_backward(ctx, main: Tensor | None, grads: tuple) -> list[Tensor | None]:
    """The gradients for total, norm and router, by functions that are differentiable themselves."""
    norm, router, total, *_, ids = ctx.saved_tensors
    gating = Gating(total, *ctx.way.gating)

    def steps(total: Tensor, norm: Tensor, router: Tensor) -> tuple[Tensor, ...]:
        normed = reference.rms_norm(total, norm, ctx.way.eps)
        how = gating.score, gating.renormalize, gating.scale, ctx.way.segments
        sums = reference.gate_sums(F.linear(normed, router), ids, *how)
        return normed, total.view_as(total), *sums

    def alias(i: int, t: Tensor) -> Tensor:
        return t.view_as(t) if i < 2 or main is None else _main_grad.Collect.apply(t, main)

    needed = any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4]
    return _derivatives.vjp(steps, (total, norm, router), needed, grads, alias)


def fits(x: Tensor, norm: Tensor, router: Tensor) -> bool:
    """Whether this is a step of training on the CPU, into a main gradient, with nothing to cast or
    trace."""
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and x.dtype == norm.dtype == router.dtype
        and torch.is_grad_enabled()
        and _main_grad.main_grad_of(router) is not None
        and not torch.compiler.is_compiling()
        and not _derivatives.transformed()
        and not torch.is_autocast_enabled("cpu")
    )


def choose(x: Tensor, added: Tensor, norm: Tensor, router: Tensor, way: Way) -> Chosen:
    """x, added [T, H], norm [H], router [E, H] -> what the experts read, the new residual stream,
    and who is chosen."""
    main_grad = router.main_grad  # type: ignore[attr-defined]  # `fits` has asked
    normed, total, *gate = _apply(x.contiguous(), added.contiguous(), norm, router, way, main_grad)
    return Chosen(normed, total, GateOutput(*gate))
