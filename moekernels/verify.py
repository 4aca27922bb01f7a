"""`moekernels verify`: proof that a layout computes what one process computes.

Rank 0 runs each step alone first and records the expert choices; then all ranks run the same
micro-batches with the same parameters on the layout, with those choices replayed, and every rank
compares its part of every gradient. Training's own model, pipeline and gradient reduction are what
runs on both sides.

The layout still makes its own choice of experts. It may differ from the recorded one only where the
scores are too close to tell apart, and such tokens are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moekernels import assembly
from moekernels.data.batch import MicroBatch
from moekernels.errors import UsageError
from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.model.router import SCOPES
from moekernels.parallel import launch, launcher
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import AdamWConfig, Optimizer
from moekernels.parallel.peers import MODES
from moekernels.parallel.tensor import own_part
from moekernels.pipeline.schedule import SCHEDULES, offered
from moekernels.plan import room
from moekernels.run import files as cfg
from moekernels.run.sections import SECTIONS, LayoutSection

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}  # of max|a-b| / max|b|
TIE = {"fp64": 1e-12, "fp32": 1e-5}  # scores this close are a tie
MOST_STEPS = 1000
MICROBATCHES = 8  # of a step, but at least two on each data-parallel rank
VOCABULARY = 131  # a prime: no tensor-parallel size divides it

LAYOUTS = (  # what the project promises
    {"tp": 2, "pp": 4},
    {"tp": 4},
    {"pp": 8},
    {"dp": 8, "ep": 8},
    {"tp": 2, "dp": 4, "ep": 4},
    {"tp": 2, "dp": 2, "etp": 2, "ep": 2},
    {"tp": 2, "pp": 4, "etp": 2, "ep": 1},
    {"tp": 2, "pp": 2},
)


@dataclass(frozen=True)
class Variant:
    """What is run on a layout."""

    schedule: str = "1f1b"
    experts: int = 8
    top_k: int = 2
    steps: int = 3
    balance_scope: str = "microbatch"

    def __str__(self) -> str:
        text = f"{self.schedule}, {self.experts} experts, top {self.top_k}, {self.steps} steps"
        return text if self.balance_scope == "microbatch" else f"{text}, balance by sequence"


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
    """A step as one process computes it: full tensors by name, choices by (micro-batch, layer)."""

    loss: float
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    choices: dict[tuple[int, int], Tensor]


def variants_of(degrees: dict[str, int], steps: int) -> list[Variant]:
    """Every variant that is promised for a layout."""
    run = cfg.RunConfig()
    cfg.set_degrees(run.layout, degrees)
    found = [Variant(name, steps=steps) for name in offered(several=False)]
    if run.layout.pp > 1:
        found += [Variant(name, steps=steps) for name in offered(several=True)]
    found += [Variant(top_k=k, steps=1) for k in range(1, 9) if k != 2]
    found.append(Variant(steps=1, balance_scope="sequence"))
    if 6 % run.layout.ep == 0:
        found.append(Variant(experts=6, top_k=3, steps=1))
    return found


def verify(
    degrees: dict[str, int],
    *,
    everything: bool = False,
    schedule: str = "1f1b",
    experts: int = 8,
    top_k: int = 2,
    steps: int = 3,
    balance_scope: str = "microbatch",
    dtype: str = "fp64",
    device: str = "auto",
    exchange: str = "auto",
) -> int:
    """Verify one layout, or all that are promised; 0 if everything agrees, 1 if not."""
    for flag, value, known in (
        ("dtype", dtype, TOLERANCE),
        ("schedule", schedule, SCHEDULES),
        ("balance-scope", balance_scope, SCOPES),
        ("device", device, ("auto", "cpu", "cuda")),
        ("exchange", exchange, MODES),
    ):
        if value not in known:
            raise UsageError(f"--{flag} {value!r}: {cfg.nearest(value, known)}")
    for flag, key, value in (("experts", "num_experts", experts), ("top-k", "top_k", top_k)):
        cfg.check_value(f"--{flag}", SECTIONS["model"], key, value)
    if not 1 <= steps <= MOST_STEPS:  # all are recorded before the first is compared
        raise UsageError(f"--steps must be from 1 to {MOST_STEPS}, got {steps}")
    if everything and launcher.wanted():
        raise UsageError("--all starts the ranks of each layout by itself; leave torchrun out")
    if not everything:
        variant = Variant(schedule, experts, top_k, steps, balance_scope)
        return verify_layout(
            degrees, [variant], dtype, device, launcher.launched(), exchange=exchange
        )
    codes = [
        verify_layout(d, variants_of(d, steps), dtype, device, exchange=exchange) for d in LAYOUTS
    ]
    print("all agree" if not any(codes) else f"{sum(codes)} of {len(codes)} layouts disagree")
    return max(codes)


def verify_layout(
    degrees: dict[str, int],
    variants: list[Variant],
    dtype: str,
    device: str = "auto",
    launched: launcher.Launched | None = None,
    exchange: str = "auto",
) -> int:
    """Verify variants of a layout with one start of its ranks; 0 if all agree, 1 if not."""
    world = launched.size if launched else None
    runs = [_configure(degrees, variant, dtype, world) for variant in variants]
    for run in runs:
        run.train.exchange = exchange
    layout = [assembly.layout_of(run) for run in runs][0]
    parts, describe = (layout, variants, runs), assembly.rank_names(layout)
    local = launched.local_size if launched else None
    device = launch.choose_device(device, local or layout.world)
    for run in runs:
        room.check(run, world, local, device)
    if launched is None:
        return launch.run_local(layout.world, device, _work, *parts, describe=describe)
    return launch.run_launched(launched, device, _work, *parts, describe=describe)


def _configure(
    degrees: dict[str, int], variant: Variant, dtype: str, world: int | None
) -> cfg.RunConfig:
    """A small model that has everything: a lift, uneven vocabulary shards, grouped queries,
    recomputed layers, both losses of the router."""
    run = cfg.RunConfig()
    for name, value in degrees.items():
        cfg.check_value(f"--{name}", LayoutSection, name, value)
    cfg.set_degrees(run.layout, degrees, world)
    lay = run.layout
    lay.schedule = variant.schedule
    lay.virtual_stages = 2 if SCHEDULES[variant.schedule].several else 1
    lay.checkpoint_layers = "2"
    stages = 2 * lay.pp  # the same model under every schedule
    run.model = DecoderSpec(
        vocab_size=VOCABULARY,
        d_model=32,
        num_layers=stages * max(1, 4 // stages),
        num_heads=8,
        num_kv_heads=4 if 4 % lay.tp == 0 else 8,
        head_dim=4,
        num_experts=variant.experts,
        top_k=variant.top_k,
        balance_scope=variant.balance_scope,
        renormalize=False,
        expert_d_in=48,
        expert_d_ff=32,
        init_std=0.1,
    )
    run.batch.microbatches = max(2, MICROBATCHES // lay.dp)
    run.batch.accumulation, run.batch.context = 1, 40
    run.train.dtype = dtype
    cfg.check(run, world)
    return run


def draw_batches(run: cfg.RunConfig, step: int) -> list[list[MicroBatch]]:
    """Micro-batches [dp][m] of random tokens and uneven lengths, planned as training plans them."""
    from moekernels.data.batch_plan import Cost, plan_batch

    random = np.random.default_rng(step)
    dp, tp = run.layout.dp, run.layout.tp
    count = run.batch.microbatches
    lengths = random.integers(1, run.batch.context + 1, 3 * count * dp).tolist()
    texts = [torch.from_numpy(random.integers(0, VOCABULARY, n + 1)) for n in lengths]
    plan = plan_batch(lengths, count, dp=dp, align=tp, cost=Cost(1.0, 0.01))
    return [
        [
            MicroBatch.pack(
                [(texts[i][:-1], texts[i][1:]) for i in group],
                loss_scale=1 / sum(lengths),
                align=tp,
            )
            for group in groups
        ]
        for groups in plan.groups
    ]


class Side:
    """A model on a layout, with training's pipeline and gradient buffers."""

    def __init__(self, run: cfg.RunConfig, mesh: Mesh) -> None:
        self.run, self.mesh = run, mesh
        self.chunks = assembly.build_chunks(run, mesh)
        self.runtime = assembly.build_runtime(run, mesh, self.chunks)
        self.shards = [shard for chunk in self.chunks for shard in chunk.named_shards()]
        settings = AdamWConfig(lr=1e-2, steps=100, clip=1.0)
        self.optimizer = Optimizer(self.shards, mesh, settings)

    def step(self, batches: list[MicroBatch], hook: Callable) -> float:
        """Gradients into `main_grad`; the step's loss, on every rank."""
        places = {id(batch): m for m, batch in enumerate(batches)}
        for chunk in self.chunks:
            chunk.route_hook = lambda batch, *args: hook(places[id(batch)], *args)
        self.optimizer.zero_grad()
        losses = self.runtime.step(batches, record=False).losses
        self.optimizer.reduce()
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if losses and self.mesh.tp.rank == 0:
            loss += torch.stack(losses).double().sum()
        if self.mesh.world.size > 1:
            dist.all_reduce(loss)
        return loss.item()


def record(run: cfg.RunConfig, device: torch.device) -> list[Recorded]:
    """All steps in one process: the micro-batches of every data-parallel rank, one by one."""
    alone = replace(run, layout=LayoutSection(checkpoint_layers=run.layout.checkpoint_layers))
    side = Side(alone, Mesh(Layout(), device=device))
    steps = []
    for step in range(1, run.train.steps + 1):
        batches = [b.to(device) for rank in draw_batches(run, step) for b in rank]
        choices: dict[tuple[int, int], Tensor] = {}

        def keep(place: int, layer: int, logits: Tensor, ids: Tensor, choices=choices) -> None:
            choices[place, layer] = ids.cpu()

        parameters = {name: p.detach().cpu().clone() for name, p, _ in side.shards}
        loss = side.step(batches, keep)
        gradients = {name: p.main_grad.cpu().clone() for name, p, _ in side.shards}
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
        first = mesh.dp_index * len(mine)  # of this rank's micro-batches among all
        seen: set[tuple[int, int]] = set()

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
            if (place, layer) not in seen:  # a recomputed layer asks twice
                seen.add((place, layer))
                verdict.choices += len(ids)
                ties, wrong = _differing(logits, ids, wanted, tie)
                verdict.ties += ties
                verdict.wrong += wrong
            return wanted

        loss = side.step(mine, replay)
        verdict.loss = max(verdict.loss, _relative(loss - recorded.loss, recorded.loss))
        for name, p, info in side.shards:
            full = recorded.gradients[name]
            apart = (p.main_grad.cpu() - info.take(full)).abs().max().item() if p.numel() else 0.0
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


def _work(
    env: launch.RankEnv, layout: Layout, variants: list[Variant], runs: list[cfg.RunConfig]
) -> int:
    """A rank's part; the exit code, the same on every rank."""
    if env.leader:
        print(layout.describe(), flush=True)
    mesh = assembly.build_mesh(runs[0], env.device)
    known: dict[
        tuple[int, int, str], list[Recorded]
    ] = {}  # on rank 0: one recording for all schedules
    failed = False
    for variant, run in zip(variants, runs):
        run.train.steps = variant.steps
        steps = [None]
        if env.leader:
            key = (variant.experts, variant.top_k, variant.balance_scope)
            if key not in known or len(known[key]) < variant.steps:
                known[key] = record(run, env.device)
            steps = [known[key][: variant.steps]]
        if env.world > 1:
            dist.broadcast_object_list(steps, 0, device=env.device)
        verdicts = [compare(run, mesh, steps[0])]
        if env.world > 1:
            mine, verdicts = verdicts[0], [None] * env.world
            dist.all_gather_object(verdicts, mine)
        total = Verdict()
        for verdict in verdicts:
            total.add(verdict)
        agreed = _judge(total, set(steps[0][0].gradients), run.train.dtype)
        failed |= not agreed
        if env.leader:
            print(f"  {variant}: {_say(total, run.train.dtype)}  {'ok' if agreed else 'FAILED'}")
            missing = set(steps[0][0].gradients) - total.seen
            if missing:
                print(f"    on no rank: {', '.join(sorted(missing))}")
    return int(failed)


def _judge(total: Verdict, names: set[str], dtype: str) -> bool:
    close = total.loss <= TOLERANCE[dtype] and total.gradient <= TOLERANCE[dtype]
    return close and not total.wrong and total.seen == names


def _say(total: Verdict, dtype: str) -> str:
    text = (
        f"loss {total.loss:.1e}, worst gradient {total.gradient:.1e} ({total.name}), "
        f"allowed {TOLERANCE[dtype]:.0e}; {total.ties} of {total.choices} choices are ties"
    )
    return text + (f", {total.wrong} differ" if total.wrong else "")
