"""The mixture-of-experts layer. Legend: T tokens, H hidden, E experts, K top-k."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from moekernels.balance.replicas import slots_of_owners
from moekernels.model.decoder import DecoderSpec
from moekernels.nn.dispatcher import Dispatcher, PartedDispatcher, StraightDispatcher
from moekernels.nn.experts import Experts
from moekernels.nn.ffn import SharedExpert
from moekernels.nn.home import Home
from moekernels.nn.norm import RMSNorm
from moekernels.nn.router import RouteHook, Router
from moekernels.nn.watch import Watch
from moekernels.parallel import turns
from moekernels.parallel.expert import Kept
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.tensor import join_tokens, split_tokens

# The module of each kind in `model.beside`: x [T/tp, H] ([T, H] where replicated) -> the same.
BESIDE: dict[str, type] = {"shared": SharedExpert}


class MoE(nn.Module):
    def __init__(
        self,
        config: DecoderSpec,
        mesh: Mesh,
        layer: int,
        dispatcher: Dispatcher,
        home: Home,
        *,
        name: str,
    ) -> None:
        super().__init__()
        self.router = Router(config, mesh, layer, home, name=f"{name}.router")
        self.experts = Experts(config, mesh, home, name=f"{name}.experts")
        self.beside = config.beside
        for kind in self.beside:
            self.add_module(kind, BESIDE[kind](config, mesh, home, name=f"{name}.{kind}"))
        self.dispatcher = dispatcher
        self.first_held = mesh.ep_index * (config.num_experts // mesh.layout.ep)
        self.ranks, self.local = mesh.layout.ep, self.experts.count + self.experts.spare.count
        # [W, E] int32: where each expert lies for the tokens of each of W lanes, which own tokens
        # are dealt to in turn, spare slots counted; None: expert x in slot x, and no spare ones.
        self.slots: Tensor | None = None
        self.sent = torch.zeros(0, dtype=torch.int64)  # own rows to each rank, with spare slots
        if self.experts.spare.count:
            self.sent = torch.zeros(self.ranks, dtype=torch.int64)
            self._deal_to_owners(torch.arange(config.num_experts))
        self.watch: Watch | None = None  # of steps that are looked at
        self.tp, self.replicated = mesh.tp, not home.sequence_parallel

    @property
    def posts(self) -> bool:
        """Whether rows are posted, all at once, and then waited for."""
        return self.dispatcher.posts and self.dispatcher.parts == 1

    def place(self, slot_of: Tensor) -> None:
        """Experts lie by slot_of [E] int64 from now on, as `balance.placement` has it: slot s is
        place s % e of the expert-parallel rank s // e. Moves no weights."""
        expert_at = torch.argsort(slot_of)
        held = expert_at[self.first_held :][: self.experts.count].tolist()
        self.experts.hold(held)
        self._deal_to_owners(slot_of)

    def _deal_to_owners(self, slot_of: Tensor) -> None:
        self.deal(slots_of_owners(slot_of, self.ranks, self.experts.spare.count)[None])

    def deal(self, lanes: Tensor) -> None:
        """Tokens go to experts and their copies by lanes [W, E] int64 from now on, as
        `balance.replicas` has them."""
        self.slots = lanes.to(self.experts.w1.device, torch.int32)

    def _slots_of(self, ids: Tensor) -> Tensor:
        """ids [T, K] of experts -> of the slots that their rows go to; -1 stays."""
        if self.slots is None:
            return ids
        chosen = ids.clamp_min(0).long()
        lane = torch.arange(len(ids), device=ids.device)[:, None] % len(self.slots)
        return torch.where(ids < 0, ids, self.slots[lane, chosen])

    def _between(self, x: Tensor, kept: Kept | None) -> dict[str, Any] | None:
        """The experts for a way in one go, which passes that take turns cannot leave at a border,
        nor one that is computed again repeat."""
        if kept is not None or not self.dispatcher.straight or turns.running():
            return None
        return self.experts.between(x)

    @torch.no_grad()
    def _count(self, slots: Tensor) -> None:
        rank_of = torch.where(slots < 0, -1, slots // self.local).flatten()
        each = torch.arange(self.ranks, dtype=rank_of.dtype, device=rank_of.device)
        self.sent = self.sent.to(rank_of.device) + (rank_of == each[:, None]).sum(1)

    def forward(
        self,
        norm: RMSNorm,
        x: Tensor,
        added: Tensor,
        valid: Tensor | None,
        hook: RouteHook | None = None,
        segments: Tensor | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and added [T/tp, H] ([T, H] where replicated), valid [T/tp] -> their sum with what the
        experts make of its norm, and of own tokens the scores' sum [1, E], the counts [1, E] and
        the z-loss' sum [1]; S of each with segments [S+1]."""
        x, total, gate = self.router.behind(norm, x, added, valid, hook, segments)
        weights, ids, *sums = gate
        own = split_tokens(x, self.tp) if self.replicated else x
        again = kept is not None and kept.replaying
        if self.watch is not None and not again:
            self.watch.see(ids)
        ids = self._slots_of(ids)
        if self.experts.spare.count and torch.is_grad_enabled() and not again:
            self._count(ids)
        if self.dispatcher.parts > 1 and kept is None:  # what is computed again is not cut
            y = cast(PartedDispatcher, self.dispatcher).in_parts(own, ids, weights, self.experts)
        elif (ffn := self._between(own, kept)) is not None:
            y = cast(StraightDispatcher, self.dispatcher).through(own, ids, weights, ffn)
        else:
            rows, routing = self.dispatcher.dispatch(own, ids, weights, kept)
            y = self.dispatcher.combine(self.experts(rows, routing), routing)
        if self.replicated:
            y = join_tokens(y, self.tp)
        for kind in self.beside:
            y = y + getattr(self, kind)(x)
        return (total + y, *sums)
