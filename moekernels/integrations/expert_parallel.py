"""transformers' expert parallelism (5.23 and later) over our exchange of rows.

    import moekernels.integrations.transformers
    DistributedConfig(ep_size=8, ep_implementation="moekernels")

Each row goes to the rank of its expert with its routing weight behind it and comes home weighted,
through memory that the ranks share where they are CPUs of one machine, else in one message a peer.
Whatever the experts' own implementation is computes them; `experts_implementation="moekernels"` is
the fast one.

Legend: T tokens, H hidden, K top-k, e local experts, R rows that come to this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moekernels.parallel import expert, tensor
from moekernels.parallel.mesh import Group
from moekernels.parallel.nodes import Nodes, gather, node_name
from moekernels.parallel.peers import share

NAME = "moekernels"

_groups: dict[tuple[int, ...], Group] = {}  # of this process, by their ranks in the run


def group_of(mesh: dist.DeviceMesh) -> Group:
    """The ranks of a mesh of one dimension and, on CPUs of one machine, the memory that they share.
    All of them call it together, before the first layer runs."""
    process_group = mesh.get_group()
    ranks = tuple(dist.get_process_group_ranks(process_group))
    if ranks not in _groups:
        place, size, memory = dist.get_rank(process_group), len(ranks), None
        if size > 1:
            here, device = tuple(range(size)), torch.device(mesh.device_type)
            nodes = Nodes.named(gather(node_name(), size, process_group))
            memory = share([here], place, nodes, "auto", device, process_group)[0].get(here)
        _groups[ranks] = Group(process_group, place, size, ranks, memory)
    return _groups[ranks]


class ExchangedExperts(EPImplementation):
    """Tokens to the ranks of their experts and back. Ranks that share a batch (tp_size > 1) each
    send an equal part of it."""

    def __init__(self, experts, ep_mesh: dist.DeviceMesh, tp_mesh: dist.DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.group, self.batch = group_of(ep_mesh), group_of(tp_mesh)
        self.local_experts = int(experts.num_experts)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, K] of all experts, top_k_weights [T, K] -> [T, H]
        in the experts' dtype."""
        tokens = hidden_states.shape[0]
        x, ids, weights = hidden_states, top_k_index, top_k_weights
        if self.batch.size > 1:
            more = -tokens % self.batch.size
            x, weights = (
                tensor.split_tokens(_longer(t, more, 0.0), self.batch) for t in (x, weights)
            )
            ids = tensor.own_part(_longer(ids, more, -1), self.batch)
        plan = expert.ExchangePlan.make(ids, self.local_experts, self.group)
        rows, row_weights, offsets = expert.dispatch(x, weights, plan)
        y = self._computed(rows, row_weights.to(top_k_weights.dtype), offsets)
        out = expert.combine(y, plan)
        if self.group.memory is not None:
            self.group.memory.host.take_stamps()  # nobody reads when rows flew
        return tensor.join_tokens(out, self.batch)[:tokens]

    def _computed(self, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """rows [R, H] in the order of the local experts, weights [R] -> weighted results [R, H]."""
        if not rows.shape[0]:
            # One row of zeros, whose result is dropped: backward must pass through the experts, and
            # what gathers their parameters through a forward that ran.
            x, one = rows.sum(0, keepdim=True), weights.sum(0, keepdim=True)[None]
            return self.experts_forward(x, offsets.new_zeros(1, 1), one)[:0]
        local = torch.arange(self.local_experts, device=rows.device)
        ids = local.repeat_interleave(offsets.diff(), output_size=rows.shape[0])
        return self.experts_forward(rows, ids[:, None], weights[:, None])


def _longer(x: Tensor, more: int, value: float) -> Tensor:
    """x [T, ...] with `more` rows of a value behind it."""
    return torch.nn.functional.pad(x, (0, 0, 0, more), value=value)


def register() -> None:
    """Make `ep_implementation="moekernels"` known; calling it again changes nothing."""
    EPImplementationInterface.register(NAME, ExchangedExperts)


register()
