"""The router's auxiliary losses: the last chunk's join the loss, those of earlier chunks are
injected into the activations and so ride through the pipeline.

Legend: T tokens, H hidden, E experts, K top-k, L layers of the chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekernels.model.decoder import DecoderSpec
from moekernels.nn.batch import Batch
from moekernels.ops import _derivatives
from moekernels.parallel.mesh import Group, Mesh
from moekernels.parallel.tensor import reduce_from


class _Inject(torch.autograd.Function):
    """x passes through; in backward the loss gets the gradient one, as if it were part of the final
    loss: for a chunk whose output is not that loss, and which cannot know what scales it."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


class _Join(torch.autograd.Function):
    """The final loss passes through; in backward `auxiliary` gets its gradient, whatever scales it.

    `alone` says that no other chunk holds auxiliary losses. Where others do they count as they are,
    so that a scale is an error.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, auxiliary: Tensor, alone: bool) -> Tensor:
        ctx.dtype, ctx.alone = auxiliary.dtype, alone
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if not ctx.alone:
            torch._assert_async(
                grad == 1,
                "the loss of a pipeline was scaled behind its last chunk, where the auxiliary "
                "losses of earlier chunks do not see it: scale batch.loss_scale instead",
            )
        return grad, grad.to(ctx.dtype), None


def inject(x: Tensor, auxiliary: Tensor | None) -> Tensor:
    """x with the chunk's auxiliary losses behind it, for the chunk after."""
    if auxiliary is None:
        return x
    _derivatives.refuse_transforms("auxiliary losses of a pipeline's chunk")
    return _Inject.apply(x, auxiliary)


def join(loss: Tensor, auxiliary: Tensor | None, *, alone: bool) -> Tensor:
    """The final loss, whose value stays, with the last chunk's auxiliary losses behind it."""
    if auxiliary is None:
        return loss
    if _derivatives.transformed():
        return loss + (auxiliary - auxiliary.detach()).to(loss.dtype)
    return _Join.apply(loss, auxiliary, alone)


class Auxiliary(nn.Module):
    """Load-balancing and z-loss of a microbatch over its tp ranks, and the counts behind them.

    Each layer's loss weighs what its microbatch's tokens weigh in the step. The z-loss is a sum
    over tokens and does not depend on the split; the load-balancing loss does, unless it is made of
    sequences (`RouterSpec.balance_scope`). The chunk's layers share one message over tp.
    """

    def __init__(self, config: DecoderSpec, mesh: Mesh, layers: int, device: torch.device) -> None:
        super().__init__()
        self.top_k, self.tp = config.top_k, mesh.tp
        self.balance_coef, self.z_coef = config.balance_coef, config.z_coef
        self.weighs = self.balance_coef != 0 or self.z_coef != 0
        self.loads = torch.zeros(layers, config.num_experts, dtype=torch.int64, device=device)
        self.losses = torch.zeros(2, dtype=torch.float64, device=device)

    def forward(
        self, batch: Batch, score_sum: Tensor, counts: Tensor, z_sum: Tensor
    ) -> Tensor | None:
        """score_sum, counts [L*S, E] and z_sum [L*S] of own tokens, S segments per layer -> the
        chunk's auxiliary losses, a scalar for `inject` or `join`; None where they have no part in
        the loss."""
        layers, experts = self.loads.shape
        self.loads += counts if len(counts) == layers else counts.unflatten(0, (layers, -1)).sum(1)
        if not self.weighs:
            return None
        # Counts are exact in fp32 up to 2^24 choices of an expert in a microbatch.
        message = torch.cat([score_sum, z_sum[:, None], counts.to(score_sum.dtype)], dim=1)
        message = reduce_from(message, self.tp)
        weight = batch.num_tokens * batch.loss_scale
        with torch.no_grad():
            # Segments weigh by their tokens, and layers have equally many: the mean over layers.
            balance = slopes(message[:, experts + 1 :], self.top_k)
            weighs = message.new_full(
                (len(message), experts + 1), weight / max(batch.num_tokens, 1)
            )
            torch.mul(balance, layers * weight, out=weighs[:, :experts])
        sums = (message[:, : experts + 1] * weighs).sum(0)
        balance, z = sums[:experts].sum(), sums[experts]
        self.losses += torch.stack([balance.detach(), z.detach()])
        return self.balance_coef * balance + self.z_coef * z

    def take(self) -> tuple[Tensor, Tensor]:
        """(loads [L, E], losses [2]) since the last call."""
        taken = self.loads.clone(), self.losses.clone()
        self.loads.zero_()
        self.losses.zero_()
        return taken


def slopes(counts: Tensor, top_k: int) -> Tensor:
    """counts [S, E], as floats -> [S, E], what the load-balancing loss rises by with each of the
    scores' sums, which it is linear in (`ops.load_balancing_loss`)."""
    tokens = counts.sum(-1, keepdim=True) / top_k
    scale = counts.shape[-1] / top_k / tokens.sum().clamp_min(1)
    return counts * (scale / tokens.clamp_min(1))


def own_segments(cu_seqlens: list[int], tp: Group, device: torch.device) -> Tensor:
    """cu_seqlens 0 ... T of a microbatch -> [S+1] int64 within this rank's [T/tp] tokens; a
    sequence that lies elsewhere is empty here."""
    own = cu_seqlens[-1] // tp.size
    first = tp.rank * own
    bounds = [min(max(bound - first, 0), own) for bound in cu_seqlens]
    return torch.tensor(bounds, dtype=torch.int64, device=device)
