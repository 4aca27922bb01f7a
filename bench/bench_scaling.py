"""How one MoE layer's time and memory grow with tokens, experts, choices, width and ranks.

Each axis goes over 64x, doubling, everything else fixed. A point is a process of its own on one
thread: the seconds of a core that forward and backward of each op take (the least of a few, so that
other programs add nothing), and how far its memory rose. A slope is that of log time against log
size, over all of the axis and over its last three octaves, where what does not grow has become
small and data leave a cache; above 1 is worse than linear. Along ranks a step of a one-layer model
is taken, the same tokens on each and an equal share of the experts, so that work a rank stays the
same: 0 is perfect, 1 is what messages between all pairs cost.

    python bench/bench_scaling.py [--axis NAME] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from machine import where
from torch import Tensor

from moekernels import assembly, jsonio, ops
from moekernels.data.batch import MicroBatch
from moekernels.model.decoder import DecoderSpec
from moekernels.ops.route import Routing
from moekernels.parallel.launch import RankEnv, run_local
from moekernels.parallel.tensor import all_gather, all_reduce
from moekernels.run.sections import RunConfig

MULTIPLES = tuple(2**i for i in range(7))  # 64x
OCTAVES = 3  # the end of an axis, over which a slope of its own is taken
LINEAR = 1.1  # a slope above this is said to be worse than linear


@dataclass(frozen=True)
class Size:
    """tokens T, hidden H, expert hidden F, experts E, choices K."""

    tokens: int = 512
    hidden: int = 128
    ffn: int = 128
    experts: int = 64
    top_k: int = 2


# Where each axis begins.
AXES = {
    "T": Size(tokens=128),
    "E": Size(experts=8),
    "K": Size(top_k=1, experts=128),  # K = E would load all experts alike, at one power of two
    "F": Size(ffn=32),
}
FIELDS = {"T": "tokens", "E": "experts", "K": "top_k", "F": "ffn"}
RANKS_TOKENS, RANKS_EXPERTS = 64, 64


def least(call: Callable[[], object], rounds: int) -> float:
    """Seconds of a core."""
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return min(taken)


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most so far."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def trained(call: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    """`call` and the gradients of its sum for the leaves."""
    return lambda: torch.autograd.grad(call().sum(), leaves)


def parts_of(size: Size) -> dict[str, Callable[[], object]]:
    """Forward and backward of each op of the layer, and of the whole, as calls."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.05).requires_grad_()

    t, h, f, e, k = size.tokens, size.hidden, size.ffn, size.experts, size.top_k
    x, router = normal(t, h), normal(e, h)
    w1, w2 = normal(e, 2 * f, h), normal(e, h, f)
    logits = (x @ router.T).detach().requires_grad_()
    gate = ops.gate(logits, k, renormalize=True)
    fixed = ops.route(gate.ids, e)
    weights = ops.permute_weights(gate.weights.detach(), fixed).requires_grad_()
    rows = normal(t * k, h)

    def experts(weights: Tensor, routing: Routing) -> Tensor:
        view = {"token_of": routing.token_of, "row_of": routing.row_of}
        return ops.experts(x, weights, w1, w2, routing.offsets, **view)

    def layer() -> Tensor:
        gate = ops.gate(x @ router.T, k, renormalize=True)
        routing = ops.route(gate.ids, e)
        y = experts(ops.permute_weights(gate.weights, routing), routing)
        return ops.combine(y, routing.row_of, routing.token_of)

    return {
        "gate": trained(lambda: ops.gate(logits, k, renormalize=True).weights, logits),
        "route": lambda: ops.route(gate.ids, e),
        "experts": trained(lambda: experts(weights, fixed), x, weights, w1, w2),
        "combine": trained(lambda: ops.combine(rows, fixed.row_of, fixed.token_of), rows),
        "layer": trained(layer, x, router, w1, w2),
    }


def point(size: Size, rounds: int) -> dict[str, float]:
    """Seconds of each part, and the bytes by which the layer's step raised this process."""
    torch.set_num_threads(1)
    gc.collect()
    before = resident("VmRSS")
    parts = parts_of(size)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM counts from here
    parts["layer"]()
    memory = resident("VmHWM") - before
    return {"memory": memory, **{name: least(call, rounds) for name, call in parts.items()}}


def in_own_process(call: Callable[..., dict], *args: object) -> dict[str, float]:
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    process = fork.Process(target=lambda: queue.put(call(*args)))
    process.start()
    process.join(600)
    if process.exitcode != 0:
        sys.exit(f"bench_scaling: {call.__name__}{args} ended with {process.exitcode}")
    return queue.get()


def rank_step(env: RankEnv, rounds: int) -> dict[str, float]:
    """A step of a model whose experts all ranks share: the busiest rank's seconds of a core, and
    the bytes that it rose by."""
    torch.set_num_threads(1)
    before = resident("VmRSS")
    run = RunConfig()
    run.layout.dp = run.layout.ep = env.world
    run.batch.microbatches = run.batch.accumulation = 1
    run.model = DecoderSpec(
        vocab_size=64,
        d_model=64,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        num_experts=RANKS_EXPERTS,
        top_k=2,
        expert_d_ff=64,
    )
    mesh = assembly.build_mesh(run, env.device)
    runtime = assembly.build_runtime(run, mesh, assembly.build_chunks(run, mesh))
    text = torch.arange(RANKS_TOKENS + 1) % 64
    batch = MicroBatch.pack([(text[:-1], text[1:])], loss_scale=1 / RANKS_TOKENS)
    times = []
    for _ in range(rounds + 1):
        all_reduce(torch.zeros(1), mesh.world)
        began = time.process_time()
        runtime.step([batch], record=False)
        times.append(time.process_time() - began)
    told = torch.tensor([min(times[1:]), resident("VmHWM") - before], dtype=torch.float64)
    slowest = all_gather(told.view(1, -1), mesh.world).amax(0)
    return {"step": slowest[0].item(), "memory": slowest[1].item()}


def along_ranks(rounds: int) -> list[dict[str, float]]:
    return [
        {"size": ranks, **in_own_process(run_local, ranks, "cpu", rank_step, rounds)}
        for ranks in MULTIPLES
    ]


def along(axis: str, rounds: int) -> list[dict[str, float]]:
    field, begin = FIELDS[axis], AXES[axis]
    sizes = [replace(begin, **{field: getattr(begin, field) * m}) for m in MULTIPLES]
    return [{"size": getattr(s, field), **in_own_process(point, s, rounds)} for s in sizes]


def slope(points: list[dict[str, float]], name: str) -> float:
    """By least squares, of the log of `name` against the log of the size."""
    x = [math.log(p["size"]) for p in points]
    y = [math.log(max(p[name], 1e-9)) for p in points]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle) ** 2 for a in x)
    return sum((a - middle) * (b - level) for a, b in zip(x, y)) / spread


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axis", choices=(*AXES, "ranks"), help="one axis")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the points, with machine and commit")
    args = parser.parse_args()
    found: dict[str, dict] = {}
    for axis in (*AXES, "ranks"):
        if args.axis not in (None, axis):
            continue
        points = along_ranks(args.rounds) if axis == "ranks" else along(axis, args.rounds)
        names = [name for name in points[0] if name != "size"]
        slopes = {n: (slope(points, n), slope(points[-OCTAVES - 1 :], n)) for n in names}
        found[axis] = {"points": points, "slopes": slopes}
        print(f"{axis}: {points[0]['size']} to {points[-1]['size']}")
        for name, (whole, end) in slopes.items():
            first, last = (
                f"{p[name] / 2**20:.1f} MiB" if name == "memory" else f"{p[name] * 1e3:.3f} ms"
                for p in (points[0], points[-1])
            )
            said = "   WORSE THAN LINEAR" if max(whole, end) > LINEAR else ""
            print(
                f"  {name:8s} {first:>11s} -> {last:>11s}   slope {whole:5.2f}, "
                f"at the end {end:5.2f}{said}",
                flush=True,
            )
    if args.json:
        told = jsonio.dumps({**where(), "axes": found}, indent=1)
        args.json.write_text(told + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
