"""From a configuration to the parts of a run: layout, layers of a chunk, models, data, pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from moekernels.balance.replan import Rule
from moekernels.errors import UsageError
from moekernels.model import dispatch
from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.ops import _deferred
from moekernels.parallel import nccl
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.bound import Bound
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.nodes import Nodes, cores
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.shard import ShardInfo
from moekernels.parallel.turns import take_turns
from moekernels.pipeline.build import SCHEDULES, build, splits
from moekernels.pipeline.runtime import PipelineRuntime
from moekernels.pipeline.schedule import Schedule
from moekernels.pipeline.simulate import Simulator
from moekernels.run import buffers, link
from moekernels.run import files as cfg

if TYPE_CHECKING:
    from moekernels.data.batch import MicroBatch
    from moekernels.data.corpus import Corpus
    from moekernels.data.loader import BatchLoader

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
AT_ONCE = 8  # microbatches: beyond, what is kept of them takes more than gradients save
BACKWARD_COST = 2.0  # of a forward pass, for the order of microbatches


def layout_of(run: cfg.RunConfig) -> Layout:
    """The layout, or UsageError where anything of the model does not divide by it."""
    lay, m = run.layout, run.model
    layout = _degrees(run)
    layout.validate(num_heads=m.num_heads, num_kv_heads=m.kv_heads)
    layout.validate(
        num_experts=m.num_experts,
        num_layers=None if lay.layers_per_stage else m.num_layers,
        virtual_stages=lay.virtual_stages,
        d_ff=m.expert_d_ff,
        vocab_size=m.vocab_size,
    )
    layer_ranges(run)
    checkpointed(run)
    nccl.rows_of(run.nccl)
    build_schedule(run)
    replan_rule(run)
    _check_pairs(run, layout)
    check_at_once(run)
    _check_fp8(run)
    bound_of(run)
    check_replicas(run)
    return layout


def _check_pairs(run: cfg.RunConfig, layout: Layout) -> None:
    """UsageError where a schedule of pairs has no exchange that it could hide."""
    lay, name = run.layout, run.layout.schedule
    if not SCHEDULES[name].pairs:
        return
    if layout.exchange == 1:
        raise UsageError(
            f"--schedule {name} hides the exchange of rows, and with ep 1 x etp 1 there is none; "
            f"give --ep, or --schedule 1f1b"
        )
    if (way := dispatch.choose(lay.dispatcher, run.model, layout)) != "all_to_all":
        raise UsageError(
            f"--schedule {name} hides rows that are posted and waited for, and {way} exchanges at "
            f"once; give --dispatcher all_to_all, or --schedule 1f1b"
        )
    if run.train.exchange_parts > 1:
        raise UsageError(
            f"--exchange-parts {run.train.exchange_parts} cuts what --schedule {name} hides whole; "
            f"give one of the two"
        )


def _check_fp8(run: cfg.RunConfig) -> None:
    """UsageError where there is no FP8, or where its blocks would depend on the layout."""
    part = run.model.expert_d_ff // run.layout.etp
    if not run.model.fp8_experts:
        return
    if run.train.dtype == "fp64":
        raise UsageError("--fp8-experts beside --dtype fp64; give --dtype bf16 or fp32")
    if run.layout.etp > 1 and part % 128:
        raise UsageError(
            f"--fp8-experts scales blocks of 128, and --etp {run.layout.etp} parts "
            f"{run.model.expert_d_ff} hidden units of an expert by {part}; give --etp 1, or an "
            f"expert_d_ff whose parts 128 divides"
        )


def build_mesh(run: cfg.RunConfig, device: torch.device, nodes: Nodes | None = None) -> Mesh:
    """This rank's place, groups and what they share; UsageError where that cannot be as the run
    asks for it. `nodes` declares what lies where, else it is found out."""
    t, wanted = run.train, link.parse(run.train.link)
    rows = None
    if device.type == "cuda":
        nccl.check_environment(os.environ)
        rows = nccl.rows_of(run.nccl)
    ends = run.model.tie_embeddings
    mesh = Mesh(layout_of(run), None, device, t.exchange, nodes, rows, ends=ends)
    memory = mesh.exchange.memory
    if mesh.exchange.device_memory is not None:
        if wanted:
            raise UsageError(f"--link {t.link} is one of ranks on a CPU; GPUs have their own")
        if t.exchange_parts > 1:
            raise UsageError(
                f"--exchange-parts {t.exchange_parts}: GPUs that share memory exchange all rows "
                "at once; give 1, or --exchange collective"
            )
    if wanted and mesh.exchange.size > 1:
        if memory is None:
            raise UsageError(_needs_shared(f"--link {t.link}", mesh))
        memory.set_link(*wanted)
    bound_rows(run, mesh)
    return mesh


def _needs_shared(flag: str, mesh: Mesh) -> str:
    why = mesh.alone or "ranks that exchange rows are of several machines"
    return f"{flag} is one of the shared exchange: {why}"


def bound_of(run: cfg.RunConfig) -> float | None:
    """The bound over the mean of rows that a rank takes in, if there is one; UsageError where
    nothing could be bounded."""
    t, lay = run.train, run.layout
    bound, flag = buffers.parse(t.exchange_buffers), f"--exchange-buffers {t.exchange_buffers}"
    if bound is None:
        return None
    if lay.ep * lay.etp == 1:
        raise UsageError(
            f"{flag}: with ep 1 no rows are exchanged; give --ep, or --exchange-buffers exact"
        )
    if dispatch.choose(lay.dispatcher, run.model, _degrees(run)) != "all_to_all":
        raise UsageError(
            f"{flag} is one of rows that go to their experts, and with top-k {run.model.top_k} "
            f"over ep {lay.ep} all ranks gather all tokens; give --dispatcher all_to_all, or "
            f"--exchange-buffers exact"
        )
    if t.exchange == "collective":
        raise UsageError(
            f"{flag} is one of the shared exchange; leave --exchange collective out, or give "
            f"--exchange-buffers exact"
        )
    return bound


def bound_rows(run: cfg.RunConfig, mesh: Mesh) -> None:
    """Give the exchange buffers of the size that the run asks for; UsageError where it cannot."""
    bound, group = bound_of(run), mesh.exchange
    if bound is None:
        mesh.exchange = replace(group, bound=None)
        return
    if group.memory is None and group.device_memory is None:
        flag = f"--exchange-buffers {run.train.exchange_buffers}"
        raise UsageError(_needs_shared(flag, mesh))
    mesh.exchange = replace(group, bound=Bound(bound, group, mesh.device))


def begin_bound(run: cfg.RunConfig, mesh: Mesh, batches: Sequence[MicroBatch]) -> None:
    """Before the batches go through the chunks: have bounded buffers know how many rows they
    are."""
    if (bound := mesh.exchange.bound) is not None:
        tokens = max((batch.rows for batch in batches), default=0) // mesh.layout.tp
        bound.begin(tokens * run.model.top_k * mesh.layout.etp)


def _degrees(run: cfg.RunConfig) -> Layout:
    lay = run.layout
    return Layout(lay.tp, lay.dp, lay.pp, lay.ep, lay.etp)


def replan_rule(run: cfg.RunConfig) -> Rule:
    """How a run moves experts; UsageError where it cannot."""
    rule = Rule.parse(run.train.replan)
    if rule.every and run.layout.ep == 1:
        raise UsageError(
            f"--replan {run.train.replan}: with ep 1 a rank holds all experts of a layer and none "
            f"can move; give --ep, or leave it out"
        )
    return rule


def check_replicas(run: cfg.RunConfig) -> None:
    """UsageError where copies of experts could bring nothing, or not be had."""
    count, m, ep = run.train.replicas, run.model, run.layout.ep
    if not count:
        return
    each, why = m.num_experts // ep, ""
    if ep <= m.top_k:
        why = (
            f"placement suffices: a token chooses {m.top_k} experts, so none has more than "
            f"1/{m.top_k} of the rows, and a rank of ep {ep} has 1/{ep}; leave it out, --replan "
            f"moves experts"
        )
    elif count > m.num_experts - each:
        why = f"the other ranks have {m.num_experts - each} experts of a layer; give at most those"
    elif dispatch.choose(run.layout.dispatcher, m, _degrees(run)) == "all_gather":
        why = "under all_gather a rank computes its own experts alone; give --dispatcher all_to_all"
    elif bound_of(run) is not None:
        why = "bounded buffers read no counts, and so not which rows are for copies; give exact"
    elif replan_rule(run).must_pay:
        why = "--replan auto reckons with one place for each expert; give it a number of steps"
    if why:
        raise UsageError(f"--replicas {count}: {why}")


def rank_names(layout: Layout) -> Callable[[int], str]:
    """What a rank is called in messages: `rank 3 (tp 1, pp 1)`."""

    def name(rank: int) -> str:
        stage, inside = divmod(rank, layout.stage_ranks)
        places = {"tp": inside % layout.tp, "dp": inside // layout.tp, "pp": stage}
        shown = [f"{key} {place}" for key, place in places.items() if getattr(layout, key) > 1]
        return f"rank {rank} ({', '.join(shown)})" if shown else f"rank {rank}"

    return name


def layer_ranges(run: cfg.RunConfig) -> list[range]:
    """Layers of each virtual stage, counted from 1: `4,4,4,4`, or equal shares."""
    lay, layers = run.layout, run.model.num_layers
    stages = lay.pp * lay.virtual_stages
    if not lay.layers_per_stage:
        sizes = [layers // stages] * stages
    else:
        parts = [p.strip() for p in lay.layers_per_stage.split(",")]
        if not all(map(cfg.whole, parts)):
            raise UsageError(
                f"--layers-per-stage must be numbers, as in 4,4,4,4, got {lay.layers_per_stage!r}"
            )
        sizes = [int(p) for p in parts]
        if len(sizes) != stages or sum(sizes) != layers or min(sizes) < 1:
            raise UsageError(
                f"--layers-per-stage {lay.layers_per_stage}: give {stages} numbers (pp {lay.pp} x "
                f"{lay.virtual_stages} virtual stages) of at least 1 that add up to {layers} layers"
            )
    ends = [sum(sizes[: i + 1]) for i in range(stages)]
    return [range(end - size + 1, end + 1) for end, size in zip(ends, sizes)]


def checkpointed(run: cfg.RunConfig) -> set[int]:
    """Layers to compute again: `all`, `none`, or numbers and ranges from 1: `2-15`, `1,3-5`."""
    text, layers = run.layout.checkpoint_layers, run.model.num_layers
    if text in ("none", ""):
        return set()
    if text == "all":
        return set(range(1, layers + 1))
    chosen: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not cfg.whole(low) or (dash and not cfg.whole(high)):
            raise UsageError(
                f"--checkpoint-layers must be all, none, or as in 2-15 or 1,3-5, got {text!r}"
            )
        first, last = int(low), int(high if dash else low)
        if not 1 <= first <= last <= layers:
            raise UsageError(
                f"--checkpoint-layers {text}: {part.strip()} is not within the layers 1-{layers}"
            )
        chosen.update(range(first, last + 1))
    return chosen


def build_chunks(run: cfg.RunConfig, mesh: Mesh) -> list[StageModel]:
    """The chunks of this rank, in order; with the parameters that any other layout begins with."""
    lay, ranges = run.layout, layer_ranges(run)
    # Pairs hide rows that are posted and waited for, over nodes or not: see `_check_pairs`.
    way = "all_to_all" if SCHEDULES[lay.schedule].pairs else lay.dispatcher
    chunks: list[StageModel] = []
    for stage in range(mesh.pp_index, len(ranges), lay.pp):
        chunk = StageModel(
            run.model,
            mesh,
            ranges[stage],
            first=stage == 0,
            last=stage == len(ranges) - 1,
            dtype=DTYPES[run.train.dtype],
            device=mesh.device,
            sequence_parallel=lay.sequence_parallel,
            dispatcher=way,
            exchange_parts=run.train.exchange_parts,
            replicas=run.train.replicas,
            checkpoint_layers=checkpointed(run),
            seed=run.train.seed,
            tied_to=chunks[0].embedding if chunks else None,
        )
        chunks.append(chunk)
    return chunks


def build_optimizer(run: cfg.RunConfig, mesh: Mesh, chunks: Sequence[StageModel]) -> Optimizer:
    t = run.train
    same = {f.name: getattr(t, f.name) for f in fields(AdamWConfig) if hasattr(t, f.name)}
    moments, moves = MOMENTS[t.optimizer_state], replan_rule(run).every > 0
    config = AdamWConfig(**same, state_dtype=moments, whole_experts=moves)
    return Optimizer(shards_of(chunks), mesh, config, chunk_of(chunks))


def shards_of(chunks: Sequence[StageModel]) -> list[tuple[str, nn.Parameter, ShardInfo]]:
    return [shard for chunk in chunks for shard in chunk.named_shards()]


def chunk_of(chunks: Sequence[StageModel]) -> dict[str, int]:
    """Which of a rank's chunks each parameter is of."""
    return {name: i for i, chunk in enumerate(chunks) for name, _, _ in chunk.named_shards()}


def build_schedule(run: cfg.RunConfig) -> Schedule:
    """Of a whole flush: all accumulation steps at once."""
    b, lay = run.batch, run.layout
    return build(lay.schedule, lay.pp, b.microbatches * b.accumulation, lay.virtual_stages)


def build_runtime(run: cfg.RunConfig, mesh: Mesh, chunks: list[StageModel]) -> PipelineRuntime:
    split = mesh.tp.size if run.layout.sequence_parallel else 1
    at_once = at_once_of(run, mesh)
    return PipelineRuntime(
        build_schedule(run),
        chunks,
        mesh.pp,
        lambda batch: (batch.rows // split, run.model.d_model),
        DTYPES[run.train.dtype],
        mesh.device,
        put_off=_deferred.owed,
        turns=take_turns,
        joined=[_deferred.Joined() for _ in chunks] if at_once > 1 else (),
        at_once=at_once,
    )


def check_at_once(run: cfg.RunConfig) -> None:
    """UsageError where the schedule says itself when gradients of weights are computed."""
    name, wanted = run.layout.schedule, run.train.weights_at_once
    if wanted > 1 and _puts_off(name):
        raise UsageError(
            f"--weights-at-once {wanted}: --schedule {name} says when each microbatch's gradients "
            f"of weights are computed; give --schedule 1f1b, or leave it out"
        )


def _puts_off(schedule: str) -> bool:
    return SCHEDULES[schedule].pairs or splits(schedule)


def at_once_of(run: cfg.RunConfig, mesh: Mesh) -> int:
    """Microbatches whose gradients of weights are computed together. Where each rank has a core of
    its own, one's hide the exchange; where several share one, waiting costs none of its time, and
    reading and writing all gradients for every microbatch does."""
    wanted = run.train.weights_at_once
    if wanted != cfg.AUTO:
        return wanted
    waits = mesh.exchange.size > 1 and (
        len(mesh.nodes.mates(mesh.rank)) <= cores() or bool(run.train.link)
    )
    on_cpu = mesh.device.type == "cpu"
    return 1 if waits or not on_cpu or _puts_off(run.layout.schedule) else AT_ONCE


def build_loader(run: cfg.RunConfig, corpus: Corpus, dp_rank: int = 0) -> BatchLoader:
    """The batches of a data-parallel rank; microbatches ordered on the simulated schedule."""
    from moekernels.data.batch_plan import Cost
    from moekernels.data.loader import BatchLoader

    b, lay, m = run.batch, run.layout, run.model
    simulator = Simulator(build_schedule(run))
    lengths = cfg.length_range(b.lengths, b.context)
    return BatchLoader(
        corpus,
        sequences=b.sequences,
        microbatches=b.microbatches * b.accumulation,
        context=None if lengths else b.context,
        lengths=lengths,
        dp=lay.dp,
        dp_rank=dp_rank,
        align=lay.tp,
        policy=b.policy,
        cost=Cost.of_transformer(m.parameters_count(active=True), m.num_layers, m.attention_width),
        makespan=lambda costs: simulator.makespan(costs, [BACKWARD_COST * c for c in costs]),
        seed=run.train.seed,
    )
