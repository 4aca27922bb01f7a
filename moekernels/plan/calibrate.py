"""The roofline's constants, measured on the machine at hand, and predictions held to a run.

A model's chunk is run forward and backward at several sizes. Its time is a sum of unknown constants
(seconds a FLOP of dense and of grouped products, seconds a byte, seconds a layer), each times a
count that `cost` yields, so they come out of one least-squares fit; what is left is the error band.
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
import torch

from moekernels.data.batch import MicroBatch
from moekernels.errors import UsageError
from moekernels.nn.config import ExpertSpec, ModelConfig
from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Layout, Mesh
from moekernels.pipeline.schedule import Kind
from moekernels.plan.cost import layer_cost
from moekernels.plan.evaluate import Problem, evaluate, flush_costs, slots
from moekernels.plan.strategy import Batch, Cluster, Strategy

CONSTANTS = ("dense", "grouped", "bytes", "layers")
NEVER = 1e30  # FLOPs or bytes a second that cost nothing


def store() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moekernels" / "calibration.json"


def unit(constant: str) -> Cluster:
    """A cluster on which only one constant costs: a second a FLOP, a byte or a layer."""
    return Cluster(
        gpus=1,
        gpus_per_node=1,
        flops=1.0 if constant in ("dense", "grouped") else NEVER,
        memory=NEVER,
        memory_bandwidth=1.0 if constant == "bytes" else NEVER,
        link_bandwidth=NEVER,
        network_bandwidth=NEVER,
        gemm_efficiency=1.0 if constant != "grouped" else NEVER,
        grouped_efficiency=1.0 if constant != "dense" else NEVER,
        half_rows=0.0,
        bandwidth_efficiency=1.0,
        latency=0.0,
        overhead=1.0 if constant == "layers" else 0.0,
        imbalance=1.0,
        device="cpu",
    )


def counts(model: ModelConfig, s: Strategy, tokens: float, squares: float) -> dict[str, list]:
    """{forward, backward} of one layer: how much of each constant."""
    found: dict[str, list] = {"forward": [], "backward": []}
    for constant in CONSTANTS:
        layer = layer_cost(model, unit(constant), s)
        for way, row in found.items():
            row.append(layer.total(getattr(layer, way))(tokens, squares))
    return found


def shapes() -> list[tuple[ModelConfig, int, int]]:
    """(model, tokens, segments) that tell the constants apart."""
    found = []
    for hidden, ffn, experts, top_k in ((64, 128, 16, 2), (128, 256, 16, 2), (256, 512, 8, 4)):
        for tokens, segments in ((256, 4), (1024, 2), (2048, 16)):
            model = ModelConfig(
                vocab_size=512, d_model=hidden, num_layers=2, num_heads=hidden // 32,
                num_kv_heads=hidden // 32, head_dim=32, num_experts=experts, top_k=top_k,
                expert=ExpertSpec(hidden, hidden, ffn),
            )  # fmt: skip
            found.append((model, tokens, segments))
    return found


def measure(
    model: ModelConfig, tokens: int, segments: int, dtype: str, repeats: int = 5
) -> tuple[float, float]:
    """(forward, backward) seconds of a chunk of the model's layers: the least of some, for what
    else runs on the machine only adds."""
    chunk = StageModel(
        model, Mesh(Layout()), range(1, model.num_layers + 1), False, False,
        dtype=getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}[dtype]),
    )  # fmt: skip
    for p in chunk.parameters():
        p.main_grad = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
    one = torch.zeros(tokens // segments, dtype=torch.int64)
    batch = MicroBatch.pack([(one, one)] * segments, loss_scale=1 / tokens)
    x = torch.randn(tokens, model.d_model).to(chunk.dtype)
    ahead, back = [], []
    for _ in range(repeats + 1):
        given = x.clone().requires_grad_()
        start = time.perf_counter()
        y = chunk(batch, given)
        middle = time.perf_counter()
        y.backward(x)
        ahead.append(middle - start)
        back.append(time.perf_counter() - middle)
    return min(ahead[1:]), min(back[1:])  # the first warms up


def fit(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Constants at or above 0 with the least relative error: rows [n, 4], seconds [n]."""
    scaled = rows / seconds[:, None]
    active = list(range(rows.shape[1]))
    while active:
        solved, *_ = np.linalg.lstsq(scaled[:, active], np.ones(len(seconds)), rcond=None)
        if solved.min() >= 0:
            break
        active.pop(int(solved.argmin()))
    constants = np.zeros(rows.shape[1])
    constants[active] = solved
    return constants


def calibrate(dtype: str = "fp32", repeats: int = 5) -> dict:
    """Measure, fit and store; the constants and their error band."""
    rows, seconds = [], []
    for model, tokens, segments in shapes():
        squares = float(tokens * (tokens // segments))
        s = Strategy(Layout(), (model.num_layers,), (0,), 1, dtype=dtype)
        count = counts(model, s, tokens, squares)
        for way, took in zip(
            ("forward", "backward"), measure(model, tokens, segments, dtype, repeats)
        ):
            rows.append([model.num_layers * c for c in count[way]])
            seconds.append(took)
    rows, seconds = np.array(rows), np.array(seconds)
    constants = fit(rows, seconds)
    off = np.abs(rows @ constants / seconds - 1.0)
    found = {
        "dtype": dtype,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        **dict(zip(CONSTANTS, constants.tolist())),
        "median_error": float(np.median(off)),
        "error_band": float(np.quantile(off, 0.9)),
        "measurements": len(seconds),
    }
    path = store()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    return found


def stored() -> dict:
    try:
        return json.loads(store().read_text())
    except FileNotFoundError:
        raise UsageError(
            "plan: this machine is not calibrated; moekernels plan --calibrate would do it"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{store()}: cannot be read: {error}; --calibrate anew") from None


def here(found: dict, ranks: int) -> Cluster:
    """This machine as a cluster of `ranks` ranks that share its cores and memory."""

    def rate(constant: str) -> float:
        return 1.0 / found[constant] if found[constant] > 0 else NEVER

    threads = max(1, (os.cpu_count() or 1) // ranks)
    slower = found["threads"] / threads  # a rank has its part of the cores that were measured
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    return replace(
        unit("bytes"),
        gpus=ranks,
        gpus_per_node=ranks,
        flops=1.0,
        memory=memory,
        memory_bandwidth=rate("bytes") / slower,
        link_bandwidth=min(rate("bytes"), 2e9),
        network_bandwidth=min(rate("bytes"), 2e9),
        reserve=0.2e9,
        gemm_efficiency=rate("dense") / slower,
        grouped_efficiency=rate("grouped") / slower,
        latency=100e-6,
        overhead=found["layers"],
        imbalance=1.1 if ranks > 1 else 1.0,
        calibrated=(
            f"calibrated {found['when']}: {found['dtype']}, {found['measurements']} measurements, "
            f"90 % of them within {100 * found['error_band']:.0f} %"
        ),
    )


def against(folder: Path, found: dict) -> dict:
    """A run's measured steps beside the prediction: the step, and every stage's F and B."""
    from moekernels.plan.problem import configured
    from moekernels.train import config as cfg

    try:
        run = cfg.resolve(None, folder / "config.toml", {})
        metrics = (folder / "metrics.jsonl").read_text().splitlines()
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{folder}: not the folder of a finished run: {error}") from None
    lines = [json.loads(line) for line in metrics]
    if not lines:
        raise UsageError(f"{folder}: metrics.jsonl is empty; a run with a step done would do")
    s = configured(run)
    tokens = statistics.mean(line["tokens"] for line in lines)
    length = max(1, round(tokens / run.batch.sequences))
    model = cfg.model_config(run.model)
    problem = Problem(
        model,
        Batch((length,) * run.batch.sequences, run.batch.policy),
        here(found, s.layout.world),
        run.train.dtype,
    )
    plan = evaluate(problem, s)
    sl = slots(model, problem.batch, s.layout.dp, s.microbatches, s.layout.tp)
    costs, _ = flush_costs(problem, s, sl)
    measured = defaultdict(list)
    for e in events:
        if e["ph"] == "X" and e["tid"] == 0:
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
    steps = [line["seconds"] for line in lines]
    return {
        "run": str(folder),
        "step": {"predicted": plan.step, "measured": statistics.median(steps), "steps": len(steps)},
        "actions": actions,
        "calibrated": problem.cluster.calibrated,
        "error_band": found["error_band"],
    }
