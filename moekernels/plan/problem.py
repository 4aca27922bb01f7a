"""From a configuration to what is to be planned."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from moekernels import files
from moekernels.balance.replan import Rule
from moekernels.errors import UsageError
from moekernels.model import dispatch
from moekernels.model.spec import LONGEST, MOST
from moekernels.plan import replicas
from moekernels.plan.evaluate import Problem
from moekernels.plan.search import SHARES, Space
from moekernels.plan.strategy import Batch, Cluster, Objective, Strategy, nodes_of_exchange
from moekernels.run import buffers, link
from moekernels.run import files as cfg

MOST_ROWS = 1e30  # of an expert, to whatever scale: sums of more are not finite
PINNED = ("tp", "dp", "pp", "ep", "etp", "schedule", "dispatcher")


def even_lengths(low: int, high: int, count: int) -> tuple[int, ...]:
    """`count` lengths that lie as a uniform draw from low to high does on average."""
    return tuple(round(low + (high - low) * (i + 0.5) / count) for i in range(count))


def read_lengths(path: Path) -> tuple[int, ...]:
    """Whole numbers, however separated."""
    try:
        words = files.read(path).replace(",", " ").split()
    except (OSError, ValueError) as error:
        raise UsageError(f"--lengths-from {path}: cannot be read: {files.said(error)}") from None
    for word in words:
        if not cfg.whole(word) or not 1 <= int(word) <= LONGEST:
            raise UsageError(
                f"--lengths-from {path}: {word!r} is no length; use whole numbers from 1 to "
                f"{LONGEST}"
            )
    if len(words) > MOST:
        raise UsageError(f"--lengths-from {path}: {len(words)} lengths; use at most {MOST}")
    if not words:
        raise UsageError(f"--lengths-from {path}: no lengths in it; use one per sequence")
    return tuple(map(int, words))


def read_loads(path: Path) -> list[Any]:
    """A list of numbers, or one a layer: JSON, or what a run has left in its folder."""
    instead = "use [rows of expert 1, ...], or such a list per layer"
    try:
        text = files.read(path / "loads.json" if os.path.isdir(path) else path)
    except (OSError, ValueError) as error:
        raise UsageError(f"loads_from {path}: cannot be read: {files.said(error)}") from None
    try:
        loads = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "no such numbers"
        raise UsageError(f"loads_from {path}: not JSON: {reason}; {instead}") from None
    if not isinstance(loads, list) or not loads:
        raise UsageError(f"loads_from {path}: {_kind(loads)}; {instead}")
    return loads


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "an empty list", str: "a text", type(None): "null"}
    return kinds.get(type(value), "a single value")


def _is_load(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST_ROWS
    )


def loads_of(run: cfg.RunConfig) -> tuple[tuple[float, ...], ...]:
    """[L, E] rows of each expert, from the one source that [workload] names; none: ()."""
    w, experts = run.workload, run.model.num_experts
    named = [n for n in ("zipf", "loads", "loads_from") if getattr(w, n)]
    if len(named) > 1:
        raise UsageError(f"workload: {' and '.join(named)} both say how rows lie; use one")
    if not named:
        return ()
    if w.zipf:
        # The busy ones lie anywhere: in the order of the bits read backwards, however many ranks
        # there are, they are dealt out in turn.
        width = (experts - 1).bit_length()
        order = sorted(range(experts), key=lambda n: f"{n:0{width}b}"[::-1])
        return (tuple((n + 1.0) ** -w.zipf for n in order),)
    given = read_loads(Path(w.loads_from)) if w.loads_from else w.loads
    layers: list[Any] = given if given and isinstance(given[0], list) else [given]
    where = f"workload.{named[0]}"
    for number, layer in enumerate(layers, 1):
        if not isinstance(layer, list) or len(layer) != experts:
            has = f"{len(layer)} loads" if isinstance(layer, list) else _kind(layer)
            raise UsageError(
                f"{where}: layer {number} has {has}; use one for each of {experts} experts"
            )
        if not all(_is_load(x) for x in layer):
            raise UsageError(f"{where}: layer {number} has a load that is no number from 0")
        if not sum(layer):
            raise UsageError(f"{where}: layer {number} has no row at all; use one above 0")
    return tuple(tuple(map(float, layer)) for layer in layers)


def batch_of(run: cfg.RunConfig, lengths: tuple[int, ...] | None = None) -> Batch:
    b, w = run.batch, run.workload
    if lengths is None and w.lengths_from:
        lengths = read_lengths(Path(w.lengths_from))
    if lengths is None and w.lengths:
        if not 1 <= min(w.lengths) <= max(w.lengths) <= LONGEST:
            low = min(w.lengths)
            bad = (
                f"{low}; use lengths from 1"
                if low < 1
                else f"{max(w.lengths)}; use lengths up to {LONGEST}"
            )
            raise UsageError(f"workload.lengths has {bad}")
        lengths = tuple(w.lengths)
    if lengths is not None:
        return Batch(lengths, b.policy, f"{len(lengths)} lengths as given")
    bounds = cfg.length_range(b.lengths, b.context)
    if bounds is None:
        text = f"{b.sequences} sequences as long as the context, {b.context}"
        return Batch((b.context,) * b.sequences, b.policy, text)
    text = f"{b.sequences} sequences of {bounds[0]}-{bounds[1]} tokens, evenly spread"
    return Batch(even_lengths(*bounds, b.sequences), b.policy, text)


def cluster_of(run: cfg.RunConfig) -> Cluster:
    h = run.hardware
    dtype_share = {"bf16": 1.0, "fp32": 0.5, "fp64": 0.03}[run.train.dtype]  # of bf16's FLOP/s
    cluster = Cluster(
        gpus=h.gpus,
        gpus_per_node=h.gpus_per_node,
        flops=h.tflops * 1e12 * dtype_share,
        memory=h.memory_gb * 1e9,
        memory_bandwidth=h.bandwidth_gbps * 1e9,
        link_bandwidth=h.link_gbps * 1e9,
        network_bandwidth=h.network_gbps * 1e9,
        host_memory=h.host_gb * 1e9,
        host_bandwidth=h.host_gbps * 1e9,
        reserve=h.reserve_gb * 1e9,
        gemm_efficiency=h.efficiency,
        attention_efficiency=h.efficiency,
        grouped_efficiency=h.efficiency,
        imbalance=h.imbalance,
        loads=loads_of(run),
    )
    return with_link(cluster, run)


def with_link(cluster: Cluster, run: cfg.RunConfig) -> Cluster:
    """The cluster with what the run says of its exchange: parts, a bound of its rows and a link,
    if it sets them."""
    bound = buffers.parse(run.train.exchange_buffers) or 0.0
    parts = run.train.exchange_parts
    cluster = replace(cluster, exchange_parts=parts, exchange_bound=bound)
    wanted = link.parse(run.train.link)
    if wanted is None:
        return cluster
    return replace(cluster, exchange_latency=wanted.latency, exchange_rate=wanted.rate)


def problem_of(run: cfg.RunConfig, lengths: tuple[int, ...] | None = None) -> Problem:
    return Problem(
        run.model,
        batch_of(run, lengths),
        cluster_of(run),
        run.train.dtype,
        Objective(run.objective.best, run.objective.at_least),
        run.train.shard_optimizer,
        run.train.replicas,
        run.train.ema,
        run.train.optimizer,
        _moves(run),
    )


def _moves(run: cfg.RunConfig) -> bool:
    return Rule.parse(run.train.replan).every > 0


def space_of(flags: dict[tuple[str, str], Any]) -> Space:
    """What flags were given fixes that part of the search."""
    given = {key: value for (section, key), value in flags.items() if section == "layout"}
    chosen = {key: given[key] for key in PINNED if key in given and given[key] != "auto"}
    state = flags.get(("train", "optimizer_state"))
    share = flags.get(("train", "offload_optimizer"))
    shares = SHARES if share in ("auto", cfg.AUTO) else () if share is None else (share,)
    micro = flags.get(("batch", "microbatches"))
    micro = None if micro == "auto" else micro
    if micro is not None:
        micro *= flags.get(("batch", "accumulation"), 1)
    return Space(optimizer_state=state, microbatches=micro, shares=shares, **chosen)


def configured(run: cfg.RunConfig) -> Strategy:
    """The strategy that the configuration itself describes; without copies of experts where its
    layout has no use for them."""
    from moekernels import assembly

    whole = replace(run, train=replace(run.train, replicas=0))
    layout, lay = assembly.layout_of(whole), run.layout
    nodes = nodes_of_exchange(layout, run.hardware.gpus_per_node)
    way = dispatch.choose(lay.dispatcher, run.model, layout, nodes)
    useless = replicas.why_not(run.model, layout, way, run.train.replicas, ())
    ranges = assembly.layer_ranges(run)
    again = assembly.checkpointed(run)
    return Strategy(
        layout=layout,
        layers=tuple(len(r) for r in ranges),
        checkpointed=tuple(len(again & set(r)) for r in ranges),
        microbatches=run.batch.microbatches * run.batch.accumulation,
        schedule=lay.schedule,
        virtual_stages=lay.virtual_stages,
        dispatcher=way,
        dtype=run.train.dtype,
        optimizer_state=run.train.optimizer_state,
        shard_optimizer=run.train.shard_optimizer,
        whole_experts=_moves(run),
        replicas=0 if useless else run.train.replicas,
        offload_optimizer=max(0.0, run.train.offload_optimizer),  # auto: what is left to choose
        at_once=max(1, run.train.weights_at_once),  # auto: 1, on cards
        nodes=nodes,
        ema=run.train.ema,
        optimizer=run.train.optimizer,
    )
