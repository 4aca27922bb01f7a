"""Implementations side by side: one group a shape, dtype and direction, and the ratios at the end.

Absolute times of a shared CPU mean little; the ratios within one run do. `make bench` runs all,
`python -m moekernels bench bench/bench_gate.py -k tiny` a part.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

# name: (T, H, E, K)
SHAPES = {
    "tiny": (256, 64, 64, 2),  # what the default training run calls thousands of times per step
    "spec": (2048, 1024, 64, 2),
    "olmoe": (1024, 2048, 64, 8),
    "many": (4096, 1024, 256, 8),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pytest_configure(config):
    threads = int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1))
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    marker = pytest.mark.benchmark(max_time=0.3, min_time=1e-4, min_rounds=5)
    for item in items:
        if not any(mark.name == "benchmark" for mark in item.iter_markers()):
            item.add_marker(marker)


@pytest.fixture(params=list(SHAPES))
def shape(request) -> tuple[int, int, int, int]:
    torch.manual_seed(0)
    return SHAPES[request.param]


@pytest.fixture(params=list(DTYPES))
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture
def compare(benchmark, request):
    """compare(name, fn): times fn beside the others of its group, named by test and parameters."""

    def run(name: str, fn: Callable[[], object], **facts) -> None:
        parts = request.node.callspec.params.items() if hasattr(request.node, "callspec") else ()
        labels = [request.node.originalname.removeprefix("test_")]
        for key, value in parts:
            if key == "shape":
                labels.append("{} T{} H{} E{} K{}".format(value, *SHAPES[value]))
            elif key != "implementation":
                labels.append(str(value))
        benchmark.group = ", ".join(labels)
        benchmark.extra_info.update(implementation=name, threads=torch.get_num_threads(), **facts)
        benchmark(fn)

    return run


def backward_of(fn: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> Callable[[], object]:
    """fn(*leaves) and the gradients of its output for the leaves, as one call."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    cotangent = torch.ones_like(fn(*leaves))
    return lambda: torch.autograd.grad(fn(*leaves), leaves, cotangent)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """How many times longer than ours each other implementation took.

    By the best round: whatever else the machine does only ever adds.
    """
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = {}
    for bench in session.benchmarks if session else []:
        name = bench.extra_info.get("implementation")
        if name and bench.stats.rounds:
            groups.setdefault(bench.group, {})[name] = bench.stats.min
    rows = []
    for group, best in groups.items():
        if "ours" in best:
            others = {n: t / best["ours"] for n, t in best.items() if n != "ours"}
            times = "  ".join(f"{name} {ratio:5.2f}x" for name, ratio in others.items())
            rows.append(f"{group:60} ours {best['ours'] * 1e6:9.1f} us   {times}")
    if rows:
        terminalreporter.section("times of ours, and of the others in multiples of it")
        for row in rows:
            terminalreporter.write_line(row)
