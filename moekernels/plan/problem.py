"""From a configuration to what is to be planned."""

from __future__ import annotations

from pathlib import Path

from moekernels.errors import UsageError
from moekernels.plan.evaluate import Problem
from moekernels.plan.search import Space
from moekernels.plan.strategy import Batch, Cluster, Strategy
from moekernels.train import config as cfg

PINNED = ("tp", "dp", "pp", "ep", "etp", "schedule", "dispatcher")


def even_lengths(low: int, high: int, count: int) -> tuple[int, ...]:
    """`count` lengths that lie as a uniform draw from low to high does on average."""
    return tuple(round(low + (high - low) * (i + 0.5) / count) for i in range(count))


def read_lengths(path: Path) -> tuple[int, ...]:
    """Whole numbers, however separated."""
    try:
        words = path.read_text(encoding="utf-8").replace(",", " ").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--lengths-from {path}: cannot be read: {error}") from None
    for word in words:
        if not word.isdigit() or int(word) < 1:
            raise UsageError(
                f"--lengths-from {path}: {word!r} is no length; whole numbers from 1 would do"
            )
    if not words:
        raise UsageError(f"--lengths-from {path}: no lengths in it; one a sequence would do")
    return tuple(map(int, words))


def batch_of(run: cfg.RunConfig, lengths: tuple[int, ...] | None = None) -> Batch:
    b = run.batch
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
    return Cluster(
        gpus=h.gpus,
        gpus_per_node=h.gpus_per_node,
        flops=h.tflops * 1e12 * dtype_share,
        memory=h.memory_gb * 1e9,
        memory_bandwidth=h.bandwidth_gbps * 1e9,
        link_bandwidth=h.link_gbps * 1e9,
        network_bandwidth=h.network_gbps * 1e9,
        reserve=h.reserve_gb * 1e9,
        gemm_efficiency=h.efficiency,
        attention_efficiency=h.efficiency,
        grouped_efficiency=h.efficiency,
        imbalance=h.imbalance,
    )


def problem_of(run: cfg.RunConfig, lengths: tuple[int, ...] | None = None) -> Problem:
    return Problem(
        cfg.model_config(run.model), batch_of(run, lengths), cluster_of(run), run.train.dtype
    )


def space_of(flags: dict[tuple[str, str], object]) -> Space:
    """What flags were given fixes that part of the search."""
    given = {key: value for (section, key), value in flags.items() if section == "layout"}
    chosen = {key: given[key] for key in PINNED if key in given and given[key] != "auto"}
    state = flags.get(("train", "optimizer_state"))
    micro = flags.get(("batch", "microbatches"))
    micro = None if micro == "auto" else micro
    if micro is not None:
        micro *= flags.get(("batch", "accumulation"), 1)
    return Space(optimizer_state=state, microbatches=micro, **chosen)


def configured(run: cfg.RunConfig) -> Strategy:
    """The strategy that the configuration itself describes."""
    from moekernels.train import assembly

    layout, lay = assembly.layout_of(run), run.layout
    ranges = assembly.layer_ranges(run)
    again = assembly.checkpointed(run)
    gathers = lay.dispatcher == "all_gather" or (
        lay.dispatcher == "auto" and run.model.top_k > layout.ep
    )
    return Strategy(
        layout=layout,
        layers=tuple(len(r) for r in ranges),
        checkpointed=tuple(len(again & set(r)) for r in ranges),
        microbatches=run.batch.microbatches * run.batch.accumulation,
        schedule=lay.schedule,
        virtual_stages=lay.virtual_stages,
        dispatcher="all_gather" if gathers else "all_to_all",
        dtype=run.train.dtype,
        optimizer_state=run.train.optimizer_state,
    )
