"""Gradients in flat buffers, one for each group of ranks over which they are summed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import ShardInfo

REDUCE_ELEMENTS = 1 << 26  # of one collective: bounds what the backend copies at a time


class GradientBuffers:
    """Gives every parameter a `main_grad` in fp32 (fp64 for fp64) that micro-batches accumulate
    into.

    `main_grad` is a view of a flat buffer, so that reducing needs no copy and few messages. Expert
    kernels add to it directly; for parameters of the same dtype `grad` is that view as well, for
    narrower ones a hook moves `grad` there after each backward. Use `zero()` and never
    `zero_grad()`.
    """

    def __init__(self, shards: Iterable[tuple[str, nn.Parameter, ShardInfo]], mesh: Mesh) -> None:
        self.mesh = mesh
        members: dict[tuple[str, torch.dtype], list[nn.Parameter]] = {}
        for _, parameter, info in shards:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            members.setdefault((info.reduce_over, wide), []).append(parameter)
        self.buffers: list[tuple[str, Tensor]] = []  # (group of the mesh, flat gradients)
        for (reduce_over, dtype), parameters in members.items():
            total = sum(p.numel() for p in parameters)
            flat = torch.zeros(total, dtype=dtype, device=parameters[0].device)
            self.buffers.append((reduce_over, flat))
            begin = 0
            for parameter in parameters:
                view = flat[begin : begin + parameter.numel()].view(parameter.shape)
                begin += parameter.numel()
                parameter.main_grad = view
                if parameter.dtype == dtype:
                    parameter.grad = view
                else:
                    parameter.register_post_accumulate_grad_hook(_to_main_grad)

    def zero(self) -> None:
        for _, flat in self.buffers:
            flat.zero_()

    def reduce(self) -> None:
        """Sum over the ranks that share each parameter. Afterwards the copies hold the same
        bits."""
        work = []
        for name, flat in self.buffers:
            group = getattr(self.mesh, name)
            if group.size > 1:
                work += [
                    dist.all_reduce(part, group=group.process_group, async_op=True)
                    for part in flat.split(REDUCE_ELEMENTS)
                ]
        for one in work:
            one.wait()


def _to_main_grad(parameter: nn.Parameter) -> None:
    parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


def squared_norm(shards: Iterable[tuple[str, nn.Parameter, ShardInfo]], mesh: Mesh) -> Tensor:
    """The squared norm of all gradients of the world, each parameter counted once; call on every
    rank, reduced."""
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for _, parameter, info in shards:
        if getattr(mesh, info.copies).rank == 0:  # of the ranks that hold the same, one counts
            total += torch.linalg.vector_norm(parameter.main_grad).double().square()
    if mesh.world.size > 1:
        dist.all_reduce(total, group=mesh.world.process_group)
    return total
