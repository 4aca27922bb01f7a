"""What is special to gate: hostile logits and offsets, published selection rules, exact ties."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moekernels import ops, reference
from moekernels.ops._library import raw


@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_of_hostile_logits_keep_ids_distinct_and_in_range(score, dtype):
    x = torch.randn(40, 19).to(dtype)
    x[0] = math.nan
    x[1] = -math.inf
    x[2] = math.inf
    x[3, 7] = math.nan
    x[4, 3] = -math.inf
    x[5, 11] = math.inf
    x[6] = torch.finfo(dtype).max
    x[7] = -torch.finfo(dtype).max
    x.requires_grad_()
    out = ops.gate(x, 6, score=score, renormalize=True)
    assert out.ids.min() >= 0 and out.ids.max() < 19
    assert all(len(set(row)) == 6 for row in out.ids.tolist())
    assert out.counts.sum() == 240
    assert out.ids[3, 0] == 7  # NaN ranks first, so that it is seen
    assert torch.isfinite(out.weights[8:]).all()
    torch.autograd.grad(out.weights[8:].sum(), x)


def test_weights_of_masked_experts_are_zero():
    """-infinity is how callers mask an expert: it is chosen last, with weight 0 and no gradient."""
    x = torch.randn(9, 6)
    x[:, 2] = -math.inf
    x.requires_grad_()
    out = ops.gate(x, 6)
    assert (out.ids[:, -1] == 2).all() and (out.weights[:, -1] == 0).all()
    (gradient,) = torch.autograd.grad((out.weights * torch.randn(9, 6)).sum(), x)
    assert (gradient[:, 2] == 0).all() and torch.isfinite(gradient).all()


def test_ties_go_to_the_smaller_id():
    x = torch.tensor([[1.0, 3, 3, 0, 3, 1], [0, 0, 0, 0, 0, 0]])
    assert ops.gate(x, 4).ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    bias = torch.tensor([0.0, 0, 1, 1, 0, 1])
    assert ops.gate(x[1:], 4, bias=bias).ids.tolist() == [[2, 3, 5, 0]]
    grouped = ops.gate(x[1:], 2, num_groups=3, groups_kept=1, group_score="sum2")
    assert grouped.ids.tolist() == [[0, 1]]


def test_values_where_scores_underflow():
    """Logits far apart: fp32 scores are 0, yet the order is that of the logits."""
    x = torch.tensor([[0.0, -200, -300, -150, -1000]])
    assert ops.gate(x, 5).ids.tolist() == [[0, 3, 1, 2, 4]]
    assert ops.gate(x, 5, score="sigmoid").ids.tolist() == [[0, 3, 1, 2, 4]]


def test_values_equal_a_deepseek_v3_router():
    """Sigmoid scores; bias and groups move the choice only; renormalised and scaled."""
    tokens, experts, groups, kept, k = 50, 32, 8, 3, 6
    logits, bias = torch.randn(tokens, experts), torch.randn(experts) * 0.1
    scores = logits.sigmoid()
    choice = scores + bias
    rank = choice.view(tokens, groups, -1).topk(2, dim=-1)[0].sum(-1)
    mask = torch.zeros_like(rank).scatter_(1, rank.topk(kept, dim=-1)[1], 1)
    mask = mask[:, :, None].expand(-1, -1, experts // groups).reshape(tokens, experts)
    ids = choice.masked_fill(mask == 0, -math.inf).topk(k, dim=-1)[1]
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * 2.5
    out = ops.gate(
        logits,
        k,
        score="sigmoid",
        bias=bias,
        num_groups=groups,
        groups_kept=kept,
        group_score="sum2",
        renormalize=True,
        scale=2.5,
    )
    assert torch.equal(out.ids.long(), ids)
    torch.testing.assert_close(out.weights, weights)


def test_renormalised_softmax_is_softmax_over_the_chosen():
    x = torch.randn(30, 12)
    a = ops.gate(x, 3, renormalize=True)
    b = ops.gate(x, 3, score="softmax_topk")
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.weights, b.weights)


def test_losses_from_the_sums():
    """The balancing loss is E/K sum_e f_e P_e and the z-loss a mean square, as published."""
    x = torch.randn(200, 16, dtype=torch.float64)
    out = ops.gate(x, 2)
    share = F.one_hot(out.ids.long(), 16).sum(1).double().mean(0)
    expected = 16 / 2 * (share * x.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(ops.load_balancing_loss(out.score_sum, out.counts, 2), expected)
    torch.testing.assert_close(out.z_sum / 200, x.logsumexp(-1).square().mean()[None])


@pytest.mark.parametrize(
    "segments", [[0, 999], [-5, 10], [8, 3, 12], [12, 12], [30, 40], [0, 5, 2**62]]
)
def test_hostile_segments_stay_inside(segments):
    """Offsets that leave [0, T] or fall are pulled back; no memory is touched outside."""
    x = torch.randn(12, 4, requires_grad=True)
    out = ops.gate(x, 2, segments=torch.tensor(segments))
    assert out.counts.shape == (len(segments) - 1, 4)
    assert 0 <= out.counts.sum() <= 24
    assert torch.equal(out.ids, ops.gate(x, 2).ids)
    torch.autograd.grad(out.score_sum.sum() + out.z_sum.sum(), x)


def test_backward_ignores_ids_outside():
    x = torch.randn(3, 4)
    ids = torch.tensor([[0, 1], [7, 0], [-(2**31), 2]], dtype=torch.int32)
    dweights = torch.ones(3, 2)
    dx = raw._gate_backward(x, ids, dweights, None, None, "softmax", False, 1.0, None)
    assert (dx[0] != 0).any() and (dx[1:] == 0).all()


def test_backward_of_each_output_alone():
    x = torch.randn(20, 8, dtype=torch.float64)
    for name in ("weights", "score_sum", "z_sum"):
        gradients = []
        for fn in (ops.gate, reference.gate):
            leaf = x.clone().requires_grad_()
            out = getattr(fn(leaf, 3, score="sigmoid", renormalize=True), name)
            cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            gradients += torch.autograd.grad(out, leaf, cotangent)
        torch.testing.assert_close(*gradients)
