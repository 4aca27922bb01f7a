"""Causal attention with a window, or with sinks that take a part of it.

A sink is a key of its own score whose value is nothing. The scores are made again in the backward
from what is kept of a token (its output and log-sum-exp), one run of equal sequences at a time.
Legend: T tokens, S sequences of n tokens each, hq/hk query and key-value heads, hd, hv widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from moekernels.ops import _derivatives

Runs = list[tuple[int, int]]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, runs: Runs, window: int, scale: float
) -> Tensor:
    """q [T, hq, hd], k [T, hk, hd], v [T, hk, hv], sinks [hq] -> [T, hq, hv]; a token sees itself
    and the window - 1 before it in its sequence (window 0: all of them)."""
    if _derivatives.transformed():
        return _plain(q, k, v, sinks, runs=runs, window=window, scale=scale)
    return _Masked.apply(q, k, v, sinks, runs, window, scale)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, runs, window, scale):
        outputs, normalisers = [], []
        for q1, k1, v1 in _split(runs, q, k, v):
            out, lse = _attend(q1, k1, v1, sinks, window, scale)
            outputs.append(out)
            normalisers.append(lse)
        out = _joined(outputs).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, *normalisers)
        ctx.how = runs, window, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, sinks, out, *normalisers = ctx.saved_tensors
        runs, window, scale = ctx.how
        if _derivatives.needs_plain():
            plain = partial(_plain, runs=runs, window=window, scale=scale)
            needed = ctx.needs_input_grad[:4]
            found = _derivatives.vjp(plain, (q, k, v, sinks), needed, (grad,))
            return *found, None, None, None
        parts, dsinks = [], None
        for lse, (q1, k1, v1, g1, o1) in zip(normalisers, _split(runs, q, k, v, grad, out)):
            p = _scores(q1, k1, window, scale).sub_(lse).exp_()
            g1 = _grouped(g1, k1.shape[1])
            delta = (g1 * _grouped(o1, k1.shape[1])).sum(-1, keepdim=True)
            dv = (p.mT @ g1).sum(2)
            ds = (g1 @ v1[:, :, None].mT).sub_(delta).mul_(p).mul_(scale)
            dq = ds @ k1[:, :, None]
            dk = (ds.mT @ _grouped(q1, k1.shape[1])).sum(2)
            parts.append((dq.flatten(1, 2), dk, dv))
            del p, ds  # before the next run's
            if sinks is not None:
                taken = (sinks.view(1, *delta.shape[1:3], 1, 1) - lse).exp()
                one = -(taken * delta).sum((0, 3, 4)).flatten()
                dsinks = one if dsinks is None else dsinks + one
        grads = [_joined(each).to(x.dtype) for each, x in zip(zip(*parts), (q, k, v))]
        return *grads, None if dsinks is None else dsinks.to(sinks.dtype), None, None, None


def _split(runs: Runs, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Each run's tensors [S, heads, n, width], in fp32 at least."""
    sizes = [segments * tokens for segments, tokens in runs]
    for (segments, tokens), *parts in zip(runs, *(x.split(sizes) for x in tensors)):
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        yield [p.unflatten(0, (segments, tokens)).transpose(1, 2).to(wide) for p in parts]


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in parts])


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[S, hq, n, w] -> [S, hk, hq/hk, n, w]."""
    return x.unflatten(1, (kv_heads, -1))


def _scores(q: Tensor, k: Tensor, window: int, scale: float) -> Tensor:
    """q [S, hq, n, hd], k [S, hk, m, hd] -> [S, hk, hq/hk, n, m], the queries the last of the m
    tokens; minus infinity where one is not seen."""
    scores = (_grouped(q, k.shape[1]) * scale) @ k[:, :, None].mT
    n, m = scores.shape[-2:]
    back = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
    hidden = back < 0
    if window:
        hidden |= back >= window
    return scores.masked_fill_(hidden, -torch.inf)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [S, hq, n, hv], log-sum-exp [S, hk, hq/hk, n, 1])."""
    scores = _scores(q, k, window, scale)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, *lse.shape[1:3], 1, 1))
    return ((scores - lse).exp_() @ v[:, :, None]).flatten(1, 2), lse


def _plain(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, runs: Runs, window: int, scale: float
) -> Tensor:
    """The same, for derivatives of any kind."""
    each = _split(runs, q, k, v)
    parts = [_attend(q1, k1, v1, sinks, window, scale)[0] for q1, k1, v1 in each]
    return _joined(parts).to(q.dtype)


def attend_last(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int, scale: float
) -> Tensor:
    """q [n, hq, hd] of the last n of m tokens, k [m, hk, hd], v [m, hk, hv] -> [n, hq, hv]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q1, k1, v1 = (x[None].transpose(1, 2).to(wide) for x in (q, k, v))
    return _joined([_attend(q1, k1, v1, sinks, window, scale)[0]]).to(q.dtype)
