"""gate: from router logits to weights, ids, and the sums of the auxiliary losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import _derivatives
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op, wide
from moekernels.reference import GateOutput

__all__ = ["GateOutput", "gate", "load_balancing_loss"]

_gate = raw._gate.default
_gate_backward = raw._gate_backward.default
load_balancing_loss = op(reference.load_balancing_loss)(reference.load_balancing_loss)


class Gating(NamedTuple):
    """Logits, and how experts are chosen by them: the first arguments of `_gate`, in its order."""

    logits: Tensor
    top_k: int
    score: str
    bias: Tensor | None
    num_groups: int
    groups_kept: int
    group_score: str
    renormalize: bool
    scale: float


@fake("_gate", bundle=Gating)
def _(gating: Gating, segments: Tensor | None, valid: Tensor | None):
    logits, top_k = gating.logits, gating.top_k
    tokens, experts = logits.shape
    sums = wide(logits.dtype)
    parts = 1 if segments is None else segments.shape[0] - 1
    return (
        logits.new_empty(tokens, top_k, dtype=sums),
        logits.new_empty(tokens, top_k, dtype=torch.int32),
        logits.new_empty(parts, experts, dtype=sums),
        logits.new_empty(parts, experts, dtype=torch.int64),
        logits.new_empty(parts, dtype=sums),
    )


@fake("_gate_backward")
def _(
    logits: Tensor,
    ids: Tensor,
    dweights: Tensor | None,
    dscore_sum: Tensor | None,
    dz_sum: Tensor | None,
    score: str,
    renormalize: bool,
    scale: float,
    segments: Tensor | None,
):
    return torch.empty_like(logits)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, how, segments, valid):
        gating = Gating(logits, *how)
        out = _gate(*gating, segments, valid)
        ctx.save_for_backward(logits, out[1], segments)
        ctx.weighing = (gating.score, gating.renormalize, gating.scale)
        ctx.mark_non_differentiable(out[1], out[3])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, dweights, dids, dscore_sum, dcounts, dz_sum):
        logits, ids, segments = ctx.saved_tensors
        grads = (dweights, dscore_sum, dz_sum)
        if _derivatives.needs_plain():
            score, renormalize, scale = ctx.weighing
            (dlogits,) = _derivatives.vjp(
                lambda x: reference.gate_sums(x, ids, score, renormalize, scale, segments),
                (logits,),
                (True,),
                grads,
            )
        else:
            whole = [None if g is None else g.contiguous() for g in grads]
            dlogits = _gate_backward(logits, ids, *whole, *ctx.weighing, segments)
        return dlogits, None, None, None


@op(reference.gate)
def gate(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    num_groups: int = 1,
    groups_kept: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    scale: float = 1.0,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> GateOutput:
    """Chooses the experts of each token, weighs them, and sums what the auxiliary losses need.

        s = score(logits);  ids = the top_k of s + bias within the groups kept
        weights = scale * s[ids] (/ their sum, if `renormalize`)

    Args:
        logits: [T, E] fp32, bf16, fp16 or fp64; computed in fp32 (fp64 for fp64).
        top_k: K, in [1, E].
        score: "softmax"; "softmax_topk", the softmax over the chosen logits only; "sigmoid";
            "sqrtsoftplus", sqrt(log(1 + exp(logits))).
        bias: [E], added to the scores for the choice only (aux-loss-free balancing).
        num_groups: into how many equal groups the experts are divided.
        groups_kept: of which only so many, the best, are chosen from.
        group_score: a group ranks by its best choice score ("max") or by its two best ("sum2").
        renormalize: divide a token's weights by their sum.
        scale: factor on the weights, after `renormalize`.
        segments: [S+1] int64, token offsets of segments (sequences) to sum over; None: all tokens.
        valid: [T] bool; tokens that are not valid get ids -1, weights 0, and no part in the sums.

    Returns:
        GateOutput(weights, ids, score_sum, counts, z_sum), S = 1 without segments:
        weights [T, K] fp32 (fp64 for fp64), by descending choice score; ids [T, K] int32;
        score_sum [S, E], a segment's sum of the scores, each token's made to add up to 1
        (for "softmax_topk" of the full softmax); counts [S, E] int64, how often each expert was
        chosen; z_sum [S], the sum of logsumexp(logits)^2.
        weights, score_sum and z_sum are differentiable with respect to the logits.

    Raises:
        RuntimeError: a wrong dtype, rank or shape, a number out of range, an unknown `score` or
            `group_score`.

    Notes:
        Experts rank by their logits, under a bias or "sum2" by their scores; where these tie the
        smaller id wins. NaN ranks as +infinity does and gives NaN weights (a softmax makes all
        scores of its token NaN); ids stay distinct and in range. Sums are made over fixed pieces
        in a fixed order: the same bits for any number of threads. Only logits, ids and segments
        are kept for backward. T = 0 is ordinary. Under autocast the logits are taken in the dtype
        they come in, all else is fp32.
        Sources: Shazeer et al. 2017 (top-k), Fedus et al. 2021 (balancing loss), Zoph et al. 2022
        (z-loss), DeepSeek-V3 2024 (sigmoid, groups, selection bias).

    Examples:
        >>> out = ops.gate(torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), 2, renormalize=True)
        >>> out.ids.tolist(), out.counts.tolist()
        ([[0, 1], [1, 2]], [[1, 2, 1]])
        >>> out.weights
        tensor([[0.7311, 0.2689],
                [0.8808, 0.1192]])
    """
    logits = logits.contiguous()
    if bias is not None:
        bias = bias.detach().to(wide(logits.dtype)).contiguous()
    how = (top_k, score, bias, num_groups, groups_kept, group_score, renormalize, scale)
    if logits.requires_grad and torch.is_grad_enabled():
        return GateOutput(*_Gate.apply(logits, how, segments, valid))
    return GateOutput(*_gate(logits, *how, segments, valid))
