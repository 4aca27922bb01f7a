"""What each command does with its parsed flags; heavy imports wait until it is known which one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moekernels.errors import UsageError
from moekernels.run import files as cfg

PLAN_FLAGS = {  # flags of `plan` alone: section, key, type, help
    "gpus": ("hardware", "gpus", int, "cards"),
    "gpus_per_node": ("hardware", "gpus_per_node", int, "cards of a node"),
    "memory_gb": ("hardware", "memory_gb", float, "memory of a card, 1e9 bytes"),
    "tflops": ("hardware", "tflops", float, "dense bf16 TFLOP/s of a card"),
    "objective": ("objective", "best", str, "throughput, latency, cost, gpus or memory"),
    "at_least": ("objective", "at_least", float, "sequences/s that the plan must reach"),
    "zipf": ("workload", "zipf", float, "experts' loads fall with this power of their place"),
    "loads_from": ("workload", "loads_from", str, "experts' loads: a run's folder, or JSON"),
}


def train(args) -> int:
    from moekernels.train import start

    return start.train(
        args.preset,
        args.config,
        args.flags,
        out=args.out,
        name=args.name,
        resume_how=args.resume,
        init_from=args.init_from,
    )


def import_(args) -> int:
    from moekernels.train import importing

    return importing.import_(args.source, args.out)


def export(args) -> int:
    from moekernels.train import exporting

    return exporting.export(args.source, args.out, args.dtype or "", kind=args.weights)


def experts(args) -> int:
    from moekernels.cli.experts import experts as show

    return show(args.source, as_json=args.json)


def generate(args) -> int:
    from moekernels.train import generating

    return generating.generate(
        args.source,
        args.prompt or [""],
        tokens=args.tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        device=args.device,
        expert_cache=args.expert_cache,
        expert_policy=args.expert_policy,
        kind=args.weights,
    )


def verify(args) -> int:
    from moekernels.verify import command

    degrees = {d: getattr(args, d) for d in cfg.DEGREES if getattr(args, d) is not None}
    return command.verify(
        degrees,
        everything=args.all,
        schedule=args.schedule,
        virtual_stages=args.virtual_stages,
        experts=args.experts,
        top_k=args.top_k,
        steps=args.steps,
        balance_scope=args.balance_scope,
        dtype=args.dtype,
        device=args.device,
        exchange=args.exchange,
        exchange_buffers=args.exchange_buffers,
    )


def plan(args) -> int:
    from moekernels.cli import plan as planner

    if args.calibrate:
        return planner.calibrate()
    if args.against is not None:
        return planner.against(args.against, as_json=args.json)
    told = {
        (section, key): getattr(args, name)
        for name, (section, key, _, _) in PLAN_FLAGS.items()
        if getattr(args, name) is not None
    }
    return planner.plan(
        args.preset,
        args.config,
        args.flags,
        told=told,
        lengths_from=args.lengths_from,
        as_json=args.json,
        html=args.html,
        trace=args.trace,
        everything=args.all,
        here=args.here,
    )


def bench(args) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench").is_dir() or not (root / "pyproject.toml").is_file():
        raise UsageError(
            f"bench runs from a source checkout, and {root} has no bench/; clone the repository"
        )
    named = any(not a.startswith("-") and Path(a.split("::")[0]).exists() for a in args.rest)
    paths = [] if named else ["bench"]
    # Bench files are named bench_*.py, which pytest does not collect by itself.
    options = ["-o", "python_files=bench_*.py", "--benchmark-only"]
    command = [sys.executable, "-m", "pytest", *options, *args.rest, *paths]
    return subprocess.run(command, cwd=root).returncode


def info(args) -> int:
    from moekernels.cli import explain
    from moekernels.cli import info as facts

    if args.device is not None and args.explain is None:
        raise UsageError("--device goes with --explain")
    print(facts.info() if args.explain is None else explain.explain(args.explain, args.device))
    return 0
