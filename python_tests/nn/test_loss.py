"""The loss of tokens that the model is sure of, and of labels that no vocabulary holds."""

from __future__ import annotations

import pytest
import torch

from moekernels.nn.loss import NO_LABEL, cross_entropy
from moekernels.parallel.mesh import Layout, Mesh
from python_tests.support.distributed import run_ranks

ALONE = Mesh(Layout()).tp
VOCABULARY = 64
MARGINS = (0.0, 5.0, 12.0, 16.0, 17.0, 20.0, 40.0, 80.0)  # of the label's logit over the others


def confident() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [T, H], head [V, H], labels [T]: token t prefers its label by MARGINS[t]."""
    labels = torch.arange(len(MARGINS)) * 7 % VOCABULARY
    logits = torch.randn(len(MARGINS), VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(len(MARGINS)), labels] = logits.amax(1) + torch.tensor(MARGINS)
    return logits, torch.eye(VOCABULARY), labels


def loss_and_gradient(hidden, head, labels, first=0, group=ALONE):
    hidden = hidden.clone().requires_grad_()
    whole = {"split": False, "vocabulary": VOCABULARY}
    loss = cross_entropy(hidden, head, labels, first, group, **whole)
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


def exactly(hidden, head, labels):
    """Losses [T] and the gradient [T, H] in fp64, by formulas that cancel nothing."""
    logits = hidden.double() @ head.double().T
    at = labels[:, None]
    odds = (logits - logits.gather(1, at)).exp().scatter(1, at, 0.0)
    others = odds.sum(1, keepdim=True)
    p = (odds / (1 + others)).scatter(1, at, -others / (1 + others))
    return others.log1p()[:, 0], p @ head.double()


def test_gradient_of_confident_tokens() -> None:
    """To fp32's rounding, each token's loss and gradient: 1 - p would round to nothing."""
    hidden, head, labels = confident()
    losses, exact = exactly(hidden, head, labels)
    for t in range(len(labels)):
        loss, gradient = loss_and_gradient(hidden[t : t + 1], head, labels[t : t + 1])
        torch.testing.assert_close(loss.double(), losses[t], rtol=1e-5, atol=1e-36)
        torch.testing.assert_close(gradient[0].double(), exact[t], rtol=1e-5, atol=1e-36)


def on_a_shard(rank: int) -> None:
    mesh = Mesh(Layout(tp=2))
    hidden, head, labels = confident()
    first = mesh.tp.rank * VOCABULARY // 2
    loss, part = loss_and_gradient(
        hidden, head[first : first + VOCABULARY // 2], labels, first, mesh.tp
    )
    torch.distributed.all_reduce(part, group=mesh.tp.process_group)
    losses, exact = exactly(hidden, head, labels)
    torch.testing.assert_close(loss.double(), losses.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(part.double(), exact, rtol=1e-5, atol=1e-36)
    labels[3] = VOCABULARY
    with pytest.raises(ValueError, match="label 64 at position 3 is outside the vocabulary of 64"):
        loss_and_gradient(hidden, head[first : first + 32], labels, first, mesh.tp)


def test_over_two_shards() -> None:
    run_ranks(2, on_a_shard)


@pytest.mark.parametrize("label", [VOCABULARY, -1, -99, 2**40])
def test_label_outside_the_vocabulary(label: int) -> None:
    hidden, head, labels = confident()
    labels[2] = NO_LABEL
    cross_entropy(hidden, head, labels, 0, ALONE, split=True)
    labels[5] = label
    with pytest.raises(ValueError) as error:
        cross_entropy(hidden, head, labels, 0, ALONE, split=True)
    assert str(error.value) == (
        f"cross_entropy: label {label} at position 5 is outside the vocabulary of 64, and not "
        "-100, which means none"
    )
