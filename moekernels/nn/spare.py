"""Room for copies of other ranks' experts beside a layer's own; see `replicas`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moekernels.parallel.optimizer import main_grad_of


class Spare:
    """Weights [count, ...] of the copies in a layer, by the names of the experts' parameters, each
    with a `main_grad` to which kernels add. No optimiser knows them, no checkpoint holds them."""

    def __init__(self, own: Mapping[str, Tensor], count: int) -> None:
        self.count = count
        self.weights: dict[str, Tensor] = {}
        for key, like in own.items():
            weight = torch.zeros(count, *like.shape[1:], dtype=like.dtype, device=like.device)
            grad = torch.zeros_like(weight, dtype=torch.promote_types(like.dtype, torch.float32))
            weight.main_grad = grad  # type: ignore[attr-defined]  # torch has no such field
            self.weights[key] = weight.requires_grad_()

    def bytes(self) -> int:
        """Of weights and gradients."""
        each = [(w, main_grad_of(w)) for w in self.weights.values()]
        return sum(x.numel() * x.element_size() for pair in each for x in pair)
