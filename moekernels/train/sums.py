"""What a step's ranks add up: one message of named numbers, the experts' loads, and memory."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moekernels.parallel.measure import hidden_of
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.tensor import all_reduce


@dataclass(frozen=True)
class StepSums:
    """A rank's part of a step, or the sum over all ranks; fields in the order in which they travel.

    idle, cores and the five of the exchange are shares: a rank's part is divided by the ranks.
    """

    loss: float | Tensor  # nats per token
    balance: float | Tensor  # the load-balancing loss, summed over layers
    z: float | Tensor  # the router's z-loss, summed over layers
    idle: float  # of the flush, in which a stage computed nothing
    stop: float  # ranks that were asked to stop
    cores: float  # of the cores' time, in which they worked
    moving: float  # of the flush: rows under way,
    skew: float  # waiting for peers that came late; NaN where it is not known,
    exposed: float  # waiting at all,
    flight: float  # rows flying,
    hidden: float  # and nobody waiting for them
    border: float  # bytes of exchanges that went to other nodes

    def exchange(self, several: bool) -> dict[str, float | None]:
        """What a step's line says of the exchange; with `several` nodes of their border, too."""
        said = {
            "exchange_moving": self.moving,
            "exchange_exposed": self.exposed,
            "exchange_skew": None if math.isnan(self.skew) else self.skew,
            "exchange_hidden": hidden_of(self.hidden, self.flight, 1.0),
        }
        return said | ({"border_bytes": int(self.border)} if several else {})

    def over_ranks(
        self, loads: Tensor, mesh: Mesh, largest: Sequence[float | Tensor]
    ) -> tuple[StepSums, Tensor, list[float]]:
        """All ranks' sums, loads [layers, experts] on the CPU, and of each of `largest` the
        largest of all ranks."""
        parts = [getattr(self, field.name) for field in fields(self)]
        mine = torch.stack([x if isinstance(x, Tensor) else loads.new_tensor(x) for x in parts])
        each = loads.new_zeros(mesh.world.size, len(largest))
        for place, x in enumerate(largest):
            each[mesh.world.rank, place] = x
        message = torch.cat([mine, each.flatten(), loads.flatten()])
        sizes = [len(mine), each.numel(), loads.numel()]
        sums, every, total = all_reduce(message, mesh.world).cpu().split(sizes)
        most = every.view(each.shape).amax(0)
        return StepSums(*sums.tolist()), total.view(loads.shape), most.tolist()


def peak_memory(device: torch.device) -> float:
    """Bytes: the most this process held on the card, or at all."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
