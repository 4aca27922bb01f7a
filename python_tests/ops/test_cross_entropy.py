"""cross_entropy over shards on the CPU: held to plain torch in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moekernels.ops import cross_entropy as op

DTYPES = {torch.float32: 2e-6, torch.float64: 1e-14}


def both_passes(sums_, losses_, logits: Tensor, labels: Tensor, cuts: list[int]) -> list[Tensor]:
    """Losses, and the gradients of all shards of the vocabulary, cut there."""
    parts = [part.contiguous() for part in logits.tensor_split(cuts, dim=1)]
    firsts = [0, *cuts]
    shards = torch.stack([sums_(x, labels, first) for x, first in zip(parts, firsts)])
    losses = []
    for rank, (part, first) in enumerate(zip(parts, firsts)):
        losses.append(losses_(part, labels, first, shards, rank))
        torch.testing.assert_close(losses[rank], losses[0], rtol=0, atol=0, equal_nan=True)
    return [losses[0], torch.cat(parts, dim=1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [[], [24], [5, 6]], ids=str)
@pytest.mark.parametrize("shape", [(7, 40), (1, 27), (0, 32)], ids=str)
def test_values(shape, cuts, dtype):
    generator = torch.Generator().manual_seed(0)
    exact = (torch.randn(shape, generator=generator) * 8).double().requires_grad_()
    labels = torch.randint(0, shape[1], shape[:1], generator=generator)
    labels[1::3] = -100
    ours = both_passes(op.sums_, op.losses_, exact.detach().to(dtype, copy=True), labels, cuts)
    plain = both_passes(op.plain_sums_, op.plain_losses_, exact.detach().clone(), labels, cuts)
    losses = F.cross_entropy(exact, labels, reduction="none")
    wanted = [losses.detach(), *torch.autograd.grad(losses.sum(), exact)]
    for got, torchs, want in zip(ours, plain, wanted, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        largest = want.abs().max() if want.numel() else 0
        assert ((got.double() - want).abs() <= DTYPES[dtype] * largest).all()
        assert ((torchs - want).abs() <= 1e-13 * largest).all()


def test_what_is_not_finite_is_seen():
    logits = torch.zeros(2, 20)
    logits[1, 3] = torch.nan
    labels = torch.tensor([4, 4])
    losses, gradient = both_passes(op.sums_, op.losses_, logits, labels, [])
    assert losses.isnan().tolist() == [False, True]
    assert gradient[1].isnan().any() and not gradient[0].isnan().any()


def test_threads_change_no_bit():
    logits, labels = torch.randn(600, 700), torch.randint(0, 700, (600,))
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(both_passes(op.sums_, op.losses_, logits.clone(), labels, [300]))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*found))


def test_messages():
    logits, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"^cross_entropy: logits must be float32\|float64"):
        op.sums_(logits.bfloat16(), labels, 0)
    with pytest.raises(RuntimeError, match=r"^cross_entropy: labels must be int64 \[C=3\]"):
        op.sums_(logits, labels[:2], 0)
    with pytest.raises(RuntimeError, match="^cross_entropy: first must not be negative, got -1"):
        op.sums_(logits, labels, -1)
    with pytest.raises(RuntimeError, match=r"^cross_entropy: shards must be .*3=3, C=3\]"):
        op.losses_(logits, labels, 0, torch.zeros(1, 3, 4), 0)
    with pytest.raises(RuntimeError, match=r"^cross_entropy: rank must be in \[0, P=2\), got 2"):
        op.losses_(logits, labels, 0, torch.zeros(2, 3, 3), 2)
