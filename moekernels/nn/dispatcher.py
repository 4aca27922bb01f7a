"""Dispatchers bring each token's rows to its experts and the results back. They hold no parameters.

    rows, routing = dispatcher.dispatch(x, ids, weights)
    y             = dispatcher.combine(experts(rows, routing), routing)

Legend: T tokens, H hidden, K top-k, E experts, e local experts, R routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from moekernels import ops
from moekernels.errors import UsageError
from moekernels.model import dispatch
from moekernels.model.router import RouterSpec
from moekernels.parallel import border, chunks, expert, straight
from moekernels.parallel.exchange import Part
from moekernels.parallel.mesh import Group, Mesh


@dataclass(frozen=True, eq=False)
class Routed:
    """How the rows that the local experts see lie: rows[offsets[i]:offsets[i+1]] are those of local
    expert i.

    Where `token_of` is given, the rows are a view: row r is x[token_of[r]].
    """

    weights: Tensor  # [R]
    offsets: Tensor  # [e+1] int64
    token_of: Tensor | None  # [R] int32
    row_of: Tensor | None  # [T, K] int32
    way_back: Any
    own_rows: int | None = None  # of them for own experts; the others are for copies. None: all


PartOfExperts = Callable[[Tensor, Routed, Part], Tensor]


class Dispatcher(Protocol):
    """`parts`: into how many an exchange is cut; where there are several it is a
    `PartedDispatcher`. `posts`: whether rows are posted and then waited for. `straight`: whether
    products of the experts may read rows while they come, and bring their results home: then it is
    a `StraightDispatcher`."""

    parts: int
    posts: bool
    straight: bool

    def dispatch(
        self, x: Tensor, ids: Tensor, weights: Tensor, kept: expert.Kept | None = None
    ) -> tuple[Tensor, Routed]:
        """x [T, H], ids and weights [T, K] -> rows and how they lie."""

    def combine(self, rows: Tensor, routing: Routed) -> Tensor:
        """Weighted rows [R, H] -> [T, H]."""


class PartedDispatcher(Dispatcher, Protocol):
    def in_parts(self, x: Tensor, ids: Tensor, weights: Tensor, experts: PartOfExperts) -> Tensor:
        """The whole way, [T, H] -> [T, H], one part after the other."""


class StraightDispatcher(Dispatcher, Protocol):
    def through(self, x: Tensor, ids: Tensor, weights: Tensor, ffn: dict[str, Any]) -> Tensor:
        """The whole way, [T, H] -> [T, H], `ffn` as `parallel.straight.experts` takes it."""


class LocalDispatcher:
    """All experts are here: nothing moves, the rows are a view of x."""

    parts = 1
    posts = straight = False

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, x: Tensor, ids: Tensor, weights: Tensor, kept: expert.Kept | None = None
    ) -> tuple[Tensor, Routed]:
        routing = ops.route(ids, self.num_experts)
        row_weights = ops.permute_weights(weights, routing)
        return x, Routed(row_weights, routing.offsets, routing.token_of, routing.row_of, None)

    def combine(self, rows: Tensor, routing: Routed) -> Tensor:
        return ops.combine(rows, routing.row_of, routing.token_of)


class AllToAllDispatcher:
    """Each row goes to the rank that holds its expert; under ETP to all that hold a shard of it."""

    posts = True

    def __init__(
        self,
        mesh: Mesh,
        num_experts: int,
        layer: int = 0,
        parts: int = 1,
        spare: int = 0,
        inside: Group | None = None,
    ) -> None:
        """`inside`: the ranks of a node, whose experts ids are of then, and somebody else's
        exchange brings the gradients home."""
        self.group, self.layer, self.last = inside or mesh.exchange, layer, inside is None
        self.own = num_experts // mesh.layout.ep
        self.parts = min(parts, self.own)
        self.etp = mesh.layout.etp
        self.local_experts = self.own + spare

    def dispatch(
        self, x: Tensor, ids: Tensor, weights: Tensor, kept: expert.Kept | None = None
    ) -> tuple[Tensor, Routed]:
        plan, weights = self._plan(ids, weights, kept)
        rows, row_weights, offsets = expert.dispatch(x, weights, plan, kept)
        own = self._own_rows(plan, plan.whole)
        return rows, Routed(row_weights, offsets, None, None, plan, own)

    @property
    def straight(self) -> bool:
        return self.group.device_memory is not None and self.own == self.local_experts

    def through(self, x: Tensor, ids: Tensor, weights: Tensor, ffn: dict[str, Any]) -> Tensor:
        plan, weights = self._plan(ids, weights)
        return straight.experts(x, weights, plan, **ffn)

    def _own_rows(self, plan: expert.ExchangePlan, part: Part) -> int | None:
        """Of the rows that came of a part, those for own experts."""
        if self.own == self.local_experts:
            return None
        return int(plan.came(part)[:, : max(0, self.own - part.first)].sum())

    def _plan(
        self, ids: Tensor, weights: Tensor, kept: expert.Kept | None = None
    ) -> tuple[expert.ExchangePlan, Tensor]:
        if self.etp > 1:
            ids, weights = self._to_shards(ids), weights.repeat_interleave(self.etp, dim=1)
        make = expert.ExchangePlan.make
        plan = make(ids, self.local_experts, self.group, kept, self.layer)
        plan.last = self.last
        return plan, weights

    def in_parts(self, x: Tensor, ids: Tensor, weights: Tensor, experts: PartOfExperts) -> Tensor:
        """The whole way, [T, H] -> [T, H]: rows of some experts travel while others compute."""
        plan, weights = self._plan(ids, weights)
        parts, tokens = plan.parts(self.parts), []
        posted = chunks.post(x, weights, plan, parts)
        for part in parts:
            rows, row_weights, offsets = chunks.arrive(posted, part)
            own = self._own_rows(plan, part)
            y = experts(rows, Routed(row_weights, offsets, None, None, None, own), part)
            tokens.append(chunks.give(y, posted, part))
        return chunks.home(tokens, posted)

    def combine(self, rows: Tensor, routing: Routed) -> Tensor:
        return expert.combine(rows, routing.way_back)

    def _to_shards(self, ids: Tensor) -> Tensor:
        """ids [T, K] of experts -> [T, K*etp] of shards, numbered as the peers hold them."""
        e = self.local_experts
        first = torch.div(ids, e, rounding_mode="floor") * (e * self.etp) + ids % e
        shards = first[:, :, None] + e * torch.arange(self.etp, dtype=ids.dtype, device=ids.device)
        return torch.where(ids[:, :, None] < 0, -1, shards).flatten(1)


class AllGatherDispatcher:
    """Every rank sees all tokens of the group and computes its own experts: less traffic where K
    exceeds ep."""

    parts = 1
    posts = straight = False

    def __init__(
        self, mesh: Mesh, num_experts: int, layer: int = 0, parts: int = 1, spare: int = 0
    ) -> None:
        if spare:
            raise UsageError("the all_gather dispatcher knows no copies of experts; use all_to_all")
        self.group = mesh.exchange
        self.local_experts = num_experts // mesh.layout.ep
        self.first_expert = mesh.ep_index * self.local_experts
        self.alike = mesh.tokens_alike

    def dispatch(
        self, x: Tensor, ids: Tensor, weights: Tensor, kept: expert.Kept | None = None
    ) -> tuple[Tensor, Routed]:
        sizes = expert.token_counts(x, self.group, alike=self.alike, kept=kept)
        x, weights, ids = expert.gather_tokens(x, weights, ids, sizes, self.group, kept)
        local = ids - self.first_expert
        local = torch.where((local >= 0) & (local < self.local_experts), local, -1)
        routing = ops.route(local, self.local_experts)
        row_weights = ops.permute_weights(weights, routing)
        token_of = routing.token_of
        if x.device.type == "cpu":  # where looking costs nothing: leave the unused rows out
            rows = int(routing.offsets[-1])
            token_of, row_weights = token_of[:rows], row_weights[:rows]
        return x, Routed(row_weights, routing.offsets, token_of, routing.row_of, sizes)

    def combine(self, rows: Tensor, routing: Routed) -> Tensor:
        partial = ops.combine(rows, routing.row_of, routing.token_of)
        return expert.sum_tokens(partial, routing.way_back, self.group)


class HierarchicalDispatcher:
    """One copy of a token goes to each node that holds one of its experts, and from there to their
    ranks; results are summed on the node, then node by node at home."""

    posts = straight = False  # in one go: it is on its way twice

    def __init__(
        self, mesh: Mesh, num_experts: int, layer: int = 0, parts: int = 1, spare: int = 0
    ) -> None:
        if mesh.flat:
            raise UsageError(f"--dispatcher hierarchical: {mesh.flat}; give all_to_all")
        self.rail, self.layer = mesh.rail, layer
        self.inside = AllToAllDispatcher(mesh, num_experts, layer, parts, spare, mesh.inside)
        self.local_experts = self.inside.local_experts
        self.node_experts = self.local_experts * (mesh.layout.ep // mesh.rail.size)
        self.parts = self.inside.parts

    def dispatch(
        self, x: Tensor, ids: Tensor, weights: Tensor, kept: expert.Kept | None = None
    ) -> tuple[Tensor, Routed]:
        x, weights, ids, plan = border.cross(
            x, weights, ids, self.node_experts, self.rail, kept, self.layer
        )
        rows, routed = self.inside.dispatch(x, ids, weights, kept)
        return rows, replace(routed, way_back=(routed, plan))

    def combine(self, rows: Tensor, routing: Routed) -> Tensor:
        routed, plan = routing.way_back
        return expert.combine(self.inside.combine(rows, routed), plan)

    def in_parts(self, x: Tensor, ids: Tensor, weights: Tensor, experts: PartOfExperts) -> Tensor:
        """As `AllToAllDispatcher` has it, within the node."""
        x, weights, ids, plan = border.cross(
            x, weights, ids, self.node_experts, self.rail, None, self.layer
        )
        return expert.combine(self.inside.in_parts(x, ids, weights, experts), plan)


DISPATCHERS: dict[str, type] = {
    "all_to_all": AllToAllDispatcher,
    "all_gather": AllGatherDispatcher,
    "hierarchical": HierarchicalDispatcher,
}


def make_dispatcher(
    kind: str, mesh: Mesh, spec: RouterSpec, layer: int = 0, parts: int = 1, spare: int = 0
) -> Dispatcher:
    """The dispatcher that `model.dispatch` chooses for a kind, one of its `WAYS` or `auto`; what
    it says of itself names the layer. With `spare` slots ids count those of each rank, too, behind
    its own experts'."""
    if kind != "auto" and kind not in DISPATCHERS:
        raise UsageError(f"dispatcher {kind!r}; use one of auto, {', '.join(DISPATCHERS)}")
    if mesh.exchange.size == 1:
        return LocalDispatcher(spec.num_experts)
    name = dispatch.choose(kind, spec, mesh.layout, mesh.rail.size)
    return DISPATCHERS[name](mesh, spec.num_experts, layer, parts, spare)
