"""The router's auxiliary losses, injected into the activations so that they ride through the
pipeline.

Legend: T tokens, H hidden, E experts, K top-k, L layers of the chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels.nn.batch import Batch
from moekernels.nn.config import ModelConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.tensor import reduce_from


class _Inject(torch.autograd.Function):
    """x passes through; in backward the loss gets the gradient one, as if it were part of the final
    loss."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


class Auxiliary(nn.Module):
    """Load-balancing and z-loss of a micro-batch over its tp ranks, and the counts behind them.

    Each layer's loss weighs what its micro-batch's tokens weigh in the step, so the sums do not
    depend on the split. The chunk's layers share one message over tp.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, layers: int, device: torch.device) -> None:
        super().__init__()
        self.top_k, self.tp = config.top_k, mesh.tp
        self.balance_coef, self.z_coef = config.router.balance_coef, config.router.z_coef
        self.loads = torch.zeros(layers, config.num_experts, dtype=torch.int64, device=device)
        self.losses = torch.zeros(2, dtype=torch.float64, device=device)

    def forward(
        self, x: Tensor, batch: Batch, score_sum: Tensor, counts: Tensor, z_sum: Tensor
    ) -> Tensor:
        """x [T/tp, H]; score_sum, counts [L, E] and z_sum [L] of own tokens -> x with the losses
        behind it."""
        self.loads += counts
        if self.balance_coef == 0 and self.z_coef == 0:
            return x
        layers, experts = counts.shape
        # Counts are exact in fp32 up to 2^24 choices of an expert in a micro-batch.
        message = torch.cat([score_sum, counts.to(score_sum.dtype), z_sum[:, None]], dim=1)
        score_sum, counts, z_sum = reduce_from(message, self.tp).split([experts, experts, 1], dim=1)
        # As L segments of equally many tokens: their mean.
        balance = ops.load_balancing_loss(score_sum, counts.detach(), self.top_k) * layers
        z = z_sum.sum() / max(batch.num_tokens, 1)
        weight = batch.num_tokens * batch.loss_scale
        self.losses += torch.stack([balance.detach(), z.detach()]).double() * weight
        return _Inject.apply(x, (self.balance_coef * balance + self.z_coef * z) * weight)

    def take(self) -> tuple[Tensor, Tensor]:
        """(loads [L, E], losses [2]) since the last call."""
        taken = self.loads.clone(), self.losses.clone()
        self.loads.zero_()
        self.losses.zero_()
        return taken
