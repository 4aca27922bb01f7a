"""Who is chosen with whom, and how far a token's choices lie apart: what a layer sees while it is
watched. Legend: T tokens, K top-k, E experts, N nodes."""

from __future__ import annotations

import torch
from torch import Tensor


class Watch:
    """Of one layer, since it was made: pairs [E, E] int64, the tokens that chose both experts (on
    the diagonal, that chose one); nodes [2] fp64, the distinct nodes summed over tokens, and the
    tokens."""

    def __init__(self, experts: int, node_of: Tensor, device: torch.device) -> None:
        """node_of [E]: the node of each expert, numbered from 0."""
        self.experts, self.node_of = experts, node_of.to(device)
        self.several = int(node_of.max()) + 1
        self.pairs = torch.zeros(experts, experts, dtype=torch.int64, device=device)
        self.nodes = torch.zeros(2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def see(self, ids: Tensor) -> None:
        """ids [T, K] of experts; -1 goes nowhere."""
        wide, chosen = ids.long(), ids >= 0
        both = chosen[:, :, None] & chosen[:, None, :]
        places = wide[:, :, None] * self.experts + wide[:, None, :]
        counts = torch.bincount(places[both], minlength=self.experts**2)
        self.pairs += counts.view(self.experts, self.experts)
        lies = torch.where(chosen, self.node_of[wide.clamp_min(0)], -1)
        apart = torch.stack([(lies == node).any(1).sum() for node in range(self.several)])
        self.nodes += torch.stack([apart.sum(), chosen.any(1).sum()])
