"""CPU time that a rank's exchanges take, of two checkouts or two settings, in turns.

Every rank does the same exchanges one after another, and counts the seconds of its process: what it
computes, copies and spends on waiting, not what it sleeps. Sizes are those of the default job:
33 kB to a peer of two. A way is a post and its wait.

    python bench/bench_exchange.py --old ../before --rounds 5
    python bench/bench_exchange.py --old . --old-mode collective
    python bench/bench_exchange.py --cores 1                       # of which all ranks take turns
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def ways(args: argparse.Namespace, rank: int) -> dict[str, Callable[[], object]]:
    import torch

    from moekernels.model.layout import Layout
    from moekernels.parallel import expert, tensor
    from moekernels.parallel.mesh import Mesh

    size, tokens, hidden, top_k = args.ranks, args.tokens, args.hidden, 2
    group = Mesh(Layout(dp=size, ep=size), exchange_mode=args.mode).exchange
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, hidden, generator=generator)
    ids = torch.rand(tokens, args.experts, generator=generator).topk(top_k).indices.int()
    weights = torch.rand(tokens, top_k, generator=generator)
    local = args.experts // size
    plan = expert.ExchangePlan.make(ids, local, group)
    exchange = plan.exchange
    came = exchange.post_out(x, weights, plan).wait()
    whole, flat = torch.randn(size * tokens, hidden), torch.randn(tokens * hidden)
    leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()

    def layer() -> None:
        made = expert.ExchangePlan.make(ids, local, group)
        rows, row_weights, _ = expert.dispatch(*leaves, made)
        out = expert.combine(rows, made)
        torch.autograd.backward([out, row_weights], [x, row_weights.detach()])

    return {
        "dispatch": lambda: exchange.post_out(x, weights, plan).wait(),
        "combine": lambda: exchange.post_back(came.rows, None, plan).wait(),
        "combine's gradient": lambda: exchange.post_out(x, None, plan).wait(),
        "dispatch's gradient": lambda: exchange.post_back(came.rows, came.weights, plan).wait(),
        "a plan": lambda: expert.ExchangePlan.make(ids, local, group),
        "a layer's, and autograd": layer,
        "all_to_all": lambda: tensor.all_to_all(whole, group),
        "all_gather": lambda: tensor.all_gather(x, group),
        "reduce_scatter": lambda: tensor.reduce_scatter(whole, group),
        "all_reduce": lambda: tensor.all_reduce(flat, group),
    }


def work(env, args: argparse.Namespace) -> int:
    import torch

    from moekernels.parallel.tensor import all_gather

    if args.cores:
        os.sched_setaffinity(0, range(args.cores))
    from moekernels import jsonio
    from moekernels.model.layout import Layout
    from moekernels.parallel.mesh import Mesh

    world = Mesh(Layout(dp=args.ranks, ep=args.ranks), exchange_mode=args.mode).world
    took = {}
    for name, call in ways(args, env.rank).items():
        for _ in range(args.calls // 10):
            call()
        all_gather(torch.zeros(1), world)
        began = time.process_time()
        for _ in range(args.calls):
            call()
        spent = (time.process_time() - began) / args.calls * 1e6
        took[name] = all_gather(torch.tensor([spent], dtype=torch.float64), world).mean().item()
    if env.leader:
        print(jsonio.dumps(took))
    return 0


def side(args: argparse.Namespace) -> int:
    from moekernels.parallel.launch import run_local

    return run_local(args.ranks, "cpu", work, args)


def run(checkout: Path, mode: str, arguments: list[str]) -> dict[str, float]:
    command = [str(checkout / ".venv/bin/python"), __file__, *arguments, "--mode", mode, "--side"]
    environment = dict(os.environ, PYTHONPATH=str(checkout))
    said = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(f"{checkout} failed:\n{said.stderr}")
    return json.loads(said.stdout.splitlines()[-1])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, default=HERE, help="checkout, built")
    parser.add_argument("--new", type=Path, default=HERE)
    parser.add_argument("--old-mode", default="shared", choices=("shared", "collective"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of a rank")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--cores", type=int, default=0, help="that ranks share; 0: as they are")
    parser.add_argument("--mode", default="shared", help=argparse.SUPPRESS)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.side:
        return side(args)
    sides = [(args.old.resolve(), args.old_mode), (args.new.resolve(), "shared")]
    found: list[list[dict[str, float]]] = [[], []]
    for number in range(args.rounds):
        for i in (0, 1) if number % 2 == 0 else (1, 0):
            found[i].append(run(*sides[i], arguments))
    print(f"{'microseconds of a rank':24} {'old':>22} {'new':>22}   old / new")
    for name in found[0][0]:
        old, new = ([one[name] for one in of] for of in found)
        ratios = [a / b for a, b in zip(old, new)]
        cells = [f"{statistics.median(v):6.1f} ({min(v):.1f}-{max(v):.1f})" for v in (old, new)]
        print(f"{name:24} {cells[0]:>22} {cells[1]:>22}   {statistics.median(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
