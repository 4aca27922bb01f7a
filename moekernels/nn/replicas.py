"""Copies of experts compute beside their owners: weights come to them after an update, gradients
return before one, each in one message a peer for all layers.

What lies where, and who sends to which copy, `balance.replicas` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moekernels.balance.replicas import Copy, lanes
from moekernels.nn.moe import MoE
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import main_grad_of
from moekernels.parallel.parcels import swap

Parts = dict[int, list[Tensor]]  # peer -> flat tensors


class Replicas:
    """Of some layers of this rank. Ranks that exchange rows call each method together."""

    def __init__(self, mesh: Mesh, layers: Sequence[MoE]) -> None:
        self.mesh, self.layers = mesh, layers
        self.copies: list[Sequence[Copy]] = [()] * len(layers)
        self.homes: list[dict[int, tuple[int, int]]] = [{}] * len(layers)  # expert: rank, place

    def hold(
        self, layer: int, copies: Sequence[Copy], slot_of: Tensor, node_of: Sequence[int]
    ) -> None:
        """The layer of that number here has these copies from now on; experts lie by slot_of [E],
        ranks on the nodes node_of [P]. `refresh` brings the weights."""
        mesh, moe = self.mesh, self.layers[layer]
        each, spare = moe.experts.count, moe.experts.spare.count
        self.copies[layer] = copies
        self.homes[layer] = {c.expert: divmod(int(slot_of[c.expert]), each) for c in copies}
        source, etp = mesh.exchange.rank, mesh.layout.etp
        moe.deal(lanes(copies, slot_of, node_of, spare, source, etp))

    @torch.no_grad()
    def refresh(self) -> None:
        """Weights of all copies, as their owners have them."""
        owners, copies, like = self._parts(lambda w: w)
        if like is not None:
            for copy, came in swap(owners, copies, self.mesh.exchange, like):
                copy.copy_(came)

    @torch.no_grad()
    def bring_home(self) -> None:
        """Add the copies' gradients to their owners', in rank order; the copies' begin anew."""
        owners, copies, like = self._parts(main_grad_of)
        if like is None:
            return
        for own, came in swap(copies, owners, self.mesh.exchange, like):
            own.add_(came)
        for grads in copies.values():
            for grad in grads:
                grad.zero_()

    def _parts(self, of: Callable[[Tensor], Tensor]) -> tuple[Parts, Parts, Tensor | None]:
        """What owners here and what copies here share with each peer, and a tensor like all; None
        where no layer has copies."""
        mesh = self.mesh
        like: Tensor | None = None
        owners: Parts = {}
        copies: Parts = {}

        def add(parts: Parts, peer: int, weights: Mapping[str, Tensor], place: int) -> None:
            there = peer * mesh.layout.etp + mesh.etp_index
            for key in sorted(weights):
                parts.setdefault(there, []).append(of(weights[key])[place].view(-1))

        for moe, chosen, homes in zip(self.layers, self.copies, self.homes):
            for copy in chosen:
                like = of(moe.experts.spare.weights["w1"])
                rank, place = homes[copy.expert]
                if rank == mesh.ep_index:
                    add(owners, copy.rank, moe.experts.weights, place)
                if copy.rank == mesh.ep_index:
                    add(copies, rank, moe.experts.spare.weights, copy.place)
        return owners, copies, like
