"""The default training run of two checkouts, or of one under two settings, in turns.

A run is the whole program, as `make train` starts it: all ranks, real text. Of each step behind the
first ones it is noted how long it took and how many CPU seconds all processes together; a ratio is
one of neighbouring runs, so that what else the machine does falls on both.

    python bench/bench_job.py --old ../before                      # against another checkout
    python bench/bench_job.py --old . --old-args "--exchange collective"
    python bench/bench_job.py --where                              # where the CPU time goes (perf)
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]
SAME = 1e-4  # losses differ by at most
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Side:
    """A checkout and what its run is told."""

    name: str
    checkout: Path
    arguments: list[str]
    rates: list[float] = field(default_factory=list)  # tokens/s, the median step of each run
    cpu: list[float] = field(default_factory=list)  # seconds a step
    losses: list[float] = field(default_factory=list)

    def command(self, out: str, steps: int) -> list[str]:
        python = self.checkout / ".venv/bin/python"
        fixed = ["--steps", str(steps), "--out", out, "--save-every", "0"]
        return [str(python), "-m", "moekernels", "train", *fixed, *self.arguments]


def processes(root: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found


class Mark(NamedTuple):
    """What a job's processes, those that live now, have taken."""

    user: float = 0.0  # CPU seconds
    system: float = 0.0
    faults: float = 0.0  # pages
    switches: float = 0.0  # of a process that waits, or is made to

    @property
    def cpu(self) -> float:
        return self.user + self.system


def mark(root: int) -> Mark:
    totals = [0.0] * 4
    for pid in processes(root):
        folder = Path("/proc", str(pid))
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            status = (folder / "status").read_text().splitlines()
        except OSError:
            continue
        switches = [int(line.split()[1]) for line in status if "ctxt_switches" in line]
        own = int(stat[11]) / TICKS, int(stat[12]) / TICKS, int(stat[7]), sum(switches)
        totals = [a + b for a, b in zip(totals, own)]
    return Mark(*totals)


def run(side: Side, steps: int, warmup: int, extra: tuple[str, ...] = ()) -> tuple[float, Mark]:
    """One run; tokens/s, and what a step takes, behind its first `warmup` steps."""
    with tempfile.TemporaryDirectory() as out:
        command = [*extra, *side.command(out, steps)]
        with open(Path(out, "said"), "w+") as said:
            job = subprocess.Popen(command, cwd=side.checkout, stdout=said, stderr=said)
            marks: list[Mark] = []
            while job.poll() is None:
                done = len(lines(Path(out, "metrics.jsonl")))
                while len(marks) < done:
                    marks.append(mark(job.pid))
                time.sleep(0.01)
            said.seek(0)
            if job.returncode:
                raise SystemExit(f"{side.name}: {shlex.join(command)} failed:\n{said.read()}")
        found = lines(Path(out, "metrics.jsonl"))
        # The last line comes as the processes end: its mark would miss some.
        taken = zip(marks[warmup - 1], marks[steps - 2])
        step = Mark(*((b - a) / (steps - 1 - warmup) for a, b in taken))
        rate = statistics.median(line["tokens_per_s"] for line in found[warmup:])
        side.losses = [line["loss"] for line in found]
    side.rates.append(rate)
    side.cpu.append(step.cpu)
    return rate, step


def lines(path: Path) -> list[dict]:
    """The whole lines that a metrics file has by now."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def compare(old: Side, new: Side, rounds: int, steps: int, warmup: int) -> None:
    for number in range(rounds):
        for side in (old, new) if number % 2 == 0 else (new, old):
            rate, step = run(side, steps, warmup)
            print(
                f"{side.name:4} {rate:8.0f} tokens/s; a step: {step.cpu:6.2f} CPU s, "
                f"{step.system:5.2f} of them the system's, {step.faults:8.0f} page faults, "
                f"{step.switches:7.0f} switches",
                flush=True,
            )
    rates = [b / a for a, b in zip(old.rates, new.rates)]
    cpu = [a / b for a, b in zip(old.cpu, new.cpu)]
    apart = max(abs(a - b) for a, b in zip(old.losses, new.losses, strict=True))
    print(f"new over old: tokens/s {spread(rates)}, steps a CPU second {spread(cpu)}")
    print(f"losses differ by at most {apart:.1e} (must {SAME:.0e})")
    if apart > SAME:
        raise SystemExit(1)


# By what a shared object is to us; the first that fits.
PLACES = {
    "our kernels": ("_C.so",),
    "our exchange": ("_host",),
    "torch: products": ("mkl", "sgemm", "gemm", "dnnl", "libopenblas"),
    "torch: other operations, autograd": ("libtorch", "libc10", "_C.cpython"),
    "Python": ("python", "libpython"),
    "memory: malloc, copies": ("libc.so", "libstdc++"),
    "the system: waits, faults, switches": ("[kernel", "[unknown"),
}


def where(side: Side, steps: int) -> None:
    """What part of the job's CPU time is spent where, by samples."""
    if shutil.which("perf") is None:
        raise SystemExit("--where needs perf")
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "perf.data"))
        run(side, steps, 1, ("perf", "record", "-q", "-F", "199", "-o", data, "--"))
        report = subprocess.run(
            ["perf", "report", "-q", "-i", data, "--sort", "dso,symbol", "--percent-limit", "0",
             "--field-separator", "\t", "--stdio"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    parts: Counter[str] = Counter()
    symbols: Counter[str] = Counter()
    for line in filter(str.strip, report.splitlines()):
        share, dso, *symbol = line.strip().split("\t")
        part = float(share.strip().rstrip("%"))
        name = next((k for k, v in PLACES.items() if any(x in dso for x in v)), "other")
        parts[name] += part
        symbols[f"{dso}: {' '.join(symbol)[:90]}"] += part
    for name, part in parts.most_common():
        print(f"{part:5.1f} %  {name}")
    print()
    for name, part in symbols.most_common(40):
        print(f"{part:5.1f} %  {name}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, default=HERE, help="checkout, built")
    parser.add_argument("--new", type=Path, default=HERE)
    parser.add_argument("--old-args", default="", help="what its run is told besides")
    parser.add_argument("--new-args", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--where", action="store_true", help="of the new one, by perf")
    chosen = parser.parse_args(arguments)
    if not 1 <= chosen.warmup < chosen.steps - 1:
        parser.error("--steps must be at least --warmup + 2")
    old = Side("old", chosen.old.resolve(), shlex.split(chosen.old_args))
    new = Side("new", chosen.new.resolve(), shlex.split(chosen.new_args))
    if chosen.where:
        where(new, chosen.steps)
    else:
        compare(old, new, chosen.rounds, chosen.steps, chosen.warmup)


if __name__ == "__main__":
    main(sys.argv[1:])
