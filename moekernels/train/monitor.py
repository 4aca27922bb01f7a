"""Watches a run's experts: which are chosen together, how many nodes a token visits, and what of it
is left for `moekernels experts`.

Legend: L layers with experts, E experts, P ranks that share a layer's experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekernels.balance.record import Record
from moekernels.nn.transformer import StageModel
from moekernels.nn.watch import Watch
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.tensor import all_reduce
from moekernels.train.moves import Moves

EVERY = 10  # steps between two that are watched
MOST = 1 << 24  # numbers of pairs [L, E, E] that are kept: 128 MiB


class Monitor:
    """One rank's part; every rank calls every method."""

    def __init__(
        self,
        mesh: Mesh,
        chunks: Sequence[StageModel],
        rows: Sequence[slice],
        moves: Moves,
        last_step: int,
    ) -> None:
        self.mesh, self.chunks, self.rows, self.moves = mesh, chunks, rows, moves
        self.last_step = last_step
        layers, experts = moves.slot_of.shape
        self.shape = (layers, experts, experts)
        self.possible = layers * experts * experts <= MOST
        self.pairs = torch.zeros(self.shape if self.possible else (0,), dtype=torch.int64)
        self.watching: list[Watch] = []

    def begin(self, step: int) -> None:
        """Before a step's flush: watch it, or not. Where nodes count, each look's steps are
        watched."""
        self.watching = []  # of an attempt at the step that did not fit
        several = any(len(set(nodes)) > 1 for nodes in self.moves.node_of)
        due = step % EVERY == 0 or step == self.last_step
        due |= several and self.moves.looks_at(step)
        if not (due and self.possible):
            return
        experts, each = self.shape[1], self.shape[1] // self.mesh.layout.ep
        for chunk, layers in zip(self.chunks, self.rows):
            for moe, slots, nodes in zip(
                chunk.experts_layers, self.moves.slot_of[layers], self.moves.node_of[layers]
            ):
                node_of = torch.tensor(nodes)[slots // each]
                moe.watch = Watch(experts, node_of, self.mesh.device)
                self.watching.append(moe.watch)

    def end(self, shown: bool) -> dict:
        """Behind a watched step's flush: what its line shall say. `shown`: it is one of those that
        the run's picture shows."""
        if not self.watching:
            return {}
        own = torch.zeros(self.shape, dtype=torch.float64, device=self.mesh.device)
        nodes = torch.stack([watch.nodes for watch in self.watching]).sum(0)
        watches = iter(self.watching)
        for chunk, layers in zip(self.chunks, self.rows):
            for place, moe in zip(range(layers.start, layers.stop), chunk.experts_layers):
                own[place] = next(watches).pairs
                moe.watch = None
        self.watching = []
        everything = all_reduce(torch.cat([own.flatten(), nodes]), self.mesh.world).cpu()
        pairs = everything[:-2].view(self.shape)
        self.moves.saw_pairs(pairs)
        if shown:
            self.pairs += pairs.long()
        distinct, tokens = everything[-2:].tolist()
        return {
            "nodes_a_token": distinct / max(tokens, 1),
            "together_on_a_rank": self._on_a_rank(pairs),
        }

    def _on_a_rank(self, pairs: Tensor) -> float:
        """Of all pairs of choices of a token, the share whose experts lie on one rank."""
        ranks = self.moves.slot_of // (self.shape[1] // self.mesh.layout.ep)
        apart = 1 - torch.eye(self.shape[1], dtype=torch.float64)
        alike = (ranks[:, :, None] == ranks[:, None, :]) * apart
        return (pairs * alike).sum().item() / max((pairs * apart).sum().item(), 1)

    def record(self, loads: Tensor) -> Record | None:
        """What the run leaves, for loads [L, E] of its last steps; None where it is too large to
        have been watched."""
        if not self.possible:
            return None
        return Record(
            loads.cpu().double(), self.pairs, self.moves.slot_of, torch.tensor(self.moves.node_of)
        )
