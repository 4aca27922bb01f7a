"""What of an exchange is hidden, by the clock on the wall and by stamps.

Two ranks, each with a core of its own, run the same flush in five ways, turn by turn: (a) every
exchange waited for at once, (b) overlapped: weight gradients under the way home, rows of some
experts on their way while others compute, (c) without the link, which leaves a copy through memory,
(d) in parts without the link, (e) in pairs (`--schedule overlap`). The link is set so that
exchanges take `--share` of (a). Hidden is (a - b) / (a - c), in pairs (a - e) / (a - c); the figure
of the stamps, which a run's metrics have, should agree within 0.05 on a quiet machine. It cannot
see what cutting costs, d - c: smaller products, more calls.

    python bench/bench_overlap.py --parts 4 --rounds 9
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from moekernels import assembly
from moekernels.data.batch import MicroBatch
from moekernels.model.decoder import DecoderSpec
from moekernels.ops import _deferred
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.launch import RankEnv, run_local
from moekernels.parallel.measure import Measure, Times
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.tensor import all_reduce
from moekernels.pipeline.build import build
from moekernels.run.sections import RunConfig

LATENCY = 20e-6
MODES = ("waited", "overlapped", "local", "cut", "paired")
WHOLE, LINKED = ("waited", "local"), ("waited", "overlapped", "paired")


def small_model(width: int, layers: int) -> DecoderSpec:
    return DecoderSpec(
        vocab_size=512,
        d_model=width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        num_experts=16,
        top_k=2,
        expert_d_ff=2 * width,
    )


def configure(args: argparse.Namespace) -> RunConfig:
    run = RunConfig()
    run.layout.dp = run.layout.ep = 2
    run.train.exchange, run.train.exchange_parts = "shared", args.parts
    run.train.weights_at_once = 1  # they hide exchanges here
    run.batch.microbatches, run.batch.accumulation = args.microbatches, 1
    run.model = small_model(args.width, args.layers)
    return run


class Side:
    """A rank: its model, and a flush of it in each of the modes."""

    def __init__(self, env: RankEnv, run: RunConfig, tokens: int) -> None:
        self.mesh = assembly.build_mesh(run, env.device)
        self.chunks = assembly.build_chunks(run, self.mesh)
        self.runtime = assembly.build_runtime(run, self.mesh, self.chunks)
        shards = [shard for chunk in self.chunks for shard in chunk.named_shards()]
        self.optimizer = Optimizer(shards, self.mesh, AdamWConfig())
        generator = torch.Generator().manual_seed(env.rank)
        text = torch.randint(0, 512, (tokens + 1,), generator=generator)
        pieces = [(text[i : i + 128], text[i + 1 : i + 129]) for i in range(0, tokens, 128)]
        self.batches = [MicroBatch.pack(pieces, loss_scale=1 / tokens)] * run.batch.microbatches
        self.exchanges = Measure(self.mesh.exchange, self.mesh.inside)
        self.ways = [block.moe.dispatcher for c in self.chunks for block in c.layers.values()]
        self.parts = self.ways[0].parts
        self.begin, self.rate = _deferred.begin, 0.0
        count = run.batch.microbatches
        self.schedules = {name: build(name, 1, count) for name in ("1f1b", "overlap")}

    def flush(self, mode: str) -> tuple[float, Times, torch.Tensor]:
        """Seconds, the exchange's times, and the gradients' sum."""
        for way in self.ways:
            way.parts = 1 if mode in (*WHOLE, "paired") else self.parts
        self.runtime.schedule = self.schedules["overlap" if mode == "paired" else "1f1b"]
        _deferred.begin = (lambda: None) if mode in WHOLE else self.begin
        memory = self.mesh.exchange.memory
        if mode not in LINKED or not self.rate:
            memory.host.latency, memory.host.rate = 0, 0.0
        else:
            memory.set_link(LATENCY, self.rate)
        self.optimizer.zero_grad()
        self.exchanges.take()
        all_reduce(torch.zeros(1), self.mesh.world)  # begin together
        began = time.perf_counter()
        self.runtime.step(self.batches, record=False)
        all_reduce(torch.zeros(1), self.mesh.world)
        seconds = time.perf_counter() - began
        times = all_reduce(
            torch.tensor(self.exchanges.take(), dtype=torch.float64), self.mesh.world
        )
        grads = torch.cat([b.grads for b in self.optimizer.buckets])
        return seconds, Times(*times.tolist()), grads.clone()

    def work(self, mode: str) -> float:
        """Seconds of a core that a flush takes, whoever else has it meanwhile."""
        began = time.process_time()
        self.flush(mode)
        return time.process_time() - began


def work(env: RankEnv, args: argparse.Namespace) -> int:
    side = Side(env, configure(args), args.tokens)
    for mode in MODES:
        side.flush(mode)
    plain = min(side.work("waited") for _ in range(5))
    stamps = side.exchanges.stamps
    asked = args.share / (1 - args.share) * plain - LATENCY * len(stamps)
    rate = torch.tensor([sum(s.size for s in stamps) / max(asked, 1e-6)], dtype=torch.float64)
    side.rate = all_reduce(rate, side.mesh.world).item() / 2
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    times: dict[str, list[Times]] = {mode: [] for mode in MODES}
    grads = {}
    for turn in range(args.rounds):
        for mode in MODES[turn % len(MODES) :] + MODES[: turn % len(MODES)]:
            took, sums, grads[mode] = side.flush(mode)
            seconds[mode].append(took)
            times[mode].append(sums)
    same = all(torch.equal(grads["waited"], grads[mode]) for mode in LINKED)
    if env.leader:
        print(f"{side.rate / 1e6:.0f} MB/s, {len(stamps)} exchanges a flush")
        for name, of in (("median", statistics.median), ("least", min)):
            a, b, c, d, e = (of(seconds[mode]) for mode in MODES)
            took = ", ".join(f"{mode} {1e3 * of(seconds[mode]):.0f} ms" for mode in MODES)
            share, gain = (a - c) / a, (a - b) / (a - c)
            print(
                f"  {name}: {took}; exchange {share:.2f} of the waited, hidden {gain:.2f}, "
                f"{gain + (d - c) / (a - c):.2f} but for what cutting costs, "
                f"{(a - e) / (a - c):.2f} in pairs"
            )
        for mode in LINKED:
            shares = [t.hidden / t.flight for t in times[mode]]
            flight = 1e3 * statistics.median(t.flight for t in times[mode]) / 2
            print(
                f"  {mode}: hidden by stamps {statistics.median(shares):.2f} "
                f"({min(shares):.2f} to {max(shares):.2f}) of {flight:.0f} ms a flush"
            )
        print(f"  gradients {'have the same bits' if same else 'DIFFER'}")
    return int(not same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=1024, help="of a microbatch and rank")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    return run_local(2, "cpu", work, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
