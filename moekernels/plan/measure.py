"""How long chunks of small models take on this machine, on as many ranks as a run would have.

One rank has all threads. Several have one each, share the memory's bandwidth and wait for each
other in collectives, as the ranks of `moekernels train` do: so they are measured as such.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moekernels.assembly import DTYPES
from moekernels.data.batch import MicroBatch
from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.parallel import launch
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer

MOST_RANKS = 16  # as many as the samples have experts


@dataclass(frozen=True)
class Sample:
    """A chunk and its microbatch: `tokens` in equal segments; the last chunk has the loss."""

    model: DecoderSpec
    layout: Layout
    tokens: int  # of a tensor-parallel group
    segments: int
    last: bool = False

    @property
    def squares(self) -> float:
        return float(self.tokens * (self.tokens // self.segments))


@dataclass(frozen=True)
class Took:
    """Median seconds of the slowest rank: forward, backward, and an optimiser's step."""

    forward: float
    backward: float
    update: float


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def numbers_of_ranks() -> list[int]:
    """One, two, and as many as there are cores, where these are so many."""
    most = min(cores(), MOST_RANKS)
    return sorted({1, min(2, most), 1 << (most.bit_length() - 1)})


def samples(ranks: int) -> list[Sample]:
    """What tells the constants apart: narrow and wide, short and long, few layers and many."""
    found = []
    layouts = [Layout()]
    if ranks > 1:
        pairs = Layout(tp=2, dp=ranks // 2, ep=2)
        layouts = [Layout(dp=ranks), pairs, Layout(dp=ranks, ep=ranks)]
    shapes = [  # hidden, width in an expert, its FFN's, layers, tokens, segments
        (64, 128, 64, 1, 256, 1),
        (64, 128, 64, 4, 1024, 4),
        (64, 128, 64, 2, 4096, 16),
        (64, 64, 128, 4, 512, 8),
        (128, 128, 64, 1, 4096, 16),
        (128, 128, 64, 4, 256, 1),
        (128, 128, 256, 2, 1024, 1),
        (256, 256, 128, 1, 512, 2),
        (256, 256, 256, 2, 2048, 8),
    ]
    for layout, (i, (hidden, d_in, d_ff, layers, tokens, segments)) in itertools.product(
        layouts, enumerate(shapes)
    ):
        if layout.exchange == 1 and ranks > 1 and i % 2:
            continue  # without collectives half of them will do
        model = DecoderSpec(
            vocab_size=1024, d_model=hidden, num_layers=layers, num_heads=hidden // 16,
            num_kv_heads=hidden // 16, head_dim=16, num_experts=16, top_k=2, qk_norm=True,
            expert_d_in=d_in, expert_d_ff=d_ff, renormalize=False, z_coef=0.0,
        )  # fmt: skip
        found.append(Sample(model, layout, tokens, segments, last=i % 3 == 1))
    return found


def time_sample(sample: Sample, dtype: str, seconds: float, device: torch.device) -> Took:
    """Repeats for about `seconds`; called by every rank of the layout together."""
    model, mesh = sample.model, Mesh(sample.layout, device=device)
    chunk = StageModel(
        model, mesh, range(1, model.num_layers + 1), False, sample.last,
        dtype=DTYPES[dtype], device=device,
    )  # fmt: skip
    optimizer = Optimizer(chunk.named_shards(), mesh, AdamWConfig())
    one = torch.zeros(sample.tokens // sample.segments, dtype=torch.int64)
    batch = MicroBatch.pack([(one, one)] * sample.segments, loss_scale=1 / sample.tokens)
    x = torch.randn(sample.tokens // mesh.tp.size, model.d_model).to(chunk.dtype)
    grad = None if sample.last else x
    laps: list[list[float]] = []

    def lap() -> None:
        given = x.clone().requires_grad_()
        if mesh.world.size > 1:
            dist.barrier()
        marks = [time.perf_counter()]
        y = chunk(batch, given)
        marks.append(time.perf_counter())
        y.backward(grad)
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        optimizer.step()
        marks.append(time.perf_counter())
        laps.append([b - a for a, b in itertools.pairwise(marks)])

    lap()
    laps.clear()  # the first warms up
    start = time.perf_counter()
    lap()
    wanted = torch.tensor([min(25, max(4, int(seconds / (time.perf_counter() - start))))])
    if mesh.world.size > 1:
        dist.broadcast(wanted, 0)
    for _ in range(int(wanted)):
        lap()
    slowest = torch.tensor(laps)
    if mesh.world.size > 1:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return Took(*(statistics.median(column) for column in slowest.T.tolist()))


def _measure(env: launch.RankEnv, chosen: list[Sample], dtype: str, seconds: float) -> list[Took]:
    return [time_sample(sample, dtype, seconds, env.device) for sample in chosen]


def measure(chosen: list[Sample], dtype: str, seconds: float) -> list[Took]:
    """All samples of one number of ranks, in ranks of their own where there are several."""
    threads = torch.get_num_threads()
    try:
        return launch.run_local(chosen[0].layout.world, "cpu", _measure, chosen, dtype, seconds)
    finally:
        torch.set_num_threads(threads)
