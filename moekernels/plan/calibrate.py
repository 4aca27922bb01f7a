"""The roofline's constants, measured on the machine at hand, and predictions held to a run.

A model's chunk is run forward and backward at several sizes. Its time is a sum of unknown constants
(seconds per FLOP of dense and of grouped products, per byte, per layer), each times a count that
`cost` yields, so they come out of one least-squares fit; what is left is the error band.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from moekernels import files, jsonio
from moekernels.errors import UsageError
from moekernels.model.decoder import chunk_parameters
from moekernels.pipeline.schedule import Kind
from moekernels.plan.cost import layer_cost, loss_cost, update_bytes
from moekernels.plan.evaluate import Problem, batch_sizes, evaluate, flush_costs
from moekernels.plan.measure import Sample, cores, measure, numbers_of_ranks, samples
from moekernels.plan.memory import place_of
from moekernels.plan.strategy import Batch, Cluster, Strategy

CONSTANTS = (
    "dense",  # seconds per FLOP of the projections and the head
    "attention",  # a FLOP of attention itself
    "grouped",  # a FLOP of the experts' products
    "weights",  # a FLOP of one more row of each expert: what its weights cost beside its rows
    "bytes",  # a byte between the products
    "layers",  # a layer's forward pass
    "backward_layers",  # a layer's backward pass
    "actions",  # a forward or backward pass of a chunk
    "latency",  # a hop of a collective
    "link",  # a byte of a collective
)
NEVER = 1e30  # FLOPs or bytes a second that cost nothing
IMBALANCE = 1.1  # of a router that nothing has trained
SECONDS = 0.6  # a sample


def store() -> Path:
    return files.cache_folder() / "calibration.json"


def cluster_of(found: dict[str, float], ranks: int = 1, slower: float = 1.0) -> Cluster:
    """Cards on which the constants hold; one that is 0 costs nothing."""

    def rate(constant: str) -> float:
        return 1.0 / (found[constant] * slower) if found.get(constant, 0.0) > 0 else NEVER

    products = {name: rate(name) for name in ("dense", "attention", "grouped")}
    peak = max([r for r in products.values() if r < NEVER], default=1.0)  # what is met of it
    return Cluster(
        gpus=ranks,
        gpus_per_node=max(ranks, 1),
        flops=peak,
        memory=NEVER,
        memory_bandwidth=rate("bytes"),
        link_bandwidth=rate("link"),
        network_bandwidth=rate("link"),
        reserve=0.2e9,
        gemm_efficiency=products["dense"] / peak,
        attention_efficiency=products["attention"] / peak,
        grouped_efficiency=products["grouped"] / peak,
        half_rows=0.0,
        grouped_half_rows=found.get("weights", 0.0) * slower * products["grouped"],
        bandwidth_efficiency=1.0,
        latency=found.get("latency", 0.0) * slower,
        overhead=found.get("layers", 0.0) * slower,
        backward_overhead=found.get("backward_layers", 0.0) * slower,
        action_overhead=found.get("actions", 0.0) * slower,
        update_bandwidth=rate("update"),
        step_overhead=found.get("steps", 0.0) * slower,
        imbalance=IMBALANCE,
        device="cpu",
    )


def counts(sample: Sample, dtype: str) -> dict[str, list[float]]:
    """{forward, backward} of the sample: how much of each constant."""
    found: dict[str, list[float]] = {"forward": [], "backward": []}
    model = sample.model
    s = Strategy(sample.layout, (model.num_layers,), (0,), 1, dtype=dtype)
    size = sample.tokens, sample.squares
    for constant in CONSTANTS:
        # Of `weights` a grouped product must cost something for its rows to be worth any.
        c = cluster_of({constant: 1.0, **({"grouped": 1.0} if constant == "weights" else {})})
        layer = layer_cost(model, c, s)
        rows = layer_cost(model, replace(c, grouped_half_rows=0.0), s)
        loss = loss_cost(model, c, s)(*size) if sample.last else 0.0
        for way, row in found.items():
            cost = getattr(layer.total, way)(*size)
            if constant == "weights":
                cost -= getattr(rows.total, way)(*size)
            cost = model.num_layers * cost + c.action_overhead
            row.append(cost + (loss if way == "forward" else 0.0))
    return found


def fit(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Constants at or above 0 with the least relative error: rows [n, constants], seconds [n]."""
    scaled = rows / seconds[:, None]
    sizes = np.abs(scaled).max(0)
    active = [i for i in range(rows.shape[1]) if sizes[i] > 1e-9]  # the others were not met
    constants = np.zeros(rows.shape[1])
    while active:
        solved, *_ = np.linalg.lstsq(
            scaled[:, active] / sizes[active], np.ones(len(seconds)), rcond=None
        )
        if solved.min() >= 0:
            constants[active] = solved / sizes[active]
            break
        active.pop(int(solved.argmin()))
    return constants


def constants_of(ranks: int, dtype: str, seconds: float) -> dict:
    """Measured on so many ranks: the constants, and how far the samples lie from them."""
    chosen = samples(ranks)
    rows, times, sizes, updates = [], [], [], []
    for sample, took in zip(chosen, measure(chosen, dtype, seconds)):
        count = counts(sample, dtype)
        for way in count:
            rows.append(count[way])
            times.append(getattr(took, way))
        s = Strategy(sample.layout, (sample.model.num_layers,), (0,), 1, dtype=dtype)
        at = place_of(s, 0.0)
        held = chunk_parameters(sample.model, at, s.layer_range(0), False, sample.last)
        sizes.append([sum(held.values()) * update_bytes(s), 1.0])
        updates.append(took.update)
    counted, measured = np.array(rows), np.array(times)
    found = fit(counted, measured)
    update, steps = fit(np.array(sizes), np.array(updates))
    return {
        **dict(zip(CONSTANTS, found.tolist())),
        "update": float(update),  # seconds per byte of the optimiser
        "steps": float(steps),  # a step, whatever its parameters
        "off": np.abs(counted @ found / measured - 1.0).tolist(),
    }


def calibrate(dtype: str = "fp32", seconds: float = SECONDS) -> dict:
    """Measure, fit and store; the constants and their error band."""
    by_ranks = {}
    # The most ranks first: they are forked, best before this process has threads.
    for number in reversed(numbers_of_ranks()):
        by_ranks[str(number)] = constants_of(number, dtype, seconds)
    off = [o for one in by_ranks.values() for o in one.pop("off")]
    found = {
        "dtype": dtype,
        "device": "cpu",
        "cores": cores(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "ranks": by_ranks,
        "median_error": float(np.median(off)),
        "error_band": float(np.quantile(off, 0.9)),
        "measurements": len(off),
    }
    path = store()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, jsonio.dumps(found, indent=2) + "\n")
    except OSError as error:
        said = files.no_room(path, error, remedy="set XDG_CACHE_HOME to another folder")
        raise UsageError(said) from None
    return found


def stored() -> dict:
    """What `calibrate` left here."""
    again = "run moekernels plan --calibrate"
    try:
        found = json.loads(files.read(store()))
    except FileNotFoundError:
        raise UsageError(f"plan: this machine is not calibrated; {again}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{store()}: cannot be read: {error}; {again} again") from None
    if not isinstance(found, dict) or "ranks" not in found:
        raise UsageError(f"{store()}: of another release; {again} anew")
    return found


def here(found: dict, ranks: int) -> Cluster:
    """This machine as a cluster of `ranks` ranks that share its cores and memory."""
    known = sorted(map(int, found["ranks"]))
    measured = found["ranks"][str(next((n for n in known if n >= ranks), known[-1]))]
    slower = max(1.0, ranks / found["cores"])  # they take turns
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    return replace(
        cluster_of(measured, ranks, slower),
        memory=memory,
        error_band=found["error_band"],
        calibrated=(
            f"calibrated {found['when']}: {found['dtype']}, {found['measurements']} measurements, "
            f"90 % of them within {100 * found['error_band']:.0f} %"
        ),
    )


def against(folder: Path, found: dict) -> dict:
    """A run's measured steps beside the prediction: the step, and every stage's F and B."""
    from moekernels.plan.problem import configured
    from moekernels.run import files as cfg
    from moekernels.run.folder import read_metrics

    try:
        run = cfg.resolve(None, folder / "config.toml", {})
        lines = read_metrics(folder)
        events = json.loads(files.read(folder / "trace.json", 1 << 30))["traceEvents"]
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{folder}: not the folder of a finished run: {error}") from None
    if not lines:
        raise UsageError(f"{folder}: metrics.jsonl is empty; use a run with a step done")
    s = configured(run)
    lines = [x for x in lines if x.get("microbatches", s.microbatches) == s.microbatches] or lines
    tokens = statistics.mean(line["tokens"] for line in lines)
    length = max(1, round(tokens / run.batch.sequences))
    model = run.model
    problem = Problem(
        model,
        Batch((length,) * run.batch.sequences, run.batch.policy),
        here(found, s.layout.world),
        run.train.dtype,
    )
    plan = evaluate(problem, s)
    sl = batch_sizes(model, problem.batch, s.layout.dp, s.microbatches, s.layout.tp)
    costs = flush_costs(problem, s, sl)
    measured = defaultdict(list)
    for e in events:
        if e["ph"] == "X" and e["tid"] == 0 and "planned" not in e["args"]:
            virtual = e["args"]["chunk"] * s.layout.pp + e["pid"]
            measured[virtual, Kind(e["name"].rstrip("0123456789"))].append(e["dur"] / 1e6)
    actions = [
        {
            "stage": virtual,
            "action": str(kind),
            "predicted": float(np.mean(costs[virtual, kind])),
            "measured": statistics.mean(took),
        }
        for (virtual, kind), took in sorted(measured.items())
    ]
    steps = [line["seconds"] for line in lines[2:] or lines]  # the first two warm up
    return {
        "run": str(folder),
        "step": {"predicted": plan.step, "measured": statistics.median(steps), "steps": len(steps)},
        "actions": actions,
        "calibrated": problem.cluster.calibrated,
        "error_band": found["error_band"],
    }
