"""What the GPU benches share: shapes, routings, a clock, a table.

Times are medians of CUDA-graph replays between events, the second-level cache overwritten before
each; what cannot be captured is timed with its launches. On the CPU (`--rehearse`) everything runs
once at tiny sizes, to show that it runs; its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekernels import jsonio

# Of an op: from its result, what it holds at sampled places and what it should hold there (fp64).
Exact = dict[str, Callable[[Any], tuple[Tensor, Tensor]]]
FAR = 0.02  # of the norm; bf16 explains 0.003 of a product and 0.006 of a layer


@dataclass(frozen=True)
class Shape:
    T: int
    H: int
    E: int
    K: int
    routing: str = ""
    F: int = 0

    def __str__(self) -> str:
        ffn = f"F{self.F:<5} " if self.F else ""
        return f"T{self.T:<6} H{self.H:<5} {ffn}E{self.E:<4} K{self.K} {self.routing:8}"


class Clock:
    """Seconds of a function on the device, and the bytes that it allocates at its peak."""

    def __init__(self, device: str, rounds: int):
        self.device, self.rounds = device, rounds
        self.rates: dict[int, float] = {}
        if device == "cuda":
            self.cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, fn: Callable[[], object]) -> float:
        if self.device != "cuda":
            begin = time.perf_counter()
            fn()
            return time.perf_counter() - begin
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                fn()
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                fn()
            run = graph.replay
        except RuntimeError:  # what waits for the device cannot be captured
            torch.cuda.synchronize()
            run = fn
        times = []
        for _ in range(self.rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.cache.zero_()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        return statistics.median(times)

    def peak(self, fn: Callable[[], object]) -> int:
        """Bytes that one call has allocated at most, beyond what there was."""
        if self.device != "cuda":
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_rate(self, nbytes: int) -> float:
        """Bytes a second of a copy that reads and writes `nbytes` in all."""
        half = max(nbytes // 2, 1)
        if half not in self.rates:
            source = torch.empty(half, dtype=torch.int8, device=self.device)
            target = torch.empty_like(source)
            self.rates[half] = 2 * half / self(lambda: target.copy_(source))
        return self.rates[half]


def ids_of(shape: Shape, device: str) -> Tensor:
    """[T, K] int32 distinct ids, every expert alike or by Zipf's law."""
    torch.manual_seed(0)
    share = torch.ones(shape.E, device=device)
    if shape.routing == "zipf":
        share = 1 / torch.arange(1, shape.E + 1, device=device)
    waits = -torch.log(torch.rand(shape.T, shape.E, device=device).clamp_min(1e-20)) / share
    return waits.topk(shape.K, dim=-1, largest=False).indices.int().contiguous()


def sampled(count: int, device: str) -> Tensor:
    """Places spread over [0, count), the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, 48), device=device).long().unique()


def error_of(result: Any, exact: Callable[[Any], tuple[Tensor, Tensor]]) -> float:
    """The norm of the error at the sampled places, as part of what is exact; NaN is far, too. -1
    where a result cannot be compared: there is none, or it is of another shape."""
    if result is None or (isinstance(result, Tensor) and not result.numel()):
        return -1.0
    ours, should = exact(result)
    if ours.shape != should.shape:
        return -1.0
    error = ((ours.detach().double() - should).norm() / should.double().norm()).item()
    return error if error == error else float("inf")


def why_missing(name: str) -> str:
    """Why a package cannot be used here, "" where it can."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def run_bench(
    name: str,
    doc: str,
    peers: tuple[str, ...],
    rows: Callable[[Clock, argparse.Namespace], Iterator[dict]],
) -> int:
    """The command line of a bench: prints a row as it comes and writes it beside --json, as a line
    of the same name with .jsonl, and all of them to --json at the end. The exit code is 1 where a
    row says that a result of ours is `wrong`."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU: does it run?")
    args = parser.parse_args()
    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print(f"{name}: no CUDA device here; --rehearse runs it on the CPU", file=sys.stderr)
        return 2
    clock = Clock(device, rounds=5 if args.quick else 15)
    found: list[dict] = []
    with args.json.with_suffix(".jsonl").open("w") if args.json else nullcontext() as stream:
        for row in rows(clock, args):
            shape, text = row.pop("shape"), row.pop("text")
            found.append({**row, **asdict(shape)})
            print(f"{row['op']:26}{row['implementation']:14}{shape} {text}", flush=True)
            if stream:
                stream.write(jsonio.dumps(found[-1]) + "\n")
                stream.flush()
    skipped = {peer: why for peer in peers if (why := why_missing(peer))}
    for peer, why in skipped.items():
        print(f"skipped {peer}: {why}")
    if args.json:
        report = {"device": device, "rows": found, "skipped": skipped}
        args.json.write_text(jsonio.dumps(report))
    wrong = [f"{row['op']}, {row['implementation']}" for row in found if row.get("wrong")]
    for one in wrong:
        print(f"{name}: wrong result: {one}", file=sys.stderr)
    return 1 if wrong else 0
