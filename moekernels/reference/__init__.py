"""Every op in plain torch: obvious, any device, any float dtype, differentiable by autograd.

These functions say what an op means. The kernels of `moekernels.ops` are held to them (in fp64) by
the contract test, and nothing here is tuned. Legend: T tokens, H hidden, F expert hidden, E
experts, e local experts, K top-k, R routed rows, P peers, S segments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekernels.reference.exchange import exchange as exchange
from moekernels.reference.exchange import pack as pack
from moekernels.reference.exchange import regroup as regroup
from moekernels.reference.exchange import ungroup as ungroup
from moekernels.reference.fp8 import BLOCK as BLOCK
from moekernels.reference.fp8 import Quantized as Quantized
from moekernels.reference.fp8 import dequantize as dequantize
from moekernels.reference.fp8 import experts_product, scaled_product
from moekernels.reference.fp8 import quantize as quantize


class GateOutput(NamedTuple):
    weights: Tensor  # [T, K] routing weights, fp32 (fp64 for fp64 logits)
    ids: Tensor  # [T, K] int32, -1 for tokens that are not valid
    score_sum: Tensor  # [S, E] sum over a segment's tokens of the normalised scores
    counts: Tensor  # [S, E] int64, how often each expert was chosen in a segment
    z_sum: Tensor  # [S] sum over a segment's tokens of logsumexp(logits)^2


class Routing(NamedTuple):
    counts: Tensor  # [E] int64, rows kept for each expert
    offsets: Tensor  # [E+1] int64, where each expert's rows begin
    row_of: Tensor  # [T, K] int32, the row of each choice, -1 if dropped
    token_of: Tensor  # [R] int32, the token of each row, -1 if the row is unused
    slot_of: Tensor  # [R] int32, t*K + k of each row, -1 if the row is unused


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


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
    """logits [T, E] -> weights and ids [T, K], and the sums of which auxiliary losses are made."""
    scores = _known(SCORES, "score", score)(_wide(logits))
    rank_of = _known(GROUP_SCORES, "group_score", group_score)
    tokens, experts = scores.shape

    # Choice: the bias moves it, the weights never see the bias.
    choice = scores.detach() if bias is None else scores.detach() + bias.to(scores.dtype)
    if num_groups > 1:
        grouped = choice.view(tokens, num_groups, experts // num_groups)
        order = rank_of(grouped).sort(dim=-1, descending=True, stable=True).indices[:, :groups_kept]
        kept = (order[:, :, None] == torch.arange(num_groups, device=order.device)).any(1)
        choice = grouped.masked_fill(~kept[:, :, None], -torch.inf).view(tokens, experts)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]  # ties: smaller id
    if valid is not None:
        ids = torch.where(valid[:, None], ids, -1)

    weights, score_sum, z_sum = gate_sums(logits, ids, score, renormalize, scale, segments)
    chosen = (ids[:, :, None] == torch.arange(experts, device=ids.device)).sum(1)
    counts = torch.stack([chosen[begin:end].sum(0) for begin, end in _bounds(segments, tokens)])
    return GateOutput(weights, ids.int(), score_sum, counts, z_sum)


# What experts are chosen by, of logits. softmax_topk: the logits; its softmax is over those chosen.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, dim=-1),
    "softmax_topk": lambda x: x,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: torch.sqrt(F.softplus(x)),
}
# What a group ranks by, of its experts' choice scores.
GROUP_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: x.amax(-1),
    "sum2": lambda x: x.topk(min(2, x.shape[-1]), dim=-1).values.sum(-1),
}


def _known(register: dict[str, Callable], argument: str, name: str) -> Callable:
    if name not in register:
        raise ValueError(f"{argument} must be {'|'.join(register)}, got {name!r}")
    return register[name]


def _bounds(segments: Tensor | None, tokens: int) -> list[tuple[int, int]]:
    bounds = [0, tokens] if segments is None else segments.tolist()
    return list(zip(bounds[:-1], bounds[1:]))


def gate_sums(
    logits: Tensor,
    ids: Tensor,
    score: str,
    renormalize: bool,
    scale: float,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `gate` yields of logits [T, E] for a given choice ids [T, K] (-1: not valid): weights
    [T, K], score_sum [S, E] and z_sum [S]."""
    valid = ids[:, :1] >= 0
    x = torch.where(valid, _wide(logits), 0)
    scores = _known(SCORES, "score", score)(x)
    if score in ("softmax", "softmax_topk"):  # the losses see the full softmax
        normalised = torch.softmax(x, dim=-1)
    else:
        normalised = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
    weights = scores.gather(1, ids.clamp_min(0).long())
    if score == "softmax_topk":
        weights = torch.softmax(weights, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    weights = torch.where(valid, weights * scale, 0)
    normalised = torch.where(valid, normalised, 0)
    z = torch.where(valid[:, 0], torch.logsumexp(x, dim=-1) ** 2, 0)
    bounds = _bounds(segments, x.shape[0])
    return (
        weights,
        torch.stack([normalised[begin:end].sum(0) for begin, end in bounds]),
        torch.stack([z[begin:end].sum() for begin, end in bounds]),
    )


def load_balancing_loss(score_sum: Tensor, counts: Tensor, top_k: int) -> Tensor:
    """Switch-style loss, E/(K T^2) sum_e counts_e score_sum_e, segments weighted by their tokens.

    score_sum, counts [S, E] -> scalar; 1 where loads are even (Fedus et al. 2021, eq. 4, K
    choices).

    Examples:
        >>> even = ops.gate(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), 1)
        >>> uneven = ops.gate(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), 1)
        >>> for out in (even, uneven):
        ...     print(f"{ops.load_balancing_loss(out.score_sum, out.counts, 1):.3f}")
        1.000
        1.762
    """
    tokens = counts.sum(-1, keepdim=True).to(score_sum.dtype) / top_k  # [S, 1]
    per_segment = (counts * score_sum).sum(-1, keepdim=True) / tokens.clamp_min(1)
    return per_segment.sum() * counts.shape[-1] / top_k / tokens.sum().clamp_min(1)


def route(
    ids: Tensor,
    num_experts: int,
    *,
    weights: Tensor | None = None,
    capacity: int | None = None,
    drop: str = "position",
    alignment: int = 1,
) -> Routing:
    """ids [T, K] -> a stable order of the choices by expert; ids outside [0, E) are dropped."""
    tokens, top_k = ids.shape
    flat = ids.reshape(-1).long()
    rows = tokens * top_k + num_experts * (alignment - 1)
    counts, offsets = [], [0]
    row_of = torch.full((tokens * top_k,), -1, dtype=torch.int32, device=ids.device)
    slot_of = torch.full((rows,), -1, dtype=torch.int32, device=ids.device)
    for expert in range(num_experts):
        slots = (flat == expert).nonzero().flatten()
        if capacity is not None and len(slots) > capacity:
            if drop == "weight":  # keep the heaviest, the earlier one where weights tie
                assert weights is not None
                order = weights.reshape(-1)[slots].sort(descending=True, stable=True).indices
                slots = slots[order[:capacity]].sort().values
            else:
                slots = slots[:capacity]
        begin = offsets[-1]
        row_of[slots] = torch.arange(begin, begin + len(slots), device=ids.device).int()
        slot_of[begin : begin + len(slots)] = slots.int()
        counts.append(len(slots))
        offsets.append(begin + -(-len(slots) // alignment) * alignment)
    token_of = torch.where(slot_of >= 0, slot_of // max(top_k, 1), -1).int()
    device = ids.device
    return Routing(
        torch.tensor(counts, dtype=torch.int64, device=device),
        torch.tensor(offsets, dtype=torch.int64, device=device),
        row_of.view(tokens, top_k),
        token_of,
        slot_of,
    )


def permute(x: Tensor, token_of: Tensor, row_of: Tensor | None) -> Tensor:
    """x [T, H] -> rows [R, H]: rows[r] = x[token_of[r]], zero where token_of is outside [0, T).
    row_of [T, K] says the same; the kernel of the gradient reads it."""
    if x.shape[0] == 0:
        return x.new_zeros(token_of.shape[0], x.shape[1])
    used = (token_of >= 0) & (token_of < x.shape[0])
    return torch.where(used[:, None], x[torch.where(used, token_of, 0).long()], 0)


def combine(
    rows: Tensor, row_of: Tensor, token_of: Tensor, weights: Tensor | None = None
) -> Tensor:
    """rows [R, H] -> [T, H]: the sum over k, in order, of (weights[t, k] *) rows[row_of[t, k]]."""
    tokens, top_k = row_of.shape
    total = _wide(rows).new_zeros(tokens, rows.shape[1])
    if rows.shape[0] == 0:
        return total.to(rows.dtype)
    for k in range(top_k):
        row = row_of[:, k]
        used = (row >= 0) & (row < rows.shape[0])
        picked = _wide(rows)[torch.where(used, row, 0).long()]
        if weights is not None:
            picked = picked * weights[:, k, None]
        total = total + torch.where(used[:, None], picked, 0)
    return total.to(rows.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [R, H] -> the same: each row over its root mean square, times weight [H]."""
    rstd = torch.rsqrt(_wide(x).square().mean(-1, keepdim=True) + eps)
    return (_wide(x) * rstd * weight).to(x.dtype)


def permute_weights(weights: Tensor, routing: Routing) -> Tensor:
    """weights [T, K] -> [R], the weight of each row, zero for unused rows."""
    flat = permute(weights.reshape(-1, 1), routing.slot_of, routing.row_of.reshape(-1, 1))
    return flat.reshape(-1)


def grouped_gemm(
    rows: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    transposed: bool = False,
    row_scales: Tensor | None = None,
    w_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """rows [R, I] x w [E, O, I] (transposed: [E, I, O]) -> [R, O]; zeros past offsets[E]. With
    scales rows and w [E, O, I] are e4m3, and the result is of `dtype` (bf16)."""
    bounds = list(zip(offsets.tolist()[:-1], offsets.tolist()[1:]))
    width = w.shape[2] if transposed else w.shape[1]
    if row_scales is not None and w_scales is not None:
        parts = [
            scaled_product(rows[i:j], row_scales[i:j], w[e], w_scales[e])
            for e, (i, j) in enumerate(bounds)
        ]
        parts.append(row_scales.new_zeros(rows.shape[0] - int(offsets[-1]), width))
        return torch.cat(parts).to(dtype or torch.bfloat16)
    out = [rows[i:j] @ (w[e] if transposed else w[e].T) for e, (i, j) in enumerate(bounds)]
    out.append(rows.new_zeros(rows.shape[0] - int(offsets[-1]), width))
    return torch.cat(out)


def grouped_gemm_dgrad(
    drows: Tensor, w: Tensor, offsets: Tensor, *, transposed: bool = False
) -> Tensor:
    """Gradient of `grouped_gemm` for its rows: drows [R, O] -> [R, I]."""
    return grouped_gemm(drows, w, offsets, transposed=not transposed)


def grouped_gemm_wgrad(
    rows: Tensor,
    drows: Tensor,
    offsets: Tensor,
    *,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of `grouped_gemm` for w: rows [R, I], drows [R, O] -> [E, O, I] (transposed: [E,
    I, O]).

    With `out` (the fp32 main gradient) the products are added to it and it is returned.
    """
    bounds = list(zip(offsets.tolist()[:-1], offsets.tolist()[1:]))
    a, b = (rows, drows) if transposed else (drows, rows)
    products = [_wide(a[i:j]).T @ _wide(b[i:j]) for i, j in bounds]
    none = _wide(rows).new_zeros(0, a.shape[1], b.shape[1])
    wide = torch.stack(products) if products else none
    return wide.to(rows.dtype) if out is None else out.add_(wide)


def _swiglu_oai(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)  # gpt-oss


# The expert's nonlinearities: of gate, up, alpha and limit; and of h alone.
GATED: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "swiglu": lambda gate, up, alpha, limit: F.silu(gate) * up,
    "geglu": lambda gate, up, alpha, limit: F.gelu(gate) * up,
    "reglu": lambda gate, up, alpha, limit: F.relu(gate) * up,
    "swiglu_oai": _swiglu_oai,
    "swiglu_clamped": lambda gate, up, alpha, limit: (
        F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    ),
}
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda h: F.relu(h).square(),
    "silu": F.silu,
    "gelu": F.gelu,
}


def activate(
    h: Tensor,
    activation: str,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    interleaved: bool = False,
) -> Tensor:
    """The nonlinearity of h [R, 2F] = [gate, up] (interleaved: alternating), or [R, F] ungated."""
    if activation in UNGATED:
        return UNGATED[activation](h)
    act = _known(GATED, "activation", activation)
    gate_, up = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=-1)
    return act(gate_, up, alpha, limit)


def experts(
    x: Tensor,
    weights: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    offsets: Tensor,
    *,
    token_of: Tensor | None = None,
    row_of: Tensor | None = None,
    activation: str = "swiglu",
    alpha: float = 1.702,
    limit: float = 7.0,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    recompute: bool = False,
    fp8: bool = False,
) -> Tensor:
    """The whole expert FFN: x [R, H] (or [T, H] seen through token_of [R]) -> weighted rows [R, H].

    w1 [E, 2F, H] (ungated [E, F, H]), w2 [E, H, F]; `transposed`: [E, H, 2F] and [E, F, H]; b1
    [E, 2F], b2 [E, H]. fp8: products and gradients of their rows in FP8 (`reference.fp8`).
    """
    product = experts_product if fp8 else grouped_gemm
    rows = x if token_of is None else permute(x, token_of, row_of)
    of_row = torch.repeat_interleave(
        torch.arange(w1.shape[0], device=x.device), offsets.diff(), output_size=int(offsets[-1])
    )

    def with_bias(y: Tensor, b: Tensor | None) -> Tensor:
        if b is None:
            return y
        return torch.cat([y[: len(of_row)] + b[of_row], y[len(of_row) :]])

    h = with_bias(product(rows, w1, offsets, transposed=transposed), b1)
    a = activate(h, activation, alpha=alpha, limit=limit, interleaved=interleaved)
    y = with_bias(product(a, w2, offsets, transposed=transposed), b2)
    if weights is not None:
        weighted = (_wide(y) * _wide(weights)[:, None]).to(y.dtype)
        y = torch.cat([weighted[: len(of_row)], y[len(of_row) :]])  # zeros, whatever is beside them
    if token_of is not None:
        y = torch.where((token_of >= 0)[:, None], y, 0)
    return y
