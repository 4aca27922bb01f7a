"""Memory of GPUs that all ranks of a group on one node address, from torch's symmetric memory.

torch calls it alpha: nothing but `empty`, `rendezvous` and the list of addresses is used, here
alone. None of it has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moekernels.errors import UsageError
from moekernels.parallel.nodes import Nodes, gather


class SymmetricMemory:
    """Gives slabs to the ranks of a process group, each on its own GPU."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        assert group is not None  # of more than one rank
        self.group, self.device = group, device

    def allocate(self, nbytes: int) -> tuple[Tensor, list[int]]:
        """[nbytes] uint8 zeros of this rank, and the addresses of all ranks' in their order. All
        ranks call it together; none goes on before all slabs are zero."""
        from torch.distributed import _symmetric_memory as symmetric

        slab = symmetric.empty(nbytes, dtype=torch.uint8, device=self.device)
        slab.zero_()
        torch.cuda.synchronize(self.device)
        addresses = [int(a) for a in symmetric.rendezvous(slab, self.group).buffer_ptrs]
        dist.barrier(self.group)
        return slab, addresses


def _complaint(device: torch.device, mates: Sequence[int]) -> str:
    """Why this rank's GPU cannot share memory with those of its node, or nothing."""
    try:
        from torch.distributed._symmetric_memory import empty, rendezvous  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no symmetric memory"
    own = device.index if device.index is not None else torch.cuda.current_device()
    if torch.cuda.device_count() < len(mates):
        return "a rank does not see its node's other GPUs"
    for other in range(len(mates)):
        if other != own and not torch.cuda.can_device_access_peer(own, other):
            return f"GPU {own} does not reach the memory of GPU {other}"
    return ""


def why_not_symmetric(device: torch.device, rank: int, nodes: Nodes, mode: str) -> str:
    """Why the run's GPUs share no memory; nothing where they do. All ranks call it together.

    Raises UsageError under the mode `shared` where they cannot. `auto` takes the collective until
    this has run on a GPU.
    """
    if mode != "shared":
        return "on GPUs rows go by the collective unless --exchange shared asks for more"
    found = gather(_complaint(device, nodes.mates(rank)), len(nodes.of))
    complaint = next((text for text in found if text), "")
    if complaint:
        raise UsageError(f"--exchange shared: {complaint}; give --exchange collective")
    return ""
