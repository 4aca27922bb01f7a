"""Where a module's parameters live, and what they begin as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekernels.parallel.shard import ShardInfo, seeded_normal


@dataclass(frozen=True)
class Home:
    """The same for all modules of a chunk. `sequence_parallel`: tokens are split over tp between
    the matrix products. `spare`: copies of other ranks' experts that a layer has room for."""

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    seed: int = 0
    sequence_parallel: bool = True
    experts_device: torch.device | None = None  # None: with all others
    spare: int = 0

    def full(self, shape: Sequence[int], std: float, name: str) -> Tensor:
        """The whole tensor [shape] in fp32 on the CPU, whatever the layout."""
        return seeded_normal(shape, std, self.seed, name)

    def normal(self, info: ShardInfo, std: float, name: str) -> nn.Parameter:
        """This rank's shard of it."""
        mine = info.take(self.full(info.full_shape, std, name))
        return nn.Parameter(mine.to(self.device, self.dtype))

    def filled(self, shape: Sequence[int], value: float) -> nn.Parameter:
        """A parameter [shape] that begins as `value` everywhere."""
        return nn.Parameter(torch.full(shape, value, dtype=self.dtype, device=self.device))
