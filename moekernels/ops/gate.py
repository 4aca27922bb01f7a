"""gate: from router logits to weights, ids, and the sums of the auxiliary losses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import _derivatives, _spec
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op
from moekernels.reference import GateOutput

__all__ = ["GateOutput", "gate", "load_balancing_loss"]

_gate = raw._gate.default
_gate_backward = raw._gate_backward.default
_SCORE = {"softmax": 0, "softmax_topk": 1, "sigmoid": 2, "sqrtsoftplus": 3}
_SUM_TWO = {"max": False, "sum2": True}

load_balancing_loss = op(reference.load_balancing_loss)(reference.load_balancing_loss)


@fake("_gate")
def _(
    logits: Tensor,
    top_k: int,
    score: int,
    bias: Tensor | None,
    num_groups: int,
    groups_kept: int,
    sum_two: bool,
    renormalize: bool,
    scale: float,
    segments: Tensor | None,
    valid: Tensor | None,
):
    tokens, experts = logits.shape
    wide = _spec.wide(logits.dtype)
    parts = 1 if segments is None else segments.shape[0] - 1
    return (
        logits.new_empty(tokens, top_k, dtype=wide),
        logits.new_empty(tokens, top_k, dtype=torch.int32),
        logits.new_empty(parts, experts, dtype=wide),
        logits.new_empty(parts, experts, dtype=torch.int64),
        logits.new_empty(parts, dtype=wide),
    )


@fake("_gate_backward")
def _(
    logits: Tensor,
    ids: Tensor,
    dweights: Tensor | None,
    dscore_sum: Tensor | None,
    dz_sum: Tensor | None,
    score: int,
    renormalize: bool,
    scale: float,
    segments: Tensor | None,
):
    return torch.empty_like(logits)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, options: tuple, segments: Tensor | None, valid: Tensor | None):
        top_k, score, bias, num_groups, groups_kept, sum_two, renormalize, scale = options
        out = _gate(logits, *options, segments, valid)
        ctx.save_for_backward(logits, out[1], segments)
        ctx.options = (score, renormalize, scale)
        ctx.mark_non_differentiable(out[1], out[3])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, dweights, dids, dscore_sum, dcounts, dz_sum):
        logits, ids, segments = ctx.saved_tensors
        if _derivatives.needs_plain():
            score, *options = ctx.options
            name = next(n for n, number in _SCORE.items() if number == score)
            (grad,) = _derivatives.vjp(
                lambda logits: reference.gate_sums(logits, ids, name, *options, segments),
                (logits,),
                (True,),
                (dweights, dscore_sum, dz_sum),
            )
            return grad, None, None, None
        grads = [None if g is None else g.contiguous() for g in (dweights, dscore_sum, dz_sum)]
        return _gate_backward(logits, ids, *grads, *ctx.options, segments), None, None, None


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
        RuntimeError: a wrong dtype, rank or shape, a number out of range.
        ValueError: an unknown `score` or `group_score`.

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
    if score not in _SCORE:
        raise ValueError(f"gate: score must be {'|'.join(_SCORE)}, got {score!r}")
    if group_score not in _SUM_TWO:
        raise ValueError(f"gate: group_score must be {'|'.join(_SUM_TWO)}, got {group_score!r}")
    logits = logits.contiguous()
    if bias is not None:
        bias = bias.detach().to(_spec.wide(logits.dtype)).contiguous()
    options = (
        top_k,
        _SCORE[score],
        bias,
        num_groups,
        groups_kept,
        _SUM_TWO[group_score],
        renormalize,
        scale,
    )
    if logits.requires_grad and torch.is_grad_enabled():
        return GateOutput(*_Gate.apply(logits, options, segments, valid))
    return GateOutput(*_gate(logits, *options, segments, valid))


def _logits(dtype: torch.dtype, tokens: int, experts: int, seed: int) -> Tensor:
    """[T, E] values that differ within a row in every dtype: no choice is left to rounding."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=-1)
    step = 6 / experts
    return ((order - experts / 2) * step + 0.25 * step * (order % 3)).to(dtype)


def _options() -> Iterator[tuple[str, dict]]:
    bias = _spec.randn(torch.float64, 24, seed=3, scale=0.2)
    for score in _SCORE:
        yield score, {"score": score}
        yield f"{score}-scaled", {"score": score, "renormalize": True, "scale": 2.5}
        if score != "softmax_topk":
            yield f"{score}-bias", {"score": score, "bias": bias, "renormalize": True}
    groups = {"num_groups": 6, "groups_kept": 2}
    yield "groups", {"score": "sigmoid", **groups}
    yield "groups-bias", {"score": "sigmoid", **groups, "bias": bias, "group_score": "sum2"}


def _cases(dtype: torch.dtype) -> Iterator[_spec.Case]:
    x = _logits(dtype, 21, 24, seed=0)
    for name, options in _options():
        if options.get("bias") is not None:
            options = {**options, "bias": options["bias"].to(_spec.wide(dtype))}
        yield _spec.Case(name, {"logits": x, "top_k": 4, **options})
    everything = {
        "segments": torch.tensor([0, 9, 9, 75, 150]),
        "valid": torch.arange(150) % 7 != 3,
        "score": "sigmoid",
        "renormalize": True,
    }
    x = _logits(dtype, 150, 8, seed=1)
    yield _spec.Case("segments", {"logits": x, "top_k": 2, **everything}, False, compile=True)
    gap = {"segments": torch.tensor([2, 5, 8])}
    yield _spec.Case("gaps", {"logits": x[:10], "top_k": 2, **gap})
    yield _spec.Case("chunks", {"logits": x, "top_k": 2}, gradcheck=False, compile=True)
    yield _spec.Case("no_tokens", {"logits": x[:0], "top_k": 2})
    yield _spec.Case("one_token", {"logits": x[:1], "top_k": 1})
    yield _spec.Case("k_is_e", {"logits": x[:9], "top_k": 8})
    yield _spec.Case("one_expert", {"logits": x[:9, :1], "top_k": 1, "renormalize": True})
    nobody = {"valid": torch.zeros(9, dtype=torch.bool)}
    yield _spec.Case("none_valid", {"logits": x[:9], "top_k": 2, **nobody})
    yield _spec.Case("all_tie", {"logits": torch.zeros(5, 40, dtype=dtype), "top_k": 7}, False)
    yield _spec.Case("far", {"logits": _logits(dtype, 7, 24, seed=2) * 8, "top_k": 3}, False)


def _large(dtype: torch.dtype) -> dict:
    segments = torch.tensor([0, 300, 301, 1024])
    return {"logits": _logits(dtype, 1024, 40, seed=4), "top_k": 6, "segments": segments}


def _sized(tokens: int) -> dict:
    segments = torch.tensor([0, tokens // 2, tokens])
    return {"logits": _logits(torch.float32, tokens, 12, seed=0), "top_k": 3, "segments": segments}


def _messages():
    x = torch.zeros(4, 6)
    names = "float32|bfloat16|float16|float64"
    yield lambda: gate(x[0], 2), f"gate: logits must be {names} [T, E], got float32 [6]"
    yield lambda: gate(x.int(), 2), f"gate: logits must be {names} [T, E], got int32 [4, 6]"
    yield lambda: gate(x, 0), "gate: top_k must be in [1, E=6], got 0"
    yield lambda: gate(x, 7), "gate: top_k must be in [1, E=6], got 7"
    yield lambda: gate(x, 2, num_groups=4), "gate: num_groups must divide E=6, got 4"
    yield (
        lambda: gate(x, 2, num_groups=3, groups_kept=4),
        "gate: groups_kept must be in [1, 3], got 4",
    )
    yield (
        lambda: gate(x, 3, num_groups=3, groups_kept=1),
        "gate: the 1 groups kept hold 2 experts, fewer than top_k=3",
    )
    yield (
        lambda: gate(x, 2, bias=torch.zeros(5)),
        "gate: bias must be float32 [E=6], got float32 [5]",
    )
    yield (
        lambda: gate(x, 2, valid=torch.zeros(4)),
        "gate: valid must be bool [T=4], got float32 [4]",
    )
    yield (
        lambda: gate(x, 2, segments=torch.zeros(2, dtype=torch.int32)),
        "gate: segments must be int64 [S+1], got int32 [2]",
    )
    yield (
        lambda: gate(x, 2, score="tanh"),
        "gate: score must be softmax|softmax_topk|sigmoid|sqrtsoftplus, got 'tanh'",
    )
    yield (
        lambda: gate(x, 2, group_score="mean"),
        "gate: group_score must be max|sum2, got 'mean'",
    )
    yield (
        lambda: _gate(x.T, 2, 0, None, 1, 1, False, False, 1.0, None, None),
        "gate: logits must be contiguous, got strides [1, 6]",
    )


def _saved(inputs: dict) -> int:
    tokens = inputs["logits"].shape[0]
    return _spec.nbytes(inputs["logits"], inputs.get("segments")) + 4 * tokens * inputs["top_k"]


_spec.register(
    _spec.OpSpec(
        name="gate",
        fn=gate,
        reference=reference.gate,
        cases=_cases,
        sized=_sized,
        differentiable=("logits",),
        messages=_messages,
        large=_large,
        saved=_saved,
    )
)
