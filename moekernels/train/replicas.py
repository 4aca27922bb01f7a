"""A run's copies of hot experts: which there are, when that changes, and what it evens.

Every rank decides alike, from loads that are sums over all ranks. Legend: L layers with experts, E
experts, P ranks that share a layer's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moekernels.balance import placement, replan, replicas
from moekernels.balance.replicas import Copy
from moekernels.errors import UsageError
from moekernels.nn.replicas import Replicas
from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.tensor import all_reduce
from moekernels.run import files as cfg
from moekernels.train.moves import Moves


class HotExperts:
    """The copies of all layers; `of` [L] lists."""

    def __init__(
        self,
        run: cfg.RunConfig,
        mesh: Mesh,
        chunks: Sequence[StageModel],
        rows: Sequence[slice],
        moves: Moves,
    ) -> None:
        """`rows`: the layers that are each chunk's, among all with experts."""
        self.mesh, self.moves, self.spare = mesh, moves, run.train.replicas
        self.ranks, self.units = mesh.layout.ep, replicas.units_of(mesh.layout.exchange)
        self.every = moves.rule.every or replan.AUTO_STEPS
        self.numbers = [n for part in rows for n in range(part.start, part.stop)]
        self.layers = [moe for chunk in chunks for moe in chunk.experts_layers]
        self.held = Replicas(mesh, self.layers)
        self.of: list[list[Copy]] = [[] for _ in moves.slot_of]
        self.slot_of = moves.slot_of  # that they were chosen for
        self.loads = torch.zeros(moves.slot_of.shape, dtype=torch.float64)
        self.said = False

    def facts(self) -> dict:
        """What a checkpoint must know: a run goes on with the copies that it had."""
        if not self.spare:
            return {}
        return {"replicas": {"copies": self.of, "loads": self.loads.tolist()}}

    def restore(self, facts: dict, layout: dict, where: str) -> None:
        """As a checkpoint left it, behind its tensors and placement; under another layout, or with
        less room, nothing is copied until the next look."""
        if not self.spare or "replicas" not in facts:
            return
        same = all(layout.get(key) == getattr(self.mesh.layout, key) for key in ("ep", "etp"))
        if not same:
            return
        left, slots = facts["replicas"], self.moves.slot_of
        try:
            copies, loads = left["copies"], torch.tensor(left["loads"], dtype=torch.float64)
        except (TypeError, KeyError, ValueError):
            copies, loads = None, torch.empty(0)
        found = replicas.from_facts(copies, slots, self.ranks, self.units, where)
        if loads.shape != self.loads.shape:
            raise UsageError(f"{where}: its loads are not of {len(slots)} layers; it was changed")
        if all(copy.place < self.spare for layer in found for copy in layer):
            self.loads = loads
            self._hold(found)

    def _hold(self, copies: list[list[Copy]]) -> None:
        """Have these from now on."""
        self.of, self.slot_of = copies, self.moves.slot_of
        for place, number in enumerate(self.numbers):
            nodes = self.moves.node_of[number]
            self.held.hold(place, copies[number], self.slot_of[number], nodes)
        self.held.refresh()

    def bring_home(self) -> None:
        """Behind a flush, before gradients are summed over the owners' copies on other ranks."""
        self.held.bring_home()

    def updated(self, loads: Tensor) -> None:
        """Behind an update: weights have changed; loads [L, E] are the step's."""
        if self.spare:
            self.loads += loads.cpu()
            self.held.refresh()

    def line(self) -> dict:
        """What a step's line shall say of its flush, whose own rows were counted as they were
        sent."""
        if not self.spare:
            return {}
        sent = torch.zeros(len(self.of), self.ranks, dtype=torch.float64, device=self.mesh.device)
        for number, moe in zip(self.numbers, self.layers):
            sent[number] += moe.sent
            moe.sent = torch.zeros_like(moe.sent)
        rows = all_reduce(sent, self.mesh.world)
        mean = rows.mean(1)
        uneven = torch.where(mean > 0, rows.amax(1) / mean, 1.0).max().item()
        return {"replicas": sum(map(len, self.of)), "rank_load_with_replicas": uneven}

    def look(self, step: int, last: bool, say: Callable[[str], None]) -> dict:
        """After a step, and after experts have moved: choose anew if it is time; what the step's
        line shall say. Every rank calls it; rank 0 says why it copies nothing."""
        if not self.spare or last or step % self.every:
            return {}
        moved = not torch.equal(self.slot_of, self.moves.slot_of)
        loads, slots = self.loads, self.moves.slot_of
        after = [
            replicas.better(row, slot, self.ranks, self.spare, self.units, [] if moved else now)
            for row, slot, now in zip(loads, slots, self.of)
        ]
        self.loads = torch.zeros_like(loads)
        if not any(after) and not self.said and self.mesh.rank == 0:
            self.said = True
            say(self._why_not(step, loads))
        changed = after != self.of
        if changed or moved:
            self._hold(after)
        return {"replicated": self._shown()} if changed else {}

    def _shown(self) -> list[list]:
        """[layer, expert, its owner, ranks of copies], layers counted from 1."""
        each, found = self.slot_of.shape[1] // self.ranks, []
        for number, (copies, slots) in enumerate(zip(self.of, self.slot_of), start=1):
            for expert in sorted({copy.expert for copy in copies}):
                there = sorted(copy.rank for copy in copies if copy.expert == expert)
                found.append([number, expert, int(slots[expert]) // each, there])
        return found

    def _why_not(self, step: int, loads: Tensor) -> str:
        mean = loads.sum(1) / self.ranks
        hottest = torch.where(mean > 0, loads.amax(1) / mean, 0.0).max().item()
        ranks = placement.rank_loads(loads, self.moves.slot_of, self.ranks)
        busiest = torch.where(mean > 0, ranks.amax(1) / mean, 1.0).max().item()
        evens = "" if self.moves.rule.every else f"; --replan {self.every} evens it"
        return (
            f"replicas none at step {step}: placement suffices, the hottest expert alone has "
            f"{hottest:.2f} of a rank's mean, the busiest rank {busiest:.2f}{evens}"
        )
