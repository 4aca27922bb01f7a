"""The planner held to time: to published runs, to runs on this machine, and to the clock.

    python bench/bench_plan.py published        # predicted over reported, no machine needed
    python bench/bench_plan.py measured         # calibrates, trains a dozen variants, compares
    pytest bench/bench_plan.py                  # how long a search takes

`measured` runs no more ranks than cores. Its median error and Kendall's tau want a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import pytest
from machine import where

from moekernels import jsonio
from moekernels.cli import main as main_of_package
from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.plan import calibrate
from moekernels.plan.evaluate import Problem, evaluate
from moekernels.plan.problem import problem_of
from moekernels.plan.search import search
from moekernels.plan.strategy import Batch, Cluster, Strategy
from moekernels.run import files as cfg

QWEN3_30B = DecoderSpec(
    vocab_size=151936,
    d_model=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    top_k=8,
    expert_d_ff=768,
    qk_norm=True,
)
MEDIAN_ERROR, TAU = 0.10, 0.8


@dataclass(frozen=True)
class Published:
    """A reported row; tokens/s of one card, sequences of 4,096 tokens, balanced by force."""

    name: str
    source: str
    strategy: Strategy
    sequences: int
    tokens_per_second: float
    note: str


PUBLISHED = (
    Published(
        "Qwen3-30B-A3B, 8 H100, EP8",
        "NeMo AutoModel, docs/performance-summary.md",
        Strategy(Layout(dp=8, ep=8), (48,), (0,), 64),
        512,
        12040,
        "weights sharded over data-parallel ranks",
    ),
    Published(
        "Qwen3-30B-A3B, 16 H100, PP2 VP24 EP8",
        "Megatron-Bridge 25.11, docs/performance-summary.md",
        Strategy(Layout(dp=8, pp=2, ep=8), (1,) * 48, (0,) * 48, 64, "interleaved", 24),
        512,
        5275,
        "ran in fp8, planned in bf16",
    ),
)


def published(efficiency: float) -> list[tuple[Published, float]]:
    """(row, predicted tokens/s of a card)."""
    rows = []
    for row in PUBLISHED:
        h100 = Cluster(
            row.strategy.layout.world, 8, 989e12, 80e9, 3.35e12, 450e9, 50e9,
            gemm_efficiency=efficiency, attention_efficiency=efficiency,
            grouped_efficiency=efficiency, imbalance=1.0,
        )  # fmt: skip
        batch = Batch((4096,) * row.sequences)
        plan = evaluate(Problem(QWEN3_30B, batch, h100), row.strategy)
        rows.append((row, plan.tokens_per_second / plan.gpus))
    return rows


SIZES = {
    "small": "--d-model 64 --heads 4 --layers 4 --sequences 16 --context 128",
    "middle": "--d-model 128 --heads 8 --layers 8 --sequences 16 --context 256",
    "large": "--d-model 192 --heads 12 --layers 8 --expert-d-in 192 --expert-d-ff 128 "
    "--sequences 32 --context 256",
}
WAYS = (
    "--tp 1 --microbatches 4",
    "--tp 2 --microbatches 2",
    "--dp 2 --ep 2 --microbatches 4",
    "--pp 2 --microbatches 2",
    "--pp 2 --microbatches 8",
    "--pp 2 --schedule interleaved --virtual-stages 2 --microbatches 4",
)
COMMON = "--preset tiny --experts 16 --accumulation 1 --eval-sequences 16 --device cpu"
VARIANTS = [f"{size} {way}" for size in SIZES.values() for way in WAYS]


def _train(flags: str, folder: Path, steps: int) -> None:
    """A run in a process of its own, which has imported all before and computed nothing."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        words = f"train {COMMON} {flags} --steps {steps} --out {folder}".split()
        code = main_of_package(words)
    sys.exit(code)


def measured(steps: int, keep: Path) -> dict:
    """Calibrate, train every variant for some steps; predicted and measured seconds of each."""
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    process = fork.Process(target=lambda: queue.put(calibrate.calibrate()))
    process.start()
    found = queue.get()
    process.join()
    rows = []
    for number, flags in enumerate(VARIANTS):
        folder = keep / str(number)
        process = fork.Process(target=_train, args=(flags, folder, steps))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"bench_plan: train {COMMON} {flags} ended with {process.exitcode}")
        compared = calibrate.against(folder, found)
        actions = {
            f"{a['stage']}{a['action']}": [round(a["predicted"], 5), round(a["measured"], 5)]
            for a in compared["actions"]
        }
        rows.append({"flags": flags, **compared["step"], "actions": actions})
    off = [abs(r["predicted"] / r["measured"] - 1) for r in rows]
    return {
        "rows": rows,
        "median_error": statistics.median(off),
        "tau": kendall(rows),
        "calibration": found,
    }


def kendall(rows: list[dict]) -> float:
    pairs = [
        (a["predicted"] - b["predicted"]) * (a["measured"] - b["measured"])
        for a, b in combinations(rows, 2)
    ]
    return sum((p > 0) - (p < 0) for p in pairs) / len(pairs)


@pytest.mark.parametrize("gpus", [8, 64, 4096])
def test_search(benchmark, gpus):
    asked = problem_of(cfg.resolve("spec-30b", None, {}))
    asked = replace(asked, cluster=replace(asked.cluster, gpus=gpus))
    benchmark.group = "plan"
    result = benchmark.pedantic(search, (asked,), rounds=1)
    assert result.best.memory <= asked.cluster.memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("published", "measured"))
    parser.add_argument("--efficiency", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write what was measured, machine and commit")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs themselves")
    args = parser.parse_args()
    if args.what == "published":
        for row, said in published(args.efficiency):
            print(
                f"{row.name:<38} reported {row.tokens_per_second:>6.0f}  predicted {said:>6.0f} "
                f"tokens/s a card  ratio {said / row.tokens_per_second:.2f}  ({row.note}; "
                f"{row.source})"
            )
        return 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(args.steps, args.keep or Path(folder))
    print("predicted  measured   ratio")
    for r in found["rows"]:
        ratio = r["predicted"] / r["measured"]
        print(f"{r['predicted']:8.3f} s {r['measured']:8.3f} s {ratio:6.2f}  {r['flags']}")
    print(jsonio.dumps({k: found[k] for k in ("median_error", "tau")}))
    print(f"{len(found['rows'])} variants in {time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.write_text(jsonio.dumps({**where(), **found}, indent=1) + "\n")
    return 0 if found["median_error"] <= MEDIAN_ERROR and found["tau"] >= TAU else 1


if __name__ == "__main__":
    sys.exit(main())
