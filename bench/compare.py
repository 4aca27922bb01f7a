"""Holds a run's ratios against those stored for the same kind of machine.

    make bench-compare                       # run the benches, say what fell by more than 10 %
    make bench-compare RUNS=3 ARGS=--store   # keep three runs' ratios for this kind of machine
    python bench/compare.py RUN.json... [--store] [--folder DIR] [--fall 0.1]

A ratio is how many times longer than ours another implementation took in the same run, by the best
round of each, and of several runs the median; times themselves are never compared. What the stored
runs themselves do not agree on to within that fall is said, and not judged. Exit code 0: nothing
fell; 1: something did; 2: nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
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


def together(reports: list[dict]) -> tuple[str, dict[str, float], dict[str, float]]:
    """(machine, median ratios, the spread of each, largest less smallest, over its median) of runs
    on one kind of machine; what some of them lack is left out."""
    machines = sorted({machine_of(report) for report in reports})
    if len(machines) > 1:
        raise UsageError(f"the reports are of {' and '.join(machines)}; give those of one machine")
    runs = [ratios_of(report) for report in reports]
    names = [name for name in runs[0] if all(name in run for run in runs)]
    if not names:
        raise UsageError("the report holds no ratio; give one that --benchmark-json wrote")
    each = {name: [run[name] for run in runs] for name in names}
    medians = {name: statistics.median(values) for name, values in each.items()}
    spread = {n: (max(values) - min(values)) / medians[n] for n, values in each.items()}
    return machines[0], medians, spread


def hold(reports: list[dict], folder: Path, fall: float, store: bool) -> int:
    """Compare (or store) and say what came out; the exit code."""
    machine, now, spread = together(reports)
    when = reports[0]["datetime"][:10]
    path = stored_at(folder, machine)
    if store:
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {"machine": machine, "when": when, "ratios": now, "runs": len(reports)}
        told["spread"] = spread
        files.write(path, jsonio.dumps(told, indent=1, sort_keys=True) + "\n")
        print(f"{len(now)} ratios of {machine} stored in {path}, of {len(reports)} runs")
        uneven = sum(part > fall for part in spread.values())
        if uneven:
            print(f"{uneven} of them differ by more than {100 * fall:.0f} %: too uneven to judge")
        return 0
    if not path.exists():
        raise UsageError(
            f"no ratios are stored for {machine} in {folder}; where nothing else runs, "
            "`make bench-compare RUNS=3 ARGS=--store` keeps those of three runs"
        )
    old = json.loads(path.read_text(encoding="utf-8"))
    uneven = {name for name, part in old.get("spread", {}).items() if part > fall}
    before = {name: ratio for name, ratio in old["ratios"].items() if name not in uneven}
    fallen = compared(now, before, fall)
    held = len(now.keys() & before.keys())
    print(f"{held} ratios of {machine} against those of {old['when']}")
    for name in sorted(before.keys() - now.keys()):
        print(f"not in this run: {name}")
    for name in sorted(now.keys() & uneven):
        stored = f"{old['ratios'][name]:.2f}x"
        print(f"uneven, not judged: {name} {stored} -> {now[name]:.2f}x")
    for name in sorted(now.keys() - before.keys() - uneven):
        print(f"not stored: {name} {now[name]:.2f}x")
    for line in fallen:
        print(f"FELL  {line}")
    print(f"{len(fallen)} fell by more than {100 * fall:.0f} %" if fallen else "nothing fell")
    return 1 if fallen else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = "what pytest-benchmark wrote as JSON, of one run or of several"
    parser.add_argument("reports", type=Path, nargs="+", metavar="RUN.json", help=what)
    parser.add_argument("--store", action="store_true", help="keep these ratios")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where ratios are kept")
    parser.add_argument("--fall", type=float, default=0.1, help="the part that may be lost")
    args = parser.parse_args(argv)
    path = args.reports[0]
    try:
        reports = []
        for path in args.reports:
            reports.append(json.loads(path.read_text(encoding="utf-8")))
        return hold(reports, args.folder, args.fall, args.store)
    except (UsageError, OSError, ValueError, KeyError) as error:
        print(f"compare: {path}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
