"""Loads count how often each expert of each layer was chosen in an optimiser step. Legend: E
experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def max_over_mean(loads: Tensor) -> Tensor:
    """loads [L, E] -> [L]: the fullest expert over the mean, 1 where the load is even (or nothing
    was routed).
    """
    mean = loads.double().mean(-1)
    return torch.where(mean > 0, loads.amax(-1) / mean, 1.0)


def dead_experts(loads: Tensor) -> Tensor:
    """loads [L, E] -> [L] int64: experts that nothing was routed to."""
    return (loads == 0).sum(-1)


@torch.no_grad()
def update_selection_biases(biases: Sequence[Tensor], loads: Tensor, rate: float) -> None:
    """Move each layer's selection bias [E] by `rate` towards the mean load, after a step (Wang et
    al. 2024).

    Overloaded experts become less, underloaded ones more eligible; `loads` [L, E] are the whole
    stage's, so every rank takes the same step. The bias enters the choice only, so no gradient
    disturbs the model for balance's sake.
    """
    excess = loads.double() - loads.double().mean(-1, keepdim=True)
    for bias, layer_excess in zip(biases, excess, strict=True):
        bias -= rate * torch.sign(layer_excess).to(bias.dtype)
