"""TransformerEngine's MoE functions, under its names and arguments, on our ops; and Megatron-Core
patched to call them.

    import moekernels.integrations.transformer_engine as te
    te.patch_megatron()  # before the model's config is built with moe_permute_fusion=True

TransformerEngine need not be installed, and no GPU is needed. Beside TransformerEngine's own
functions: fp64 is taken, FP8 tensors are not; rows that no choice fills are zero; what
`moe_permute` returns last is for `moe_unpermute` alone to read, as it is there.

Legend: T tokens, H hidden, E experts, K top-k, R permuted rows, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType

import torch
import torch.nn.functional as F
from torch import Tensor

from moekernels import ops
from moekernels.errors import UsageError

__all__ = [
    "fused_compute_score_for_moe_aux_loss",
    "fused_moe_aux_loss",
    "fused_topk_with_score_function",
    "moe_permute",
    "moe_permute_with_probs",
    "moe_sort_chunks_by_index",
    "moe_sort_chunks_by_index_with_probs",
    "moe_unpermute",
    "patch_megatron",
]


def moe_permute(
    inp: Tensor,
    routing_map: Tensor,
    num_out_tokens: int = -1,
    max_token_num: int = -1,
    map_type: str = "mask",
) -> tuple[Tensor, Tensor]:
    """Tokens into expert order.

    Args:
        inp: [T, H].
        routing_map: "mask": [T, E] bool or integers, not zero where the expert is chosen; "index":
            [T, K] integers, the experts of each token.
        num_out_tokens: R, rows past it are dropped; -1: none are, which for a mask has to be
            counted (on a GPU the host waits for it).
        max_token_num: TransformerEngine sizes a workspace by it; there is none here.
        map_type: "mask" or "index".

    Returns:
        rows [R, H] and a row_id_map [T, E] or [T, K] int32 for `moe_unpermute`.

    Raises:
        ValueError: another map_type.
    """
    token_of, row_of, _ = _rows_of(routing_map, num_out_tokens, map_type)
    return ops.permute(inp, token_of, row_of), row_of


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_permute` by a mask, and each row's probability: inp [T, H], probs [T, E], routing_map
    [T, E] -> rows [R, H], probabilities [R], row_id_map. Both are differentiable."""
    token_of, row_of, slot_of = _rows_of(routing_map, num_out_tokens, "mask")
    of_rows = ops.permute(probs.reshape(-1, 1), slot_of, row_of.reshape(-1, 1)).reshape(-1)
    return ops.permute(inp, token_of, row_of), of_rows, row_of


def _rows_of(routing_map: Tensor, rows: int | None, map_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """token_of [R], row_of [T, K] or [T, E], and slot_of [R], as of `ops.route`."""
    if map_type == "mask":
        chosen, experts = routing_map != 0, routing_map.shape[1]
        every = torch.arange(experts, device=chosen.device, dtype=torch.int32)
        ids = torch.where(chosen, every, -1)
        if rows is None or rows < 0:
            rows = int(chosen.sum())
    elif map_type == "index":
        ids = routing_map
        if rows is None or rows < 0:
            rows = ids.numel()
        experts = 1 + int(ids.max()) if ids.numel() else 1
    else:
        raise ValueError(f"moe_permute: map_type must be mask|index, got {map_type!r}")
    routing = ops.route(ids, experts)
    return routing.token_of[:rows], routing.row_of, routing.slot_of[:rows]


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
    pad_offsets: Tensor | None = None,
) -> Tensor:
    """Each token's rows, weighted and summed: the inverse of `moe_permute`.

    Args:
        inp: [R, H].
        row_id_map: what `moe_permute` returned.
        merging_probs: [T, E] ("mask") or [T, K] ("index") weights, or None.
        restore_shape: (T, H), which row_id_map knows; another is refused.
        map_type: "mask" or "index"; row_id_map says the same.
        probs: TransformerEngine's older name of merging_probs.
        pad_offsets: of rows that were padded for FP8, which are refused.

    Returns:
        [T, H] in inp's dtype, summed in fp32 in the order of the experts ("index": of k).

    Raises:
        ValueError: another map_type or restore_shape, both names of the weights, padded rows.
    """
    if map_type not in ("mask", "index"):
        raise ValueError(f"moe_unpermute: map_type must be mask|index, got {map_type!r}")
    if probs is not None and merging_probs is not None:
        raise ValueError("moe_unpermute: probs is merging_probs by its older name; give one")
    if pad_offsets is not None:
        raise ValueError(
            "moe_unpermute: rows padded for FP8 are not supported; give no pad_offsets"
        )
    weights = probs if merging_probs is None else merging_probs
    shape = (row_id_map.shape[0], inp.shape[1])
    if restore_shape is not None and tuple(restore_shape) != shape:
        raise ValueError(f"moe_unpermute: restore_shape must be {shape}, got {(*restore_shape,)}")
    return ops.combine(inp, row_id_map, _inverse(row_id_map, inp.shape[0]), weights)


def _inverse(row_of: Tensor, rows: int) -> Tensor:
    """row_of [T, K] -> token_of [R], -1 for rows of no token."""
    token = torch.arange(row_of.shape[0], device=row_of.device, dtype=torch.int32)
    kept = (row_of >= 0) & (row_of < rows)
    token_of = token.new_full((rows + 1,), -1)  # the last takes what is dropped
    place = torch.where(kept, row_of, rows).long().reshape(-1)
    return token_of.scatter_(0, place, token[:, None].expand_as(row_of).reshape(-1))[:rows]


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """inp [R, H] in chunks of split_sizes [C] -> [R, H], chunk sorted_index[0] first, and so on."""
    return ops.permute(inp, *chunk_order(inp, split_sizes, sorted_index))


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of inp [R, H] and probs [R]."""
    order = chunk_order(inp, split_sizes, sorted_index)
    sorted_probs = ops.permute(probs.reshape(-1, 1), *order).reshape(probs.shape)
    return ops.permute(inp, *order), sorted_probs


def chunk_order(x: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> tuple[Tensor, Tensor]:
    """Where each sorted row comes from [R], and each row goes to [R, 1], found on x's device."""
    sizes = split_sizes.to(x.device, torch.int64)
    index = sorted_index.to(x.device, torch.int64)
    begins, sorted_ends = sizes.cumsum(0) - sizes, sizes[index].cumsum(0)
    row = torch.arange(x.shape[0], device=x.device)
    # Of rows past the last chunk, which no caller should have, the last chunk's shift is taken.
    chunk = torch.searchsorted(sorted_ends, row, right=True).clamp_max(max(len(index) - 1, 0))
    shift = begins[index] - (sorted_ends - sizes[index])
    source = row + shift[chunk] if len(index) else row
    target = torch.empty_like(source).scatter_(0, source.clamp(0, max(len(row) - 1, 0)), row)
    return source.int(), target.int()[:, None]


def fused_topk_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The router: logits [T, E] -> probabilities [T, E] in their dtype, zero where not chosen, and
    the routing map [T, E] bool.

    Args:
        logits: [T, E] fp32, bf16, fp16 or fp64; computed in fp32 (fp64 for fp64).
        topk: K.
        use_pre_softmax: softmax over all experts, then the choice; else over those chosen.
        num_groups: into how many groups the experts are divided; with
        group_topk: of which so many are chosen from, by the sum of their topk / group_topk best.
        scaling_factor: factor on the probabilities.
        score_function: "softmax", "sigmoid" or "sqrtsoftplus"; of the last two a token's add up to
            1 where topk > 1.
        expert_bias: [E], moves the choice alone; not with softmax.

    Raises:
        ValueError: an unknown score_function, a bias with softmax, groups that rank by another sum
            than of one or two scores.
    """
    if score_function == "softmax":
        if expert_bias is not None:
            raise ValueError("fused_topk_with_score_function: softmax takes no expert_bias")
        score, renormalize = "softmax" if use_pre_softmax else "softmax_topk", False
    elif score_function in ("sigmoid", "sqrtsoftplus"):
        score, renormalize = score_function, topk > 1
    else:
        raise ValueError(
            "fused_topk_with_score_function: score_function must be softmax|sigmoid|sqrtsoftplus, "
            f"got {score_function!r}"
        )
    out = ops.gate(
        logits,
        topk,
        score=score,
        bias=expert_bias,
        renormalize=renormalize,
        scale=scaling_factor or 1.0,
        **_groups(topk, num_groups, group_topk),
    )
    ids = out.ids.long()
    probs = torch.zeros_like(logits).scatter(1, ids, out.weights.to(logits.dtype))
    return probs, _chosen(logits, ids)


def _groups(topk: int, num_groups: int | None, group_topk: int | None) -> dict:
    """What `ops.gate` is told of groups."""
    if not group_topk:
        return {}
    best = {1: "max", 2: "sum2"}
    if topk // group_topk not in best:
        raise ValueError(
            "fused_topk_with_score_function: groups rank by the sum of their topk // group_topk "
            f"best scores, of which 1 or 2 are supported, got {topk} // {group_topk}"
        )
    group_score = best[topk // group_topk]
    return {"num_groups": num_groups, "groups_kept": group_topk, "group_score": group_score}


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)


def fused_compute_score_for_moe_aux_loss(
    logits: Tensor, topk: int, score_function: str
) -> tuple[Tensor, Tensor]:
    """What the auxiliary loss is made of: logits [T, E] -> routing map [T, E] bool, and scores
    [T, E] fp32 of which each token's add up to 1. The choice is fused, the scores are torch's."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if score_function == "softmax":
        scores = torch.softmax(wide, dim=-1)
    elif score_function in ("sigmoid", "sqrtsoftplus"):
        scores = wide.sigmoid() if score_function == "sigmoid" else F.softplus(wide).sqrt()
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    else:
        raise ValueError(
            "fused_compute_score_for_moe_aux_loss: score_function must be "
            f"softmax|sigmoid|sqrtsoftplus, got {score_function!r}"
        )
    ids = ops.gate(logits.detach(), topk, score=score_function).ids
    return _chosen(logits, ids.long()), scores


def fused_moe_aux_loss(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int | Tensor,
    num_experts: int,
    topk: int,
    coeff: float,
) -> Tensor:
    """The load-balancing loss, coeff E / (K N^2) sum_e tokens_per_expert_e sum_t probs_te, where N
    is total_num_tokens: probs [T, E], tokens_per_expert [E] -> scalar in probs' dtype."""
    wide = probs if probs.dtype == torch.float64 else probs.float()
    per_expert = wide.sum(0)
    loss = (per_expert * tokens_per_expert.to(per_expert.dtype)).sum()
    return (loss * (num_experts * coeff / (topk * total_num_tokens * total_num_tokens))).to(
        probs.dtype
    )


# Megatron-Core's names in megatron.core.transformer.moe.moe_utils.
_HOOKS: dict[str, Callable] = {
    "fused_permute": moe_permute,
    "fused_permute_with_probs": moe_permute_with_probs,
    "fused_unpermute": moe_unpermute,
    "fused_sort_chunks_by_index": moe_sort_chunks_by_index,
    "fused_sort_chunks_by_index_with_probs": moe_sort_chunks_by_index_with_probs,
    "fused_topk_with_score_function": fused_topk_with_score_function,
    "fused_compute_score_for_moe_aux_loss": fused_compute_score_for_moe_aux_loss,
    "fused_moe_aux_loss": fused_moe_aux_loss,
}


def patch_megatron() -> Callable[[], None]:
    """Make Megatron-Core call these functions wherever it calls TransformerEngine's fused ones,
    that is under `moe_permute_fusion` and `moe_router_fusion`; installed or not,
    TransformerEngine's are not called there any more. Calling it again changes nothing.

    Returns:
        A function that undoes it.

    Raises:
        ImportError: no megatron-core.
        UsageError: one that reads these functions from elsewhere.
    """
    try:
        from megatron.core.transformer.moe import moe_utils
    except ImportError as error:
        raise ImportError(
            "patch_megatron needs megatron-core: pip install megatron-core"
        ) from error
    read = set().union(
        *(names_read(f.__code__) for f in vars(moe_utils).values() if hasattr(f, "__code__"))
    )
    if missing := sorted({*_HOOKS, "HAVE_TE"} - read):
        raise UsageError(
            f"patch_megatron: this megatron-core's moe_utils reads no {', '.join(missing)}; "
            "megatron-core 0.16 does"
        )
    absent = object()
    # The router's product asks for TransformerEngine's GEMM, which is only there beside it.
    hooks = {
        **_HOOKS,
        "HAVE_TE": True,
        "te_general_gemm": getattr(moe_utils, "te_general_gemm", None),
    }
    before = {name: getattr(moe_utils, name, absent) for name in hooks}
    for name, value in hooks.items():
        setattr(moe_utils, name, value)

    def undo() -> None:
        for name, value in before.items():
            if value is absent:
                delattr(moe_utils, name)
            else:
                setattr(moe_utils, name, value)

    return undo


def names_read(code: CodeType) -> set[str]:
    """The global names that a function reads."""
    return set(code.co_names)
