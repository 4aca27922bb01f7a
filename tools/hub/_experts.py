"""The experts function of transformers' registry; transformers is imported when it calls."""

from __future__ import annotations

import torch
from torch import nn


def experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """hidden_states [T, H], ids and weights [T, K] -> [T, H]: for `ALL_EXPERTS_FUNCTIONS`."""
    from .integrations.transformers import experts_forward as forward

    return forward(self, hidden_states, top_k_index, top_k_weights)
