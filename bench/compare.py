"""Holds a run's ratios against those stored for the same kind of machine.

    make bench-compare                 # run the benches, then say what fell by more than 10 %
    make bench-compare ARGS=--store    # keep the ratios of this run for this kind of machine
    python bench/compare.py build/bench.json [--store] [--folder DIR] [--fall 0.1]

A ratio is how many times longer than ours another implementation took in the same run, by the best
round of each; times themselves are never compared. Exit code 0: nothing fell; 1: something did; 2:
nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moekernels import files, jsonio  # noqa: E402
from moekernels.errors import UsageError  # noqa: E402

OURS = ("ours", "moekernels")
FOLDER = ROOT / "bench" / "baselines" / "ratios"


def machine_of(report: dict) -> str:
    """The kind of machine: what ratios depend on. Never its name, nor how busy it was."""
    cpu = report["machine_info"]["cpu"]
    threads = {
        b["extra_info"]["threads"] for b in report["benchmarks"] if "threads" in b["extra_info"]
    }
    name = re.sub(r"\s+", " ", cpu.get("brand_raw") or report["machine_info"]["machine"])
    return f"{name}, {cpu['count']} cores, {max(threads, default=1)} threads"


def ratios_of(report: dict) -> dict[str, float]:
    """From pytest-benchmark's JSON: `group: implementation` -> its time over ours; and what a bench
    itself calls its ratio."""
    best: dict[str, dict[str, float]] = {}
    ratios = {}
    for bench in report["benchmarks"]:
        facts = bench["extra_info"]
        if "implementation" in facts:
            best.setdefault(bench["group"], {})[facts["implementation"]] = bench["stats"]["min"]
        if "ratio" in facts:
            ratios[bench["name"]] = facts["ratio"]
    for group, times in best.items():
        ours = next((times[name] for name in OURS if name in times), None)
        if ours is not None:
            ratios |= {f"{group}: {n}": t / ours for n, t in times.items() if n not in OURS}
    return ratios


def stored_at(folder: Path, machine: str) -> Path:
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.json"


def compared(now: dict[str, float], before: dict[str, float], fall: float) -> list[str]:
    """What fell by more than `fall`, the worst first."""
    fallen = {n: now[n] / r for n, r in before.items() if n in now and now[n] < (1 - fall) * r}
    return [
        f"{name}: {before[name]:.2f}x -> {now[name]:.2f}x, {100 * (1 - kept):.0f} % less"
        for name, kept in sorted(fallen.items(), key=lambda item: item[1])
    ]


def hold(report: dict, folder: Path, fall: float, store: bool) -> int:
    """Compare (or store) and say what came out; the exit code."""
    machine, now = machine_of(report), ratios_of(report)
    if not now:
        raise UsageError("the report holds no ratio; give one that --benchmark-json wrote")
    path = stored_at(folder, machine)
    if store:
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {"machine": machine, "when": report["datetime"][:10], "ratios": now}
        files.write(path, jsonio.dumps(told, indent=1, sort_keys=True) + "\n")
        print(f"{len(now)} ratios of {machine} stored in {path}")
        return 0
    if not path.exists():
        raise UsageError(
            f"no ratios are stored for {machine} in {folder}; where nothing else runs, "
            "`make bench-compare ARGS=--store` keeps those of a run"
        )
    old = json.loads(path.read_text(encoding="utf-8"))
    before = old["ratios"]
    fallen = compared(now, before, fall)
    held = len(now.keys() & before.keys())
    print(f"{held} ratios of {machine} against those of {old['when']}")
    for name in sorted(before.keys() - now.keys()):
        print(f"not in this run: {name}")
    for name in sorted(now.keys() - before.keys()):
        print(f"not stored: {name} {now[name]:.2f}x")
    for line in fallen:
        print(f"FELL  {line}")
    print(f"{len(fallen)} fell by more than {100 * fall:.0f} %" if fallen else "nothing fell")
    return 1 if fallen else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, help="what pytest-benchmark wrote as JSON")
    parser.add_argument("--store", action="store_true", help="keep these ratios")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where ratios are kept")
    parser.add_argument("--fall", type=float, default=0.1, help="the part that may be lost")
    args = parser.parse_args(argv)
    try:
        report = json.loads(args.report.read_text(encoding="utf-8"))
        return hold(report, args.folder, args.fall, args.store)
    except (UsageError, OSError, ValueError, KeyError) as error:
        print(f"compare: {args.report}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
