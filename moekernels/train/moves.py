"""A run's placement of experts: where they lie, when they move, and what that brought.

Every rank decides alike: loads are sums over all ranks, and so are the seconds that count.
Legend: L layers with experts, E experts, P ranks that share a layer's experts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

from moekernels import assembly
from moekernels.balance import placement, replan
from moekernels.nn.dispatcher import AllGatherDispatcher, HierarchicalDispatcher
from moekernels.nn.experts import expert_clock
from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.nodes import cores
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.shard import ShardInfo
from moekernels.parallel.tensor import all_reduce
from moekernels.run import files as cfg
from moekernels.train.migrate import expert_state, migrate

BACKWARD = 2.0  # of a forward pass of experts: gradients of inputs and of weights
# Whose sums of a token's rows hang on where the experts lie.
SUM_BY_RANK = (AllGatherDispatcher, HierarchicalDispatcher)
FIRST_RATE = 1e9  # bytes/s that experts are taken to move with before any have


class Moves:
    """Where the experts of all layers lie; `slot_of` [L, E], see `balance.placement`."""

    def __init__(
        self,
        run: cfg.RunConfig,
        mesh: Mesh,
        chunks: Sequence[StageModel],
        rows: Sequence[slice],
        optimizer: Optimizer,
        shards: list[tuple[str, nn.Parameter, ShardInfo]],
    ) -> None:
        """`rows`: the rows of slot_of that are each chunk's; `shards`: all parameters' list, which
        is kept up to date."""
        self.mesh, self.chunks, self.rows, self.optimizer = mesh, chunks, rows, optimizer
        self.shards = shards
        self.rule, self.seed = assembly.replan_rule(run), run.train.seed
        m = run.model
        self.slot_of = placement.unmoved(m.moe_layers, m.num_experts)
        self.moved = False  # ever
        stages: list[list[int]] = [[] for _ in range(mesh.layout.pp)]
        for stage, layers in enumerate(assembly.layer_ranges(run)):
            held = [n - 1 - m.dense_layers for n in layers if n > m.dense_layers]
            stages[stage % mesh.layout.pp] += held
        self.stages = stages
        layout, self.node_of = mesh.layout, [[0] * mesh.layout.ep for _ in self.slot_of]
        for stage, numbers in enumerate(stages):  # as the first ranks of the stage exchange rows
            ranks = mesh.order[stage * layout.stage_ranks :][: layout.exchange]
            for layer in numbers:
                self.node_of[layer] = placement.nodes_of_exchange(mesh.nodes.of, ranks, layout.etp)
        self.passes = 2 if m.recompute_experts or assembly.checkpointed(run) else 1
        self.rate = FIRST_RATE
        expert_clock.running = self.rule.must_pay
        mates = len(mesh.nodes.mates(mesh.rank))
        self.crowded = mesh.device.type == "cpu" and mates > cores()
        self._begin()
        self.before: float | None = None  # seconds of a step before the last move

    def _begin(self) -> None:
        """Look from here on."""
        self.loads = torch.zeros(self.slot_of.shape, dtype=torch.float64)
        self.pairs: Tensor | None = None  # [L, E, E] where steps were watched
        self.seconds: list[float] = []

    def notes(self) -> list[str]:
        """What a user of `--replan` had better know."""
        said = []
        if self.rule.must_pay and self.crowded:
            said.append(
                f"replan   {len(self.mesh.nodes.mates(self.mesh.rank))} ranks share {cores()} "
                f"cores, so evener ranks save no time: auto moves nothing"
            )
        if self.rule.every and self.sums_by_rank:
            said.append(
                "replan   this dispatcher sums by ranks or nodes: losses agree with those of the "
                "unmoved run to rounding; --dispatcher all_to_all has the same bits"
            )
        return said

    @property
    def sums_by_rank(self) -> bool:
        """Whether a token's rows are added up in an order that hangs on where experts lie."""
        layers = [moe for chunk in self.chunks for moe in chunk.experts_layers]
        return any(isinstance(moe.dispatcher, SUM_BY_RANK) for moe in layers)

    def restore(self, facts: dict, layout: dict, where: str) -> None:
        """As a checkpoint left it, before its tensors are read; nothing moves under another ep."""
        if "placement" not in facts:
            return
        layers, experts = self.slot_of.shape
        slots = placement.from_facts(facts["placement"], layers, experts, where)
        if layout.get("ep") == self.mesh.layout.ep:
            self.slot_of, self.moved = slots, True
            for chunk, rows in zip(self.chunks, self.rows):
                chunk.place(slots[rows])
            self._tell()

    def _tell(self) -> None:
        """What the chunks' shards are now."""
        self.shards[:] = [s for chunk in self.chunks for s in chunk.named_shards()]
        self.optimizer.moved(self.shards)

    def facts(self) -> dict:
        """What a checkpoint must know."""
        return {"placement": self.slot_of.tolist()} if self.moved else {}

    def uneven(self, loads: Tensor) -> float:
        """Of all layers, the busiest rank's rows over the mean, for loads [L, E] of a step."""
        ranks = placement.rank_loads(loads, self.slot_of, self.mesh.layout.ep)
        mean = ranks.mean(1)
        return torch.where(mean > 0, ranks.amax(1) / mean, 1.0).max().item()

    def saw(self, loads: Tensor, seconds: float) -> None:
        """Note an applied step: its loads [L, E] and how long it took."""
        if self.rule.every:
            self.loads += loads.cpu()
            self.seconds.append(seconds)

    def saw_pairs(self, pairs: Tensor) -> None:
        """Note who was chosen with whom in a step, [L, E, E]: see `Monitor`."""
        if self.rule.every:
            self.pairs = pairs if self.pairs is None else self.pairs + pairs

    def looks_at(self, step: int) -> bool:
        return self.rule.every > 0 and step % self.rule.every == 0

    def look(self, step: int, last: bool) -> dict:
        """After a step: move experts if it is time and pays; what the step's line shall say.
        Every rank calls it."""
        if not self.looks_at(step) or not self.seconds:
            return {}
        said: dict = {}
        steady = median(self.seconds[1:] or self.seconds)
        if self.before is not None:
            said["realised_gain"], self.before = self.before - steady, None
        if not last:
            after = self._choose(step)
            gain, cost = self._gain(after), self._cost(after)
            pays = gain * self.rule.every > replan.TIMES * cost
            if not torch.equal(after, self.slot_of) and (pays or not self.rule.must_pay):
                said |= {"predicted_gain": gain, **self._move(after)}
                self.before = steady
        self._begin()
        return said

    def _choose(self, step: int) -> Tensor:
        if self.rule.random:
            return replan.drawn(self.slot_of, self.mesh.layout.ep, self.seed, step)
        return replan.better(self.loads, self.slot_of, self.node_of, self.pairs)

    def _gain(self, after: Tensor) -> float:
        """Seconds a step that a placement would save, by the rows of this look's steps and what a
        row has cost; 0 where it is not measured, or ranks share cores: who waits gives its own
        away."""
        layout, here = self.mesh.layout, self.mesh.device
        if not self.rule.must_pay:
            return 0.0
        seconds, rows = expert_clock.take()
        own = torch.tensor([seconds, rows, self.crowded], dtype=torch.float64, device=here)
        seconds, rows, crowded = all_reduce(own, self.mesh.world).tolist()
        if crowded:
            return 0.0
        each_row = seconds / max(rows, 1) * (self.passes + BACKWARD)
        loads = self.loads / len(self.seconds) / layout.edp
        was, then = (
            replan.busiest_rows(loads, slots, layout.ep, self.stages)
            for slots in (self.slot_of, after)
        )
        return each_row * (was - then)

    def _cost(self, after: Tensor) -> float:
        """Seconds that a move takes: the most that a rank sends, at the rate of the last one."""
        each = self.slot_of.shape[1] // self.mesh.layout.ep
        was, now = self.slot_of // each, after // each
        most = 0
        for layers in self.stages:
            sources = was[layers][was[layers] != now[layers]]
            most = max(most, int(sources.bincount(minlength=1).max()))
        return most * self._expert_bytes() / self.rate

    def _expert_bytes(self) -> int:
        """Of an expert's masters and moments; the same on all ranks."""
        own = 0
        for tensors in expert_state(self.optimizer).values():
            own = sum(part.nbytes for experts in tensors for part in experts[0])
        each = torch.zeros(self.mesh.world.size, dtype=torch.float64, device=self.mesh.device)
        each[self.mesh.world.rank] = own  # a stage may have no layer with experts
        return int(all_reduce(each, self.mesh.world).max().item())

    def _move(self, after: Tensor) -> dict:
        began = time.perf_counter()
        before = [self.slot_of[layers] for layers in self.rows]
        new = [after[layers] for layers in self.rows]
        moved = migrate(self.chunks, self.optimizer, self.mesh, before, new)
        self._tell()
        own = torch.zeros(self.mesh.world.size, 3, dtype=torch.float64, device=self.mesh.device)
        own[self.mesh.world.rank, 0] = time.perf_counter() - began
        own[self.mesh.world.rank, 1] = moved.bytes
        own[self.mesh.world.rank, 2] = moved.messages
        seconds, size, messages = all_reduce(own, self.mesh.world).amax(0).tolist()
        if size:
            self.rate = size / seconds
        each = self.slot_of.shape[1] // self.mesh.layout.ep
        count = int((self.slot_of // each != after // each).sum())
        self.slot_of, self.moved = after, True
        return {"moved_experts": count, "move_seconds": seconds, "move_messages": int(messages)}
