"""TransformerEngine's functions, held to what Megatron-Core computes where it has not got them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason="needs megatron-core (pip install --no-deps will do)")

from megatron.core.transformer.moe import moe_utils

from moekernels.errors import UsageError
from moekernels.integrations import transformer_engine as te

TOKENS, EXPERTS, HIDDEN = 13, 5, 4


def routing_map(tokens: int = TOKENS, top_k: int = 2) -> Tensor:
    """Expert 3 gets nothing, token 2 goes nowhere and token 1 everywhere else."""
    scores = torch.rand(tokens, EXPERTS)
    scores[:, 3] = -1
    chosen = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(top_k).indices, True)
    chosen[1:2] = True
    chosen[2:3] = False
    chosen[:, 3] = False
    return chosen


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def assert_same(ours, theirs, inputs: list[Tensor], tolerance: float = 1e-12) -> None:
    """Values, and the gradients of all outputs together, for each input."""
    ours, theirs = (out if isinstance(out, tuple) else (out,) for out in (ours, theirs))
    close = dict(rtol=tolerance, atol=tolerance, check_dtype=False)
    grads = []
    for out in (ours, theirs):
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in out
        )
        assert isinstance(loss, Tensor)
        grads.append(torch.autograd.grad(loss, inputs, retain_graph=True))
    for mine, other in zip((*ours, *grads[0]), (*theirs, *grads[1]), strict=True):
        torch.testing.assert_close(mine, other, **close)


@pytest.mark.parametrize("tokens, top_k", [(TOKENS, 2), (TOKENS, EXPERTS), (3, 1), (0, 1)])
def test_permute_and_unpermute(tokens, top_k):
    torch.manual_seed(0)
    chosen = routing_map(tokens, top_k)
    rows = int(chosen.sum())
    x, probs = leaves((tokens, HIDDEN), (tokens, EXPERTS))
    mine, my_probs, row_id_map = te.moe_permute_with_probs(x, probs, chosen, rows)
    other, other_probs, order = moe_utils.permute(x, chosen, probs)
    assert_same((mine, my_probs), (other, other_probs), [x, probs])
    for count in (rows, -1):
        assert_same(te.moe_permute(x, chosen.int(), num_out_tokens=count)[0], other, [x])

    (y,) = leaves((rows, HIDDEN))
    shape = x.shape
    assert_same(
        te.moe_unpermute(y, row_id_map, restore_shape=shape),
        moe_utils.unpermute(y, order, shape),
        [y],
    )
    for name in ("merging_probs", "probs"):
        assert_same(
            te.moe_unpermute(y, row_id_map, **{name: probs}),
            moe_utils.unpermute(y, order, shape, probs=probs, routing_map=chosen),
            [y, probs],
        )


def test_rows_past_num_out_tokens_are_dropped():
    torch.manual_seed(0)
    chosen = routing_map()
    x, probs = leaves((TOKENS, HIDDEN), (TOKENS, EXPERTS))
    kept = int(chosen.sum()) - 3
    mine, my_probs, row_id_map = te.moe_permute_with_probs(x, probs, chosen, kept)
    other, other_probs, order = moe_utils.permute(x, chosen, probs)
    assert_same((mine, my_probs), (other[:kept], other_probs[:kept]), [x, probs])
    (y,) = leaves((kept, HIDDEN))
    assert_same(te.moe_unpermute(y, row_id_map), moe_utils.unpermute(y, order[:kept], x.shape), [y])


def test_index_maps_say_the_same_as_masks():
    torch.manual_seed(0)
    ids = torch.rand(TOKENS, EXPERTS).topk(2).indices
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, ids, True)
    x, probs = leaves((TOKENS, HIDDEN), (TOKENS, EXPERTS))
    by_index, index_map = te.moe_permute(x, ids.int(), map_type="index")
    by_mask, mask_map = te.moe_permute(x, chosen, 2 * TOKENS)
    assert_same(by_index, by_mask, [x])
    (y,) = leaves((2 * TOKENS, HIDDEN))
    assert_same(
        te.moe_unpermute(y, index_map, probs.gather(1, ids), map_type="index"),
        te.moe_unpermute(y, mask_map, probs),
        [y, probs],
    )


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0], [4], [0, 2, 0]])
def test_chunks_are_sorted(sizes):
    torch.manual_seed(0)
    split, order = torch.tensor(sizes), torch.randperm(len(sizes))
    x, probs = leaves((sum(sizes), HIDDEN), (sum(sizes),))
    theirs = moe_utils.sort_chunks_by_idxs(x, split, order, probs)
    assert_same(te.moe_sort_chunks_by_index_with_probs(x, probs, split, order), theirs, [x, probs])
    assert_same(te.moe_sort_chunks_by_index(x, split.int(), order.int()), theirs[0], [x])


ROUTERS = [
    dict(score_function="softmax"),
    dict(score_function="softmax", use_pre_softmax=True, scaling_factor=2.5),
    dict(score_function="softmax", use_pre_softmax=True, num_groups=4, group_topk=2),
    dict(score_function="softmax", num_groups=2, group_topk=1, topk=2),
    dict(score_function="sigmoid", scaling_factor=2.5),
    dict(score_function="sigmoid", topk=1),
    dict(score_function="sigmoid", bias=True, num_groups=4, group_topk=2),
    dict(score_function="sigmoid", bias=True, num_groups=4, group_topk=2, topk=2),
]


@pytest.mark.parametrize("given", ROUTERS, ids=str)
def test_router(given):
    torch.manual_seed(0)
    how = {"topk": 4, "use_pre_softmax": False, "num_groups": None, "group_topk": None}
    how |= {"scaling_factor": None, **given}
    how["expert_bias"] = torch.randn(8) if how.pop("bias", False) else None
    logits = torch.randn(TOKENS, 8, requires_grad=True)
    probs, chosen = te.fused_topk_with_score_function(logits, **how)
    other, other_chosen = moe_utils.topk_routing_with_score_function(logits, **how)
    assert torch.equal(chosen, other_chosen) and chosen.dtype == other_chosen.dtype
    assert probs.dtype == logits.dtype
    assert_same(probs, other, [logits], tolerance=2e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_auxiliary_loss(score):
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, 8, requires_grad=True)
    chosen, scores = te.fused_compute_score_for_moe_aux_loss(logits, 2, score)
    other_chosen, other = moe_utils.compute_routing_scores_for_aux_loss(logits, 2, score)
    assert torch.equal(chosen, other_chosen)
    assert_same(scores, other, [logits], tolerance=1e-6)
    counts = chosen.sum(0)
    for total in (TOKENS, torch.tensor(TOKENS)):
        mine = te.fused_moe_aux_loss(scores, counts, total, 8, 2, 0.5)
        theirs = moe_utils.switch_load_balancing_loss_func(other, counts, total, 2, 8, 0.5)
        assert_same(mine, theirs, [logits], tolerance=1e-6)


def test_sqrtsoftplus_adds_up_to_the_factor():
    logits = torch.randn(TOKENS, 8)
    args = (logits, 3, False, None, None, 2.0, "sqrtsoftplus", None)
    probs, chosen = te.fused_topk_with_score_function(*args)
    torch.testing.assert_close(probs.sum(1), torch.full((TOKENS,), 2.0))
    assert torch.equal(chosen.sum(1), torch.full((TOKENS,), 3))
    _, scores = te.fused_compute_score_for_moe_aux_loss(logits, 3, "sqrtsoftplus")
    torch.testing.assert_close(scores.sum(1), torch.ones(TOKENS))


def test_mistakes_are_one_line():
    x, logits = torch.ones(2, HIDDEN), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"map_type must be mask\|index, got 'rows'"):
        te.moe_permute(x, torch.ones(2, 2), map_type="rows")
    row_id_map = te.moe_permute(x, torch.ones(2, 2))[1]
    with pytest.raises(ValueError, match=r"restore_shape must be \(2, 4\), got \(3, 4\)"):
        te.moe_unpermute(torch.ones(4, HIDDEN), row_id_map, restore_shape=torch.Size((3, 4)))
    with pytest.raises(ValueError, match="give one"):
        te.moe_unpermute(x, row_id_map, merging_probs=x, probs=x)
    router = te.fused_topk_with_score_function
    with pytest.raises(ValueError, match="softmax takes no expert_bias"):
        router(logits, 2, False, None, None, None, "softmax", torch.ones(8))
    with pytest.raises(ValueError, match=r"1 or 2 are supported, got 6 // 2"):
        router(logits, 6, False, 4, 2, None, "sigmoid", None)
    with pytest.raises(ValueError, match="got 'tanh'"):
        router(logits, 2, False, None, None, None, "tanh", None)


def test_megatron_calls_them_once_patched(monkeypatch):
    torch.manual_seed(0)
    chosen = routing_map()
    x, probs = leaves((TOKENS, HIDDEN), (TOKENS, EXPERTS))
    rows = int(chosen.sum())
    plain = moe_utils.permute(x, chosen, probs)
    before = dict(vars(moe_utils))
    undo = te.patch_megatron()
    try:
        fused = moe_utils.permute(x, chosen, probs, num_out_tokens=rows, fused=True)
        assert_same(fused[:2], plain[:2], [x, probs])
        back = moe_utils.unpermute(fused[0], fused[2], x.shape, probs=probs, fused=True)
        other = moe_utils.unpermute(plain[0], plain[2], x.shape, probs=probs, routing_map=chosen)
        assert_same(back, other, [x, probs])
        again = te.patch_megatron()  # changes nothing, and neither does undoing that
        again()
        assert moe_utils.fused_permute is te.moe_permute
    finally:
        undo()
    assert vars(moe_utils) == before
    monkeypatch.delattr(moe_utils, "unpermute")
    with pytest.raises(UsageError, match="reads no fused_unpermute"):
        te.patch_megatron()
