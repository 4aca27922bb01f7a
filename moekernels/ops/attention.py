"""attention: rotary positions and causal attention over packed segments, in one, on the CPU.

Private: where tensors are on a GPU torch has this as `varlen_attn`. Legend: T tokens, hq/hk query
and key heads, hd width of a head, rd elements of it that turn.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import _derivatives
from moekernels.ops._library import fake, raw
from moekernels.ops._op import wide

__all__: list[str] = []

_attention = raw._attention.default
_attention_backward = raw._attention_backward.default


class How(NamedTuple):
    heads: int
    kv_heads: int
    scale: float  # of the scores
    eps: float  # of the norms


@fake("_attention")
def _(qkv, cos, sin, bounds, q_weight, k_weight, heads: int, kv_heads: int, scale, eps):
    tokens, _, width = qkv.shape
    lse = qkv.new_empty(heads, tokens, dtype=wide(qkv.dtype))
    return qkv.new_empty(tokens, heads, width), lse


@fake("_attention_backward")
def _(dout, qkv, cos, sin, bounds, out, lse, q_weight, k_weight, heads, kv_heads, scale, eps):
    weights = 0 if q_weight is None else 2
    return torch.empty_like(qkv), qkv.new_empty(weights, qkv.shape[2], dtype=wide(qkv.dtype))


class _Attention(torch.autograd.Function):
    """Keeps what it was given, its result, and one number a query."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, bounds, how: How) -> Tensor:
        out, lse = _attention(qkv, cos, sin, bounds, q_weight, k_weight, *how)
        ctx.save_for_backward(qkv, cos, sin, bounds, out, lse, q_weight, k_weight)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        saved = ctx.saved_tensors
        qkv, cos, sin, bounds, *_, q_weight, k_weight = saved
        none = (None,) * 4
        if _derivatives.needs_plain():
            inputs, needed = (qkv, q_weight, k_weight), ctx.needs_input_grad[:3]
            turned = partial(plain, cos=cos, sin=sin, bounds=bounds, how=ctx.how)
            return *_derivatives.vjp(turned, inputs, needed, (dout,)), *none
        dqkv, dweights = _attention_backward(dout.contiguous(), *saved, *ctx.how)
        if q_weight is None:
            return dqkv, None, None, *none
        return dqkv, *dweights.to(q_weight.dtype).unbind(), *none


def plain(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    bounds: Tensor,
    how: How,
) -> Tensor:
    """`attention` in plain torch."""
    heads, kv_heads, scale, eps = how
    wide_qkv = qkv.to(wide(qkv.dtype))
    half = cos.shape[1]
    q, k, v = wide_qkv.split([heads, kv_heads, kv_heads], dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = reference.rms_norm(q, q_weight, eps), reference.rms_norm(k, k_weight, eps)
    turned = torch.cat([q, k], dim=1)
    a, b, rest = turned.tensor_split([half, 2 * half], dim=-1)
    c, s = cos[:, None], sin[:, None]
    turned = torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1)
    q, k = turned.split([heads, kv_heads], dim=1)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    outputs = []
    sizes = (bounds[1:] - bounds[:-1]).tolist()
    for q1, k1, v1 in zip(*(x.split(sizes) for x in (q, k, v))):
        scores = torch.einsum("qhd,khd->hqk", q1, k1) * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device).triu(1)
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", p, v1))
    return torch.cat(outputs).to(qkv.dtype)


def attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    bounds: Tensor,
    how: How,
) -> Tensor:
    """qkv [T, hq + 2 hk, hd]: queries, keys, values -> [T, hq, hd].

    A token sees itself and what precedes it in its segment of bounds [S+1] int64, which end at T.
    Before, queries and keys are divided by their root mean squares and multiplied by q_weight and
    k_weight [hd], where those are given; and elements i and i + rd/2 of them turn by the angle of
    cos and sin [T, rd/2], fp32 (fp64 for fp64). Computed in fp32 (fp64), rounded once.
    """
    if _derivatives.transformed():
        return plain(qkv, q_weight, k_weight, cos, sin, bounds, how)
    qkv = qkv.contiguous()
    learnt = (qkv, q_weight, k_weight)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learnt):
        return _Attention.apply(*learnt, cos, sin, bounds, how)
    return _attention(qkv, cos, sin, bounds, q_weight, k_weight, *how)[0]
