"""The planner's order of 1F1B, zb and overlap held to flushes that ran, and its memory to theirs.

Two ranks, a core each. In each of nine settings all three schedules run the same flush, turn by
turn, over one stage whose ranks exchange rows over a set link, or over two stages. What a flush
takes is read from the traces of both ranks. What it should take is what the planner's simulator
says of costs that the same run has shown without the link: F and B of 1F1B, I and W of zb, the
pieces of pairs, and from stamps how long an exchange flies over the link.

A setting is right where no two schedules that differ by more than 3 %, and by more than the noise
of the measurement, are predicted the other way round or as equal; closer ones are ties.

    export PYTHONPATH=.  # of the repository
    python bench/bench_schedules.py order --json bench/baselines/schedules.json
    python bench/bench_schedules.py order --only 'pp1 m4' --json ...    # a part; it joins the rest
    python bench/bench_schedules.py two --json ...  # PP2, m 4: zb over 1F1B, and memory of both
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist
from bench_overlap import small_model
from bench_plan import where
from flush_costs import SCHEDULES, Flushes, Setting, makespan, passes_of, predict

from moekernels import assembly, jsonio
from moekernels.data.batch import MicroBatch
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.launch import RankEnv, run_local
from moekernels.parallel.measure import Measure, Stamps
from moekernels.parallel.optimizer import Optimizer
from moekernels.parallel.tensor import all_reduce
from moekernels.pipeline.build import build
from moekernels.pipeline.schedule import Kind
from moekernels.pipeline.trace import Event
from moekernels.plan.memory import stage_memory
from moekernels.plan.strategy import Strategy
from moekernels.run.sections import RunConfig
from python_tests.support.peak import Held

LATENCY = 20e-6
TIE = 0.03
NEEDED = 8  # of nine settings
POINTS = 0.03  # between the measured and the simulated ratio of two stages


SETTINGS = [
    *(Setting(1, m, share) for m in (4, 8) for share in (0.15, 0.3, 0.5)),
    *(Setting(2, m) for m in (2, 4, 8)),
]


def configure(pp: int, args: argparse.Namespace) -> RunConfig:
    run = RunConfig()
    run.layout.pp, run.layout.dispatcher = pp, "all_to_all"
    run.layout.dp = run.layout.ep = 2 // pp
    run.train.exchange = "shared"
    run.batch.microbatches, run.batch.accumulation = 4, 1
    run.train.weights_at_once = 1  # as each schedule has it
    run.model = small_model(args.width, args.layers * pp)
    return run


class Side:
    """A rank: its model, and a flush of it under each schedule."""

    def __init__(self, env: RankEnv, pp: int, args: argparse.Namespace) -> None:
        self.run, self.tokens = configure(pp, args), args.tokens
        self.mesh = assembly.build_mesh(self.run, env.device)
        self.chunks = assembly.build_chunks(self.run, self.mesh)
        self.runtime = assembly.build_runtime(self.run, self.mesh, self.chunks)
        shards = [shard for chunk in self.chunks for shard in chunk.named_shards()]
        self.optimizer = Optimizer(shards, self.mesh, AdamWConfig())
        generator = torch.Generator().manual_seed(env.rank // pp)
        text = torch.randint(0, 512, (args.tokens + 1,), generator=generator)
        pieces = [(text[i : i + 128], text[i + 1 : i + 129]) for i in range(0, args.tokens, 128)]
        self.batch = MicroBatch.pack(pieces, loss_scale=1 / args.tokens)
        self.exchanges = Measure(self.mesh.exchange, self.mesh.inside)

    def flush(self, schedule: str, microbatches: int) -> list[Event]:
        """Of this rank; `exchanges.stamps` are those of the flush."""
        self.runtime.schedule = build(schedule, self.mesh.pp.size, microbatches)
        self.optimizer.zero_grad()
        batches = [self.batch] * microbatches
        self.exchanges.take()
        all_reduce(torch.zeros(1), self.mesh.world)  # begin together
        events = self.runtime.step(batches, origin=0.0).events
        all_reduce(torch.zeros(1), self.mesh.world)
        self.exchanges.take()
        return events

    def turns(
        self, microbatches: int, rounds: int
    ) -> tuple[dict[str, list[list[Event]]], list[Stamps]]:
        """Flushes of each schedule, in turns, and the stamps of 1F1B's exchanges."""
        ran: dict[str, list[list[Event]]] = {name: [] for name in SCHEDULES}
        stamps: list[Stamps] = []
        for turn in range(-1, rounds):
            first = turn % len(SCHEDULES)
            for name in SCHEDULES[first:] + SCHEDULES[:first]:
                events = self.flush(name, microbatches)
                if turn < 0:
                    continue  # the first warms up
                ran[name].append(events)
                if name == "1f1b":
                    stamps += self.exchanges.stamps
        return ran, stamps

    def set_link(self, setting: Setting, waited: float) -> None:
        """A link whose exchanges take the setting's share of a flush of `waited` seconds without;
        share 0: none."""
        memory = self.mesh.exchange.memory
        if memory is None:
            return
        memory.host.latency, memory.host.rate = 0, 0.0
        if not setting.share:
            return
        self.flush("1f1b", setting.microbatches)
        sizes = [s.size for s in self.exchanges.stamps]
        flight = setting.share / (1 - setting.share) * waited / len(sizes)
        mean = torch.tensor([statistics.mean(sizes), flight], dtype=torch.float64)
        size, flight = (all_reduce(mean, self.mesh.world) / self.mesh.world.size).tolist()
        memory.set_link(LATENCY, size / max(flight - LATENCY, 1e-6))


# --- and whether it is right


def compared(one: list[float], other: list[float]) -> tuple[float, float]:
    """How much longer `other` took, flush by flush of the same turn, and within what this is known
    (two standard errors of the median, if flushes vary as a normal does)."""
    ratios = [b / a for a, b in zip(one, other, strict=True)]
    middle = statistics.median(ratios)
    spread = 1.4826 * statistics.median(abs(r - middle) for r in ratios)
    return middle - 1, 2 * 1.2533 * spread / len(ratios) ** 0.5


def judged(measured: dict[str, list[float]], predicted: dict[str, float]) -> dict:
    """Of each two schedules, which was longer and by how much; whether any was not foreseen."""
    rows = []
    for a, b in combinations(SCHEDULES, 2):
        longer, noise = compared(measured[a], measured[b])
        foreseen = predicted[b] / predicted[a] - 1
        tie = abs(longer) <= max(TIE, noise)
        rows.append(
            {
                "schedules": [a, b],
                "measured": round(longer, 4),
                "noise": round(noise, 4),
                "predicted": round(foreseen, 4),
                "tie": tie,
                "right": tie or longer * foreseen > 0,
            }
        )
    return {"pairs": rows, "right": all(row["right"] for row in rows)}


def measure(env: RankEnv, setting: Setting, args: argparse.Namespace) -> dict:
    """One setting; what every rank has seen is put together on the first."""
    side = Side(env, setting.pp, args)
    plain, _ = side.turns(setting.microbatches, args.rounds if not setting.share else args.plain)
    ran, stamps = plain, []
    if setting.share:
        waited = statistics.median(makespan([events]) for events in plain["1f1b"])
        side.set_link(setting, waited)
        ran, stamps = side.turns(setting.microbatches, args.rounds)
    every: list = [None] * env.world
    dist.gather_object((plain, ran, stamps), every if env.leader else None, 0)
    if not env.leader:
        return {}

    def both(which: int) -> dict[str, Flushes]:
        """Flushes of all ranks together."""
        return {
            name: [list(one) for one in zip(*(part[which][name] for part in every))]
            for name in SCHEDULES
        }

    flushes = {name: [makespan(one) for one in each] for name, each in both(1).items()}
    predicted = predict(setting, both(0), [s for part in every for s in part[2]])
    seconds = {
        name: {
            "measured": round(statistics.median(flushes[name]), 5),
            "predicted": round(predicted[name], 5),
        }
        for name in SCHEDULES
    }
    pieces = {
        kind: {stage: round(x, 5) for stage, x in passes_of(both(0)[name], Kind(kind)).items()}
        for name, kind in (("1f1b", "F"), ("1f1b", "B"), ("zb", "I"), ("zb", "W"))
    }
    return {
        "setting": setting.name,
        "seconds": seconds,
        **judged(flushes, predicted),
        "pieces": pieces,
    }


# --- memory of two stages


def most_held(side: Side, schedule: str, microbatches: int) -> int:
    """The most bytes that a flush holds beside weights and gradients."""
    batch = side.batch
    known = [batch.tokens, batch.labels, batch.positions]
    known += [p for chunk in side.chunks for p in chunk.parameters()]
    with Held([*known, *(b.grads for b in side.optimizer.buckets)]) as held:
        side.flush(schedule, microbatches)
    return held.most


def memory(env: RankEnv, args: argparse.Namespace) -> list[dict]:
    """Of each schedule and rank of two stages, 4 microbatches: said and measured bytes beside the
    state."""
    side, rows = Side(env, 2, args), []
    model = side.run.model
    for name in SCHEDULES[:2]:
        side.flush(name, 4)
        s = Strategy(
            assembly.layout_of(side.run), (args.layers,) * 2, (0, 0), 4, name, dtype="fp32"
        )
        said = stage_memory(model, s, env.rank, args.tokens, device="cpu")
        passing = said.activations + said.working + said.messages
        mine = torch.zeros(env.world, 2, dtype=torch.float64)
        mine[env.rank] = torch.tensor([passing, most_held(side, name, 4)], dtype=torch.float64)
        for rank, (planned, most) in enumerate(all_reduce(mine, side.mesh.world).tolist()):
            rows.append({"schedule": name, "rank": rank, "planned": planned, "measured": most})
    return rows


def two(args: argparse.Namespace) -> dict:
    """zb over 1F1B on two stages with 4 microbatches, measured and simulated; memory of both."""
    found = run_local(2, "cpu", measure, Setting(2, 4), args)
    seconds = found["seconds"]
    ratio = {way: seconds["1f1b"][way] / seconds["zb"][way] for way in ("measured", "predicted")}
    rows = run_local(2, "cpu", memory, args)
    print(
        f"PP2, m 4: 1F1B over zb {ratio['measured']:.3f} measured, "
        f"{ratio['predicted']:.3f} simulated"
    )
    for row in rows:
        print(
            f"  {row['schedule']:<5} rank {row['rank']}: {row['measured'] / 1e6:.2f} MB held, "
            f"{row['planned'] / 1e6:.2f} MB planned"
        )
    right = abs(ratio["measured"] - ratio["predicted"]) <= POINTS
    right = right and all(row["measured"] <= row["planned"] for row in rows)
    return {"ratio": ratio, "memory": rows, "right": right, **found}


def order(args: argparse.Namespace) -> list[dict]:
    rows = []
    for setting in SETTINGS:
        if args.only not in setting.name:
            continue
        began = time.perf_counter()
        row = run_local(2, "cpu", measure, setting, args)
        rows.append(row)
        print(f"{row['setting']} ({time.perf_counter() - began:.0f} s): ", end="")
        print("right" if row["right"] else "WRONG")
        for name, s in row["seconds"].items():
            off = s["predicted"] / s["measured"] - 1
            took = f"{1e3 * s['measured']:7.1f} ms, predicted {1e3 * s['predicted']:7.1f}"
            print(f"  {name:<8}{took} ({100 * off:+.1f} %)")
        for pair in row["pairs"]:
            a, b = pair["schedules"]
            print(
                f"  {b} over {a}: {100 * pair['measured']:+.1f} % (within "
                f"{100 * pair['noise']:.1f}), predicted {100 * pair['predicted']:+.1f} %"
                f"{', a tie' if pair['tie'] else '' if pair['right'] else ', NOT FORESEEN'}",
                flush=True,
            )
    return rows


def joined(path: Path, new: dict) -> dict:
    """With what an earlier part of this commit on this machine has left there."""
    here = where()
    old: dict = {}
    if path.exists():
        old = json.loads(path.read_text())
        if any(old.get(key) != here[key] for key in ("machine", "commit")):
            old = {}
    rows = {row["setting"]: row for row in [*old.get("order", []), *new.get("order", [])]}
    names = [setting.name for setting in SETTINGS]
    return {**old, **here, **new, "order": [rows[name] for name in names if name in rows]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("order", "two"))
    parser.add_argument("--only", default="", help="settings whose name has this, as in 'pp1 m4'")
    parser.add_argument("--rounds", type=int, default=9, help="turns that are judged")
    parser.add_argument("--plain", type=int, default=4, help="turns without the link")
    parser.add_argument("--tokens", type=int, default=1024, help="of a microbatch and rank")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2, help="of a rank")
    parser.add_argument("--json", type=Path, help="write what was measured, machine and commit")
    args = parser.parse_args()
    new: dict = {"order": order(args)} if args.what == "order" else {"two": two(args)}
    if args.json:
        found = joined(args.json, new)
        args.json.write_text(jsonio.dumps(found, indent=1) + "\n")
        new = found if args.what == "order" else new
    if args.what == "two":
        return int(not new["two"]["right"])
    right = sum(row["right"] for row in new["order"])
    decided = sum(not pair["tie"] for row in new["order"] for pair in row["pairs"])
    print(f"{right} of {len(new['order'])} settings right; {decided} pairs of schedules differ")
    return int(right < min(NEEDED, len(new["order"])))


if __name__ == "__main__":
    sys.exit(main())
