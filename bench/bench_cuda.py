"""Times the CUDA ops beside torch and CuPy on the GPU of this machine; prints a table and writes
JSON.

Times are medians of CUDA-graph replays between events, the second-level cache overwritten before
each; bytes moved over time are set against what a plain copy of as many bytes reaches. What is
not importable is named as skipped. Legend: T tokens, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moekernels import interop, ops

TOKENS, HIDDEN = (4096, 16384, 65536), (1024, 2048, 4096)
EXPERTS, TOP_K = (8, 64, 256), (1, 2, 4, 8)
ROUTINGS = ("balanced", "zipf")
PEERS = ("cupy", "triton", "liger_kernel")

Candidate = tuple[str, str, Callable[[], object], int]  # op, implementation, function, bytes moved


@dataclass(frozen=True)
class Shape:
    T: int
    H: int
    E: int
    K: int
    routing: str = ""

    def __str__(self) -> str:
        return f"T{self.T:<6} H{self.H:<5} E{self.E:<4} K{self.K} {self.routing:8}"


class Clock:
    """Seconds of a function on the device."""

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        self.rates: dict[int, float] = {}

    def __call__(self, fn: Callable[[], object]) -> float:
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
        except (
            RuntimeError
        ):  # what waits for the device cannot be captured: timed with its launches
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

    def copy_rate(self, nbytes: int) -> float:
        """Bytes a second of a copy that reads and writes `nbytes` in all."""
        half = max(nbytes // 2, 1)
        if half not in self.rates:
            source = torch.empty(half, dtype=torch.int8, device="cuda")
            target = torch.empty_like(source)
            self.rates[half] = 2 * half / self(lambda: target.copy_(source))
        return self.rates[half]


def ids_of(shape: Shape) -> Tensor:
    """[T, K] int32 distinct ids, every expert alike or by Zipf's law."""
    torch.manual_seed(0)
    share = torch.ones(shape.E, device="cuda")
    if shape.routing == "zipf":
        share = 1 / torch.arange(1, shape.E + 1, device="cuda")
    waits = -torch.log(torch.rand(shape.T, shape.E, device="cuda").clamp_min(1e-20)) / share
    return waits.topk(shape.K, dim=-1, largest=False).indices.int().contiguous()


def gate_candidates(shape: Shape) -> Iterator[Candidate]:
    logits = torch.randn(shape.T, shape.E, device="cuda", dtype=torch.bfloat16)
    ones = torch.ones(shape.T * shape.K, device="cuda")
    moved = logits.nbytes + shape.T * shape.K * 8

    def plain():
        scores = torch.softmax(logits.float(), dim=-1)
        weights, ids = scores.topk(shape.K, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        counts = torch.zeros(shape.E, device="cuda").index_add_(0, ids.flatten(), ones)
        z_sum = torch.logsumexp(logits.float(), -1).square().sum()
        return weights, ids, scores.sum(0), counts, z_sum

    yield "gate", "ours", lambda: ops.gate(logits, shape.K, renormalize=True), moved
    yield "gate", "torch", plain, moved
    grads = torch.rand(shape.T, shape.K, device="cuda"), torch.rand(1, shape.E, device="cuda")
    ids = ops.gate(logits, shape.K).ids
    backward = torch.ops.moekernels._gate_backward.default
    one = torch.ones(1, device="cuda")
    yield (
        "gate backward",
        "ours",
        lambda: backward(logits, ids, *grads, one, 0, True, 1.0, None),
        2 * logits.nbytes,
    )


def route_candidates(shape: Shape) -> Iterator[Candidate]:
    ids = ids_of(shape)
    flat, moved = ids.flatten(), ids.numel() * 16

    def by_sort():
        order = torch.sort(flat, stable=True).indices
        row_of = torch.empty_like(order)
        row_of[order] = torch.arange(len(order), device="cuda")
        return row_of, torch.bincount(flat, minlength=shape.E)

    yield "route", "ours", lambda: ops.route(ids, shape.E), moved
    yield "route", "torch", by_sort, moved


def row_candidates(shape: Shape) -> Iterator[Candidate]:
    routing = ops.route(ids_of(shape), shape.E)
    token_of, row_of = routing.token_of, routing.row_of
    token_index, row_index = token_of.long(), row_of.long()
    x = torch.randn(shape.T, shape.H, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(shape.T * shape.K, shape.H, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(shape.T, shape.K, device="cuda")
    # The least there is to move: each token's and each row's elements once.
    moved = x.nbytes + rows.nbytes

    def weighted():
        return (rows[row_index] * weights[:, :, None].bfloat16()).sum(1)

    backward = torch.ops.moekernels._combine_backward.default
    yield "permute", "ours", lambda: ops.permute(x, token_of, row_of), moved
    yield "permute", "torch", lambda: x.index_select(0, token_index), moved
    yield "combine", "ours", lambda: ops.combine(rows, row_of, token_of), moved
    yield "combine", "torch", lambda: rows[row_index].sum(1), moved
    yield "combine weighted", "ours", lambda: ops.combine(rows, row_of, token_of, weights), moved
    yield "combine weighted", "torch", weighted, moved
    yield (
        "combine weighted backward",
        "ours",
        lambda: backward(x, rows, row_of, token_of, weights),
        x.nbytes + 2 * rows.nbytes,
    )
    if not why_missing("cupy"):
        bits, index = interop.to_cupy(x.view(torch.int16)), interop.to_cupy(token_index)

        def take():
            with interop.cupy_stream():
                return bits.take(index, axis=0)

        yield "permute", "cupy", take, moved


def why_missing(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def shapes(quick: bool) -> Iterator[tuple[Callable, Shape]]:
    for tokens in TOKENS[:1] if quick else TOKENS:
        for experts in EXPERTS:
            for top_k in TOP_K[-1:] if quick else TOP_K:
                yield gate_candidates, Shape(tokens, 0, experts, top_k)
                for routing in ROUTINGS:
                    yield route_candidates, Shape(tokens, 0, experts, top_k, routing)
        # Rows do not feel E much: every H and K at E=64, the other E at one H and K.
        wanted = [(h, 64, k) for h in HIDDEN for k in TOP_K] + [(2048, e, 8) for e in (8, 256)]
        for hidden, experts, top_k in wanted[::5] if quick else wanted:
            for routing in ROUTINGS:
                yield row_candidates, Shape(tokens, hidden, experts, top_k, routing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_cuda: no CUDA device here", file=sys.stderr)
        return 2
    clock = Clock(rounds=5 if args.quick else 15)
    rows = []
    for candidates, shape in shapes(args.quick):
        for op, name, fn, moved in candidates(shape):
            seconds = clock(fn)
            share = moved / seconds / clock.copy_rate(moved)
            facts = {"op": op, "implementation": name, "us": seconds * 1e6, "bytes": moved}
            rows.append({**facts, "share_of_copy": share, **asdict(shape)})
            print(f"{op:26}{name:7}{shape} {seconds * 1e6:9.1f} us {share * 100:6.1f} % of copy")
    skipped = {name: why for name in PEERS if (why := why_missing(name))}
    for name, why in skipped.items():
        print(f"skipped {name}: {why}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "skipped": skipped}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
