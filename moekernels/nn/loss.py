"""Cross-entropy over a vocabulary that is split over ranks, without ever holding all logits.

Tokens go through in chunks; each chunk yields its loss and at once the gradients of its hidden
states and of the head, so the logits of a chunk live for a moment only and no product is made
twice. Legend: T tokens, H hidden, V vocabulary, C tokens of a chunk, P ranks of the tp group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels.model.vocabulary import chunk_tokens
from moekernels.ops import _dense, _derivatives
from moekernels.ops import cross_entropy as op
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


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, first, group, split, needs_grad):
        x = all_gather(hidden, group) if split else hidden
        wide = torch.promote_types(x.dtype, torch.float32)
        labels = labels.contiguous()
        total = torch.zeros((), dtype=wide, device=x.device)
        chunk = chunk_tokens(weight.shape[0])
        dx = dweight = None
        if needs_grad:
            dx = torch.empty_like(x)
            dweight = torch.zeros(weight.shape, dtype=wide, device=x.device)
        for begin in range(0, x.shape[0], chunk):
            part, label = x[begin : begin + chunk], labels[begin : begin + chunk]
            logits = _dense.product(part, weight).to(wide)
            sums = op.sums_(logits, label, first)
            shards = all_gather(sums[None], group)  # [P, 3, C]
            total += op.losses_(logits, label, first, shards, group.rank).sum()
            if dx is not None and dweight is not None:
                p = logits.to(x.dtype)
                _dense.dgrad(p, weight, out=dx[begin : begin + chunk])
                _dense.add_wgrad(dweight, part, p, x.dtype)
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
