"""One process beside a layout: steps recorded, replayed on the layout, and compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moekernels import assembly
from moekernels.balance import placement, replicas
from moekernels.data.batch import MicroBatch
from moekernels.model.layout import Layout
from moekernels.nn.replicas import Replicas
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.bound import stands
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer, main_grad_of
from moekernels.parallel.tensor import own_part
from moekernels.run import files as cfg
from moekernels.run.sections import LayoutSection
from moekernels.verify.variants import draw_batches

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}  # of max|a-b| / max|b|
TIE = {"fp64": 1e-12, "fp32": 1e-5}  # scores this close are a tie


@dataclass
class Verdict:
    """The worst of a variant over its steps, on this rank or on all."""

    loss: float = 0.0
    gradient: float = 0.0
    name: str = ""
    choices: int = 0
    ties: int = 0
    wrong: int = 0  # other choices that are no ties
    seen: set[str] = field(default_factory=set)

    def add(self, other: Verdict) -> None:
        self.loss = max(self.loss, other.loss)
        if other.gradient > self.gradient or not self.name:
            self.gradient, self.name = other.gradient, other.name
        self.choices += other.choices
        self.ties += other.ties
        self.wrong += other.wrong
        self.seen |= other.seen


@dataclass
class Recorded:
    """A step as one process computes it: full tensors by name, choices by (microbatch, layer)."""

    loss: float
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    choices: dict[tuple[int, int], Tensor]


class Side:
    """A model on a layout, with training's pipeline and gradient buffers."""

    def __init__(self, run: cfg.RunConfig, mesh: Mesh) -> None:
        self.run, self.mesh = run, mesh
        self.chunks = assembly.build_chunks(run, mesh)
        self.runtime = assembly.build_runtime(run, mesh, self.chunks)
        self.shards = assembly.shards_of(self.chunks)
        settings = AdamWConfig(
            lr=1e-2, steps=100, clip=1.0, shard_optimizer=run.train.shard_optimizer
        )
        chunk_of = assembly.chunk_of(self.chunks)
        self.optimizer = Optimizer(self.shards, mesh, settings, chunk_of)
        layers = [moe for chunk in self.chunks for moe in chunk.experts_layers]
        self.replicas = Replicas(mesh, layers)
        if spare := run.train.replicas:
            ep, units = mesh.layout.ep, replicas.units_of(mesh.exchange.size)
            slot_of = placement.unmoved(1, run.model.num_experts)[0]
            copies = replicas.anywhere(slot_of, ep, spare, units)
            for number in range(len(layers)):
                self.replicas.hold(number, copies, slot_of, [0] * ep)

    def step(self, batches: list[MicroBatch], hook: Callable) -> float:
        """Gradients into `main_grad`; the step's loss, on every rank."""
        places = {id(batch): m for m, batch in enumerate(batches)}
        for chunk in self.chunks:
            chunk.route_hook = lambda batch, *args: hook(places[id(batch)], *args)
        assembly.begin_bound(self.run, self.mesh, batches)
        self.replicas.refresh()
        fits = False
        while not fits:
            self.optimizer.zero_grad()
            begin = None if self.run.train.replicas else self.optimizer.sums.begin
            losses = self.runtime.step(batches, record=False, finished=begin).losses
            self.replicas.bring_home()
            self.optimizer.reduce()
            fits = stands(self.mesh.exchange.bound, self.mesh.world)
        self.optimizer.spread_gradients()
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if losses and self.mesh.tp.rank == 0:
            loss += torch.stack(losses).double().sum()
        if self.mesh.world.size > 1:
            dist.all_reduce(loss)
        return loss.item()


def record(run: cfg.RunConfig, device: torch.device) -> list[Recorded]:
    """All steps in one process: the microbatches of every data-parallel rank, one by one."""
    alone = replace(
        run,
        layout=LayoutSection(checkpoint_layers=run.layout.checkpoint_layers),
        train=replace(run.train, replicas=0),
    )
    side = Side(alone, Mesh(Layout(), device=device))
    steps = []
    for step in range(1, run.train.steps + 1):
        batches = [b.to(device) for rank in draw_batches(run, step) for b in rank]
        choices: dict[tuple[int, int], Tensor] = {}

        def keep(place: int, layer: int, logits: Tensor, ids: Tensor, choices=choices) -> None:
            choices[place, layer] = ids.cpu()

        parameters = {name: p.detach().cpu().clone() for name, p, _ in side.shards}
        loss = side.step(batches, keep)
        gradients = {name: main_grad_of(p).cpu().clone() for name, p, _ in side.shards}
        steps.append(Recorded(loss, parameters, gradients, choices))
        side.optimizer.step()
    return steps


def compare(run: cfg.RunConfig, mesh: Mesh, steps: list[Recorded]) -> Verdict:
    """All steps on the layout against what was recorded; this rank's verdict."""
    side, verdict, tie = Side(run, mesh), Verdict(), TIE[run.train.dtype]
    for number, recorded in enumerate(steps, start=1):
        for name, p, info in side.shards:
            p.data.copy_(info.take(recorded.parameters[name]))
        mine = [b.to(mesh.device) for b in draw_batches(run, number)[mesh.dp_index]]
        first = mesh.dp_index * len(mine)  # of this rank's microbatches among all
        # (choices, ties, wrong): a recomputed layer asks twice, and so does a repeated step.
        seen: dict[tuple[int, int], tuple[int, int, int]] = {}

        def replay(
            place: int,
            layer: int,
            logits: Tensor,
            ids: Tensor,
            recorded=recorded,
            seen=seen,
            first=first,
        ) -> Tensor:
            wanted = own_part(recorded.choices[first + place, layer], mesh.tp).to(ids.device)
            seen[place, layer] = len(ids), *_differing(logits, ids, wanted, tie)
            return wanted

        loss = side.step(mine, replay)
        for choices, ties, wrong in seen.values():
            verdict.add(Verdict(choices=choices, ties=ties, wrong=wrong))
        verdict.loss = max(verdict.loss, _relative(loss - recorded.loss, recorded.loss))
        for name, p, info in side.shards:
            full = recorded.gradients[name]
            off = main_grad_of(p).cpu() - info.take(full)
            apart = off.abs().max().item() if p.numel() else 0.0
            verdict.add(Verdict(gradient=_relative(apart, full.abs().max().item()), name=name))
            verdict.seen.add(name)
    return verdict


def _relative(difference: float, size: float) -> float:
    if math.isnan(difference):
        return math.inf
    return 0.0 if difference == 0 else abs(difference) / abs(size) if size else math.inf


def _differing(logits: Tensor, ids: Tensor, wanted: Tensor, tie: float) -> tuple[int, int]:
    """Tokens whose choice ids [T, K] is another set than `wanted`: (ties, no ties)."""
    other = (ids.sort(1).values != wanted.sort(1).values).any(1)
    if not other.any():
        return 0, 0
    scores = torch.softmax(logits[other].double(), 1)
    mine, theirs = (
        scores.gather(1, x[other].clamp_min(0).long()).sort(1).values for x in (ids, wanted)
    )
    close = ((mine - theirs).abs().amax(1) <= tie) & (ids[other] >= 0).all(1)
    return int(close.sum()), int((~close).sum())
