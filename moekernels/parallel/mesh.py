"""One world of ranks, factored twice: for the dense layers and, folded, for the experts.

    world = tp * dp * pp = etp * ep * edp * pp

Both factorisations share the pipeline stages. Inside a stage of S = tp*dp ranks, rank s is

    s = dp_index * tp + tp_index = (edp_index * ep + ep_index) * etp + etp_index

so tensor-parallel ranks are neighbours, and so are the ep*etp ranks that exchange rows. Places are
dealt to ranks node by node: in whatever order a launcher starts them, neighbours share a node where
they can, and pipeline stages lie across nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moekernels.errors import UsageError
from moekernels.model.layout import Layout
from moekernels.parallel import nccl
from moekernels.parallel.nccl import Row
from moekernels.parallel.nodes import Nodes, gather, node_name
from moekernels.parallel.peers import PeerMemory, share
from moekernels.parallel.symmetric import SymmetricMemory, why_not_symmetric

if TYPE_CHECKING:
    from moekernels.parallel.bound import Bound

GROUPS = (
    "world", "stage", "tp", "dp", "pp", "exchange", "inside", "rail", "edp", "expert_copies",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Ranks that talk to one another. `process_group` is None where the group is one rank;
    `memory` is what they share where they are of one machine; `far` are the places in the group of
    those on other nodes than this one's."""

    process_group: dist.ProcessGroup | None
    rank: int
    size: int
    ranks: tuple[int, ...]
    memory: PeerMemory | None = None
    options: Any = None  # of its process group, for another of the same ranks
    device_memory: SymmetricMemory | None = None  # where their GPUs share memory, for rows
    bound: Bound | None = None  # of the rows that a rank takes in, where it has one
    far: tuple[int, ...] = ()


class Mesh:
    """This rank's place in a layout and its process groups.

    tp, dp, pp    the dense factorisation
    exchange      the ep*etp ranks that exchange rows; its index is ep_index*etp + etp_index
    inside, rail  of the exchange, the ranks of this node, and those in this one's place on every
                  node; `flat` says why the exchange is not parted so: it is `inside`, then
    edp           the copies of this rank's experts
    expert_copies the ranks that hold the same experts, their etp shards included (edp*etp)
    stage, world  all ranks of the stage, and of the run
    ends          with `ends`: the dp ranks of the first and of the last stage, which hold a tied
                  embedding; elsewhere a stage's own
    self          this rank
    order         the rank in each place; the world alone is in the launcher's order
    members       all groups of the run, by those names

    `exchange_mode` is one of `peers.MODES`; `alone` says why ranks share no memory, where they do
    not. `nodes` declares which ranks share a node, where that is not to be found out.
    """

    tp: Group
    dp: Group
    pp: Group
    exchange: Group
    inside: Group
    rail: Group
    edp: Group
    expert_copies: Group
    stage: Group
    ends: Group
    world: Group
    _rows: dict[str, Row] = {}  # noqa: RUF012, never written to

    def __init__(
        self,
        layout: Layout,
        rank: int | None = None,
        device: torch.device | str = "cpu",
        exchange_mode: str = "auto",
        nodes: Nodes | None = None,
        nccl_rows: dict[str, Row] | None = None,
        *,
        ends: bool = False,
    ) -> None:
        self.layout = layout
        self.device = torch.device(device)
        if layout.world == 1:
            rank = 0
        else:
            if not dist.is_initialized():
                raise RuntimeError(
                    f"a mesh of {layout.world} ranks needs torch.distributed initialised"
                )
            layout.validate(world=dist.get_world_size())
            rank = dist.get_rank() if rank is None else rank
        self.rank = rank
        self._made: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup | None] = {}
        self._rows = nccl_rows or {}
        self.nodes = nodes or Nodes.named(gather(node_name(), layout.world))
        self.order = self.nodes.order()
        self._place(ends)
        shared: dict[tuple[int, ...], PeerMemory] = {}
        self.alone = ""
        if layout.world > 1:
            several = list(dict.fromkeys(ranks for _, ranks in self._made if len(ranks) > 1))
            on_gpus = self.device.type == "cuda" and exchange_mode != "collective"
            if on_gpus:
                self.alone = why_not_symmetric(self.device, rank, self.nodes, exchange_mode)
            else:
                shared, self.alone = share(several, rank, self.nodes, exchange_mode, self.device)
            if exchange_mode == "shared" and not self.nodes.together(self.exchange.ranks):
                raise UsageError(
                    f"--exchange shared: ranks {list(self.exchange.ranks)} exchange rows and are "
                    f"not of one node; give auto or collective"
                )
        self.self = Group(None, 0, 1, (rank,))
        for name in (*GROUPS, *(["ends"] if ends else [])):
            group = getattr(self, name)
            far = set(group.ranks).difference(self.nodes.mates(rank))
            places = tuple(i for i, peer in enumerate(group.ranks) if peer in far)
            setattr(self, name, replace(group, memory=shared.get(group.ranks), far=places))
        if layout.world > 1 and on_gpus and not self.alone and self.exchange.size > 1:
            memory = SymmetricMemory(self.exchange.process_group, self.device)
            self.exchange = replace(self.exchange, device_memory=memory)

    def _place(self, ends: bool) -> None:
        """This rank's indices and groups. Every rank walks through every group in the same order,
        as new_group demands.
        """
        layout = self.layout
        self.pp_index, s = divmod(self.order.index(self.rank), layout.stage_ranks)
        self.dp_index, self.tp_index = divmod(s, layout.tp)
        self.edp_index, folded = divmod(s, layout.exchange)
        self.ep_index, self.etp_index = divmod(folded, layout.etp)
        keys: dict[str, Callable[[int, int], object]] = {
            "stage": lambda stage, s: stage,
            "tp": lambda stage, s: (stage, s // layout.tp),
            "dp": lambda stage, s: (stage, s % layout.tp),
            "pp": lambda stage, s: s,
            "exchange": lambda stage, s: (stage, s // layout.exchange),
            "edp": lambda stage, s: (stage, s % layout.exchange),
            "expert_copies": lambda stage, s: (stage, s // layout.etp % layout.ep),
        }
        if ends:
            last = layout.pp - 1
            keys["ends"] = lambda stage, s: (0 if stage == last else stage, s % layout.tp)
        self.members = {"world": [tuple(range(layout.world))]}
        for name, key in keys.items():  # ranks that share a key(stage, place in the stage)
            found: dict[object, list[int]] = {}
            for place, rank in enumerate(self.order):
                found.setdefault(key(*divmod(place, layout.stage_ranks)), []).append(rank)
            self.members[name] = [tuple(ranks) for ranks in found.values()]
        for name, groups in self.members.items():
            setattr(self, name, self._group(name, groups))
        self._part_exchange()

    def _part_exchange(self) -> None:
        """Its groups within nodes and across them, over communicators as the exchange's own."""
        parted = [self.nodes.split(ranks) for ranks in self.members["exchange"]]
        sizes = {len(mates) for nodes in parted for mates in nodes}
        self.flat = ""
        if sizes == {self.layout.exchange}:
            self.flat = "ranks that exchange rows are of one node"
        elif len(sizes) > 1:
            self.flat = "nodes hold different numbers of the ranks that exchange rows"
        elif sizes == {1}:
            self.flat = "ranks that exchange rows are alone on their nodes"
        elif sizes.pop() % self.layout.etp:
            self.flat = "an expert's etp shards lie on several nodes"
        self.inside, self.rail = self.exchange, Group(None, 0, 1, (self.rank,))
        if not self.flat:
            inside = [mates for nodes in parted for mates in nodes]
            self.inside = self._group("exchange", inside)
            self.rail = self._group("exchange", [r for nodes in parted for r in zip(*nodes)])

    def _group(self, name: str, groups: list[tuple[int, ...]]) -> Group:
        """Make the groups; return this rank's. Dense and expert groups often coincide, and are one
        process group then, but where NCCL is to be told of each apart."""
        role, options = (name, None) if name in self._rows else ("", None)
        if role:
            options = nccl.options(self._rows[name], nccl.api())[0]
        for ranks in groups:
            if (role, ranks) in self._made:
                continue
            if len(ranks) == 1:
                self._made[role, ranks] = None
            elif not role and ranks == self.members["world"][0]:
                self._made[role, ranks] = dist.group.WORLD
            else:  # sorted already, but where a launcher dealt ranks to nodes in turn
                kept: dict[str, Any] = {}
                if list(ranks) != sorted(ranks):
                    kept["sort_ranks"] = False
                if options is not None:
                    kept["pg_options"] = options
                self._made[role, ranks] = dist.new_group(list(ranks), **kept)
        mine = next(ranks for ranks in groups if self.rank in ranks)
        return Group(self._made[role, mine], mine.index(self.rank), len(mine), mine, None, options)

    def across(self, name: str) -> int:
        """How many of the run's groups of that name span nodes."""
        return sum(not self.nodes.together(ranks) for ranks in self.members[name])

    @property
    def tokens_alike(self) -> bool:
        """Whether all ranks that exchange rows hold equally many tokens (are of one tp group)."""
        return self.layout.tp % self.layout.exchange == 0
