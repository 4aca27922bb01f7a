"""cross_entropy: losses of tokens over logits that are split by the vocabulary; the gradient takes
the place of the logits.

Private. Two passes over the logits, between which whoever calls it gathers the sums of all shards.
Legend: C tokens, V entries of this shard, P shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels.ops._library import fake, raw

__all__: list[str] = []

_sums_ = raw._cross_entropy_sums_.default
_losses_ = raw._cross_entropy_losses_.default


@fake("_cross_entropy_sums_")
def _(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    return logits.new_empty(3, logits.shape[0])


@fake("_cross_entropy_losses_")
def _(logits: Tensor, labels: Tensor, first: int, shards: Tensor, rank: int) -> Tensor:
    return logits.new_empty(logits.shape[0])


def sums_(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """logits [C, V] fp32 or fp64, labels [C] int64 in the whole vocabulary, negative where there is
    no loss; `first`: this shard's first entry -> [3, C]: the largest logit, the sum of the others'
    exponentials over it, the label's logit (0 where it lies elsewhere).

    The logits become those exponentials, zero at the label: the others are summed without it, as of
    a confident token 1 - p would leave nothing.
    """
    return _sums_(logits, labels, first) if logits.is_cpu else plain_sums_(logits, labels, first)


def losses_(logits: Tensor, labels: Tensor, first: int, shards: Tensor, rank: int) -> Tensor:
    """What `sums_` made of the logits, and shards [P, 3, C], what it gave of all; ours is `rank` ->
    losses [C], zero where there is none. The logits become their gradient."""
    pass_ = _losses_ if logits.is_cpu else plain_losses_
    return pass_(logits, labels, first, shards, rank)


def _place(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(whether a token's label lies here [C], where [C, 1])."""
    here = (labels >= first) & (labels < first + logits.shape[1])
    return here, torch.where(here, labels - first, 0)[:, None]


def plain_sums_(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """`sums_` in plain torch."""
    here, at = _place(logits, labels, first)
    target = logits.gather(1, at)[:, 0] * here
    largest = logits.amax(1)
    logits.sub_(largest[:, None]).exp_()
    logits.scatter_(1, at, torch.where(here[:, None], 0, logits.gather(1, at)))
    return torch.stack([largest, logits.sum(1), target])


def plain_losses_(logits: Tensor, labels: Tensor, first: int, shards: Tensor, rank: int) -> Tensor:
    """`losses_` in plain torch."""
    largest = shards[:, 0].amax(0)
    others = (shards[:, 1] * torch.exp(shards[:, 0] - largest)).sum(0)
    target = shards[:, 2].sum(0)
    label = torch.exp(target - largest)
    total = others + label
    odds = others / label
    loss = torch.where(odds < 1, torch.log1p(odds), torch.log(total) + (largest - target))
    counted = labels >= 0
    # Softmax minus one at the label, zero where the token has no loss.
    logits.mul_((torch.exp(shards[rank, 0] - largest) / total * counted)[:, None])
    here, at = _place(logits, labels, first)
    logits.scatter_add_(1, at, (-others / total * (here & counted))[:, None])
    return torch.where(counted, loss, 0)
