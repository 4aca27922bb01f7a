"""Whether `--replan auto` gains what it predicts, and leaves a balanced run alone.

Two ranks share the experts of every layer; `--hot` of the choices fall on the first one's. After
ten steps the rule of `--replan auto` says what a move would save and makes it. Then steps before
and behind the move are taken in turns, experts moving there and back. A step's time is that of its
busiest rank: what it took of a core, which other programs of the machine do not add to as they do
to the clock on the wall (that is printed, too). The gain should be the predicted one +- 30 %.

    python bench/bench_replan.py --hot 0.8 --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from moekernels import assembly
from moekernels.balance import placement
from moekernels.data.batch import MicroBatch
from moekernels.model.decoder import DecoderSpec
from moekernels.nn.experts import expert_clock
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.launch import RankEnv, run_local
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.tensor import all_reduce
from moekernels.run.sections import RunConfig
from moekernels.train.moves import Moves

EXPERTS, TOP_K, LOOK = 16, 2, 10


def configure(args: argparse.Namespace) -> RunConfig:
    run = RunConfig()
    run.layout.dp = run.layout.ep = 2
    run.batch.microbatches = run.batch.accumulation = 1
    run.train.replan = "auto"
    run.model = DecoderSpec(
        vocab_size=512,
        d_model=args.width,
        num_layers=args.layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        num_experts=EXPERTS,
        top_k=TOP_K,
        expert_d_ff=4 * args.width,
        balance_coef=0.0,
    )
    return run


class Side:
    """A rank: its model, whose choices are drawn, not learned."""

    def __init__(self, env: RankEnv, args: argparse.Namespace, hot: float) -> None:
        run = configure(args)
        self.mesh = assembly.build_mesh(run, env.device)
        chunks = assembly.build_chunks(run, self.mesh)
        self.runtime = assembly.build_runtime(run, self.mesh, chunks)
        shards = [shard for chunk in chunks for shard in chunk.named_shards()]
        self.optimizer = Optimizer(shards, self.mesh, AdamWConfig())
        rows = [slice(0, args.layers)]
        self.moves = Moves(run, self.mesh, chunks, rows, self.optimizer, shards)
        generator = torch.Generator().manual_seed(env.rank)
        # Of the hot rank's experts each has a load of its own, so that there is what to move.
        chance = torch.ones(EXPERTS)
        if hot != 0.5:
            chance = 1 + torch.rand(EXPERTS, generator=torch.Generator().manual_seed(7))
        chance = chance.view(2, -1)
        chance *= torch.tensor([[hot], [1 - hot]]) / chance.sum(1, keepdim=True)
        self.loads = torch.zeros(args.layers, EXPERTS, dtype=torch.float64)
        drawn = []
        for layer in range(args.layers):
            many = chance.flatten().expand(args.tokens, -1)
            ids = torch.multinomial(many, TOP_K, generator=generator).int()
            self.loads[layer] = ids.flatten().bincount(minlength=EXPERTS)
            drawn.append(ids)
        self.loads = all_reduce(self.loads, self.mesh.world)
        if hot == 0.5:  # as even as can be
            even = torch.arange(args.tokens * TOP_K).view(-1, TOP_K) % EXPERTS
            drawn = [even.int()] * args.layers
            self.loads = torch.full_like(self.loads, 2 * args.tokens * TOP_K / EXPERTS)

        def chosen(batch: Any, layer: int, logits: Tensor, ids: Tensor) -> Tensor:
            return drawn[layer - 1]

        chunks[0].route_hook = chosen
        text = torch.randint(0, 512, (args.tokens + 1,), generator=generator)
        pieces = [(text[i : i + 128], text[i + 1 : i + 129]) for i in range(0, args.tokens, 128)]
        self.batches = [MicroBatch.pack(pieces, loss_scale=1 / args.tokens)]

    def step(self) -> tuple[float, float]:
        """The busiest rank's seconds of a core, and seconds on the wall."""
        self.optimizer.zero_grad()
        all_reduce(torch.zeros(1), self.mesh.world)  # begin together
        wall, began = time.perf_counter(), time.process_time()
        self.runtime.step(self.batches, record=False)
        each = torch.zeros(2, 2, dtype=torch.float64)
        each[self.mesh.rank, 0] = time.process_time() - began
        each[self.mesh.rank, 1] = time.perf_counter() - wall
        worked, took = all_reduce(each, self.mesh.world).amax(0).tolist()
        return worked, took

    def look(self) -> dict:
        """What the rule does behind ten steps."""
        for _ in range(2):
            self.step()
        expert_clock.take()
        for _ in range(LOOK):
            self.moves.saw(self.loads, self.step()[1])
        return self.moves.look(LOOK, last=False)


def work(env: RankEnv, args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    expert_clock.now = time.process_time
    still = Side(env, args, 0.5).look()
    side = Side(env, args, args.hot)
    moves = side.moves
    uneven = moves.uneven(side.loads)
    said = side.look()
    if env.leader:
        print(f"balanced loads: {'nothing moves' if not still else f'MOVED {still}'}")
    if "moved_experts" not in said:
        if env.leader:
            print(f"busiest rank over mean {uneven:.2f}: NOTHING MOVED")
        return 1
    places = [placement.unmoved(args.layers, EXPERTS), moves.slot_of]
    gains: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.rounds):
        took = []
        for slots in places:
            moves._move(slots)
            side.step()
            steps = [side.step() for _ in range(3)]
            took.append([statistics.median(x) for x in zip(*steps)])
        for gain, before, behind in zip(gains, *took):
            gain.append(before - behind)
    predicted = said["predicted_gain"]
    core, wall = (statistics.median(gain) for gain in gains)
    if env.leader:
        low, high = min(gains[0]), max(gains[0])
        print(
            f"busiest rank over mean {uneven:.2f}, then {moves.uneven(side.loads):.2f}, "
            f"{said['moved_experts']} experts moved\n"
            f"predicted {1e3 * predicted:.1f} ms a step, realised {1e3 * core:.1f} ms of a core "
            f"({1e3 * low:.1f} to {1e3 * high:.1f}), ratio {core / predicted:.2f}; "
            f"{1e3 * wall:.1f} ms on the wall"
        )
    return int(bool(still) or not 0.7 <= core / predicted <= 1.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hot", type=float, default=0.8, help="share of the first rank's experts")
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank and step")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    return run_local(2, "cpu", work, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
