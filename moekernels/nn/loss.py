"""Cross-entropy over a vocabulary that is split over ranks, without ever holding all logits.

Tokens go through in chunks; each chunk yields its loss and at once the gradients of its hidden
states and of the head, so the logits of a chunk live for a moment only and no product is made
twice. Legend: T tokens, H hidden, V vocabulary, C tokens of a chunk, P ranks of the tp group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels.model.vocabulary import chunk_tokens
from moekernels.ops import _derivatives
from moekernels.parallel.mesh import Group
from moekernels.parallel.tensor import all_gather, reduce_scatter

NO_LABEL = -100


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Refuses labels outside [0, V) that are not `NO_LABEL`: ValueError; on CUDA, where asking
    would wait for the device, an assertion that stops it."""
    fine = ((labels >= 0) & (labels < vocabulary)) | (labels == NO_LABEL)
    if labels.is_cuda:
        torch._assert_async(fine.all(), f"cross_entropy: a label outside [0, {vocabulary})")
    elif type(labels) is not Tensor or labels.is_meta:
        return  # it has no values
    elif not fine.all():
        at = int(fine.logical_not().nonzero()[0])
        raise ValueError(
            f"cross_entropy: label {int(labels[at])} at position {at} is outside the vocabulary "
            f"of {vocabulary}, and not {NO_LABEL}, which means none"
        )


def _exponentials_(logits: Tensor, labels: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """logits [C, V/P], labels [C] relative to this shard -> (loss, the probability of all but the
    label, what makes a probability of this shard's exponentials), all [C]; logits become
    exp(logits - largest), zero at the label.

    The others are summed without the label: of a confident token 1 - p would leave nothing.
    """
    here = (labels >= 0) & (labels < logits.shape[1])
    at = torch.where(here, labels, 0)[:, None]
    target = logits.gather(1, at)[:, 0] * here
    mine = logits.amax(1)
    logits.sub_(mine[:, None]).exp_()
    logits.scatter_(1, at, torch.where(here[:, None], 0, logits.gather(1, at)))
    others, largest = logits.sum(1), mine
    if group.size > 1:
        shards = all_gather(torch.stack([mine, others, target])[None], group)  # [P, 3, C]
        largest = shards[:, 0].amax(0)
        others = (shards[:, 1] * torch.exp(shards[:, 0] - largest)).sum(0)
        target = shards[:, 2].sum(0)
    label = torch.exp(target - largest)
    total = others + label
    odds = others / label
    loss = torch.where(odds < 1, torch.log1p(odds), torch.log(total) + (largest - target))
    return loss, others / total, torch.exp(mine - largest) / total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, first, group, split, needs_grad):
        x = all_gather(hidden, group) if split else hidden
        wide = torch.promote_types(x.dtype, torch.float32)
        labels = torch.where(labels == NO_LABEL, -1, labels)
        total = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if needs_grad else None
        dweight = None
        chunk = chunk_tokens(weight.shape[0])
        for begin in range(0, x.shape[0], chunk):
            part, label = x[begin : begin + chunk], labels[begin : begin + chunk]
            counted, label = label >= 0, label - first
            logits = (part @ weight.T).to(wide)
            loss, missed, factor = _exponentials_(logits, label, group)
            total += torch.where(counted, loss, 0).sum()
            if dx is None:
                continue
            # softmax minus one at the label, zero where the token has no loss
            p = logits.mul_((factor * counted)[:, None])
            here = (label >= 0) & (label < p.shape[1])
            p.scatter_add_(1, torch.where(here, label, 0)[:, None], (-missed * here)[:, None])
            p = p.to(x.dtype)
            torch.mm(p, weight, out=dx[begin : begin + chunk])
            if dweight is None:
                dweight = (p.T @ part).to(wide)
            elif p.dtype == wide:
                dweight.addmm_(p.T, part)
            else:
                dweight += p.T @ part
        if dx is not None:
            # Every rank has its columns' part of dx: the sum belongs to hidden's backward.
            dx = reduce_scatter(dx, group) if split else dx
            ctx.save_for_backward(dx, dweight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        if _derivatives.needs_plain():
            raise RuntimeError(
                "cross_entropy: its gradient is not differentiable (only the gradient is kept, not "
                "what it was made of); take second derivatives of a loss over all logits"
            )
        # In place: both are large. Asked for a second time, autograd refuses what was written to.
        dx, dweight = (t.mul_(grad) for t in ctx.saved_tensors)
        return dx, dweight.to(ctx.weight_dtype), None, None, None, None, None


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int,
    group: Group,
    *,
    split: bool,
    vocabulary: int | None = None,
) -> Tensor:
    """Summed loss of a microbatch, in fp32 at least, the same on every rank of the group.

    hidden [T/P, H] where `split` by tokens, else [T, H]; weight [V/P, H] beginning at token
    `first`; labels [T], each in [0, V) or `NO_LABEL`, else ValueError; V is `vocabulary`, None:
    what weight holds. Without `split` the gradient of hidden is this rank's part: enter through
    `copy_to`.
    """
    _derivatives.refuse_transforms("cross_entropy")
    check_labels(labels, first + weight.shape[0] if vocabulary is None else vocabulary)
    # Asked here: inside a function's forward inputs look as if they needed gradients even under
    # no_grad.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _CrossEntropy.apply(hidden, weight, labels, first, group, split, needs_grad)
