"""What is verified: layouts, variants of the model and the run, and their batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from moekernels.data.batch import MicroBatch
from moekernels.model.attention import ATTENTIONS
from moekernels.model.beside import BESIDE
from moekernels.model.decoder import DecoderSpec
from moekernels.model.dispatch import WAYS
from moekernels.parallel.nodes import Nodes
from moekernels.pipeline.build import in_pairs, offered, splits
from moekernels.run import files as cfg
from moekernels.run.buffers import EXACT
from moekernels.run.sections import LayoutSection

MICROBATCHES = 8  # of a step, but at least two on each data-parallel rank
HIERARCHICAL = "hierarchical"  # the dispatcher that needs several nodes: they are declared
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
    dispatcher: str = "auto"
    guests: bool = False  # all that stands beside experts, and a first layer without any
    attention: str = ""  # other than the small model's own, by its name in `ATTENTIONS`
    tied: bool = False  # one matrix for the embedding and the head
    shard_optimizer: bool = True
    buffers: str = EXACT  # of the rows that come
    virtual_stages: int = 1
    replicas: int = 0  # copies of other ranks' experts in each layer of a rank

    @property
    def model(self) -> tuple:
        """What its recording in one process depends on."""
        return self.experts, self.top_k, self.balance_scope, self.guests, self.attention, self.tied

    def __str__(self) -> str:
        text = self.schedule + f" x{self.virtual_stages}" * (self.virtual_stages > 1)
        text += f", {self.experts} experts, top {self.top_k}, {self.steps} steps"
        if self.balance_scope != "microbatch":
            text += ", balance by sequence"
        if self.dispatcher != "auto":
            text += f", {self.dispatcher}"
        if self.attention:
            text += f", {self.attention} attention"
        text += ", tied embeddings" * self.tied
        text += f", {' and '.join(BESIDE)} expert and a dense layer" * self.guests
        text += f", {self.buffers} buffers" * (self.buffers != EXACT)
        text += f", {self.replicas} copies of experts a rank" * (self.replicas > 0)
        return text + ", whole optimizer on every rank" * (not self.shard_optimizer)


def variants_of(degrees: dict[str, int], steps: int) -> list[Variant]:
    """Every variant that is promised for a layout."""
    run = cfg.RunConfig()
    cfg.set_degrees(run.layout, degrees)
    exchange = run.layout.ep * run.layout.etp > 1
    names = [name for name in offered(several=False) if exchange or not in_pairs(name)]
    orders = [Variant(name, steps=steps) for name in names]
    chunks = [name for name in offered(several=True) if run.layout.pp > 1 or splits(name)]
    orders += [Variant(name, steps=steps, virtual_stages=2) for name in chunks]
    found = [*orders]
    found += [Variant(top_k=k, steps=1) for k in range(1, 9) if k != 2]
    found.append(Variant(steps=1, balance_scope="sequence"))
    found.append(Variant(steps=1, guests=True))
    found += [Variant(steps=1, attention=n) for n, kind in ATTENTIONS.items() if kind.example]
    two = two_nodes(run.layout) is not None
    ways = [name for name in WAYS if two or name != HIERARCHICAL]
    found += [Variant(steps=1, dispatcher=name) for name in ways]
    if run.layout.ep * run.layout.etp > 1:  # most steps of which do not fit at first
        found.append(Variant(steps=1, dispatcher="all_to_all", buffers="bounded:1"))
    found.append(Variant(steps=1, shard_optimizer=False))
    if run.layout.ep > 1:
        found.append(Variant("zb", top_k=1, steps=1, replicas=2))
    ends = [v for v in orders if run.layout.pp * v.virtual_stages > 1]  # the first is not the last
    found += [replace(v, steps=1, tied=True) for v in ends]
    if run.layout.pp > 1:
        found.append(Variant(steps=1, tied=True, shard_optimizer=False))
    if 6 % run.layout.ep == 0:
        found.append(Variant(experts=6, top_k=3, steps=1))
    return found


def two_nodes(layout: LayoutSection) -> Nodes | None:
    """Declares nodes that hold half of each exchange's ranks; None where that is one, or the shards
    of an expert would part."""
    exchange = layout.ep * layout.etp
    half, rest = divmod(exchange, 2)
    if rest or half < 2 or half % layout.etp:
        return None
    return Nodes.named(rank // half for rank in range(layout.tp * layout.dp * layout.pp))


def configure(
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
    lay.virtual_stages = variant.virtual_stages
    lay.checkpoint_layers = "2"
    lay.dispatcher = variant.dispatcher
    stages = max(2, variant.virtual_stages) * lay.pp  # the same model under every schedule
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
        tie_embeddings=variant.tied,
        renormalize=False,
        expert_d_in=48,
        expert_d_ff=32,
        init_std=0.1,
    )
    if variant.guests:
        beside = {key: v for kind in BESIDE.values() for key, v in kind.example.items()}
        run.model = replace(run.model, dense_layers=1, dense_d_ff=24, **beside)
    if variant.attention:
        run.model = replace(run.model, **ATTENTIONS[variant.attention].example)
    run.batch.microbatches = max(2, MICROBATCHES // lay.dp)
    run.batch.accumulation, run.batch.context = 1, 40
    run.train.dtype, run.train.shard_optimizer = dtype, variant.shard_optimizer
    run.train.exchange_buffers = variant.buffers
    run.train.replicas = variant.replicas
    cfg.check(run, world)
    return run


def draw_batches(run: cfg.RunConfig, step: int) -> list[list[MicroBatch]]:
    """Microbatches [dp][m] of random tokens and uneven lengths, planned as training plans them."""
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
