"""Gathers what gpu_suite.sh left in a folder into one JSON (device, driver, commit, every figure)
and prints tables: what failed, and every figure beside its prediction (bench/predicted.json).

python bench/gpu_report.py FOLDER
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from moekernels import jsonio

PREDICTED = json.loads((Path(__file__).parent / "predicted.json").read_text())
STREAMS = ("ladder", "calibrate", "trace", "tune")


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def device() -> dict:
    query = "--query-gpu=name,driver_version,memory.total"
    facts = output_of("nvidia-smi", query, "--format=csv,noheader")
    name, driver, memory = facts.splitlines()[0].split(", ") if facts else ("no GPU", "none", "")
    return {"name": name, "driver": driver, "memory": memory}


def sections(folder: Path) -> dict:
    text = (folder / "sections.txt").read_text() if (folder / "sections.txt").exists() else ""
    found = re.findall(r"^(\w+) rc=(\d+) seconds=(\d+)$", text, re.MULTILINE)
    return {name: {"rc": int(rc), "seconds": int(seconds)} for name, rc, seconds in found}


def tests(folder: Path) -> dict:
    if not (folder / "tests.xml").exists():
        return {}
    suite = ElementTree.parse(folder / "tests.xml").getroot().find("testsuite")
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    return {**counts, "failed": failed}


def figures(folder: Path, name: str) -> dict:
    """What a bench wrote at its end; of one that was cut off, the rows until then."""
    path = folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    rows = [line for line in lines_of(folder, name) if "op" in line]
    return {"rows": rows, "cut_off": True} if rows else {}


def lines_of(folder: Path, name: str) -> list[dict]:
    """The whole lines of a stream; what was cut off in the middle of one is left out."""
    path, found = folder / f"{name}.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            found.append({"cut_off": text[:60]})
    return found


def clocks(folder: Path) -> dict:
    """Of the nvidia-smi log, while the card drew more than half of its most: MHz, W, degrees."""
    path = folder / "clocks.csv"
    numbers = []
    for row in csv.reader(path.read_text().splitlines()) if path.exists() else ():
        try:
            numbers.append((*map(float, row[1:4]), row[4].strip()))
        except (ValueError, IndexError):
            continue
    busy = [n for n in numbers if n[1] > max(x[1] for x in numbers) / 2]
    if not busy:
        return {}
    return {
        "samples": len(busy),
        "mhz": [min(n[0] for n in busy), statistics.median(n[0] for n in busy)],
        "watts": [statistics.median(n[1] for n in busy), max(n[1] for n in busy)],
        "celsius": max(n[2] for n in busy),
        "reasons": sorted({n[3] for n in busy}),
    }


def verdict(rc: int) -> str:
    return {0: "ok", 77: "NOT RUN, no GPU", 124: "TIMED OUT"}.get(rc, f"FAILED ({rc})")


def experts_table(rows: list[dict]) -> list[str]:
    """Ours beside each peer: TFLOP/s of each op at each shape that ours ran."""
    by_case: dict[tuple, dict[str, str]] = {}
    for row in rows:
        case = (row["op"], row["T"], row["H"], row["F"], row["E"], row["K"], row["routing"])
        rate = "skipped" if "skipped" in row else f"{row['tflops']:.0f}"
        by_case.setdefault(case, {})[row["implementation"]] = rate
    lines = []
    for (op, t, h, f, e, k, routing), rates in by_case.items():
        shape = f"T{t} H{h} F{f} E{e} K{k} {routing}"
        others = ", ".join(f"{name} {rate}" for name, rate in rates.items())
        lines.append(f"  {op:24} {shape:38} {others}")
    return lines


# ---- predicted beside measured
def expected(value: float | list, card: str) -> float:
    """A prediction, of two the one for this card: [H100, H200]."""
    return value if isinstance(value, int | float) else value["H200" in card]


def compared(what: str, predicted: float, measured: float) -> str:
    return f"  {what:50}{predicted:9.0f}{measured:9.0f}{measured / predicted:8.2f}"


def layer_passes(rows: list[dict]) -> dict[str, dict[str, float]]:
    """TFLOP/s of our layer's passes by shape. The backward is what both take without the forward,
    and has twice its operations."""
    of: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["implementation"] == "ours" and row["routing"] == "balanced" and "us" in row:
            shape = "T{T} H{H} F{F} E{E} K{K}".format(**row)
            of.setdefault(shape, {})[row["op"]] = row
    found = {}
    for shape, ops in of.items():
        if (first := ops.get("layer forward")) is None:
            continue
        found[shape] = {"forward": first["tflops"]}
        if both := ops.get("layer forward, backward"):
            seconds = both["us"] - first["us"]
            found[shape]["backward"] = 2 * first["tflops"] * first["us"] / seconds
    return found


def against_prediction(report: dict) -> list[str]:
    """A line for each figure that was predicted: predicted, measured, their ratio."""
    card, lines = report["device"]["name"], []
    for figure in report["calibrate"]:
        for key, value in PREDICTED["calibrate"].get(figure.get("name"), {}).items():
            what = f"{figure['name']}, {key.replace('_', ' ')}"
            lines.append(compared(what, expected(value, card), figure[key]))
    for line in report["trace"]:
        for key, value in line.get("predicted", {}).items():
            lines.append(compared(f"{line['op']} {line['layer']} {key}", value, line[key]))
    for line in report["tune"]:
        if "best" not in line:
            continue
        shape = "T{T} H{H} F{F} E{E} K{K}".format(**line)
        op = " ".join(filter(None, (line["op"], line["of"])))
        if value := PREDICTED["products"].get(shape, {}).get(op):
            rate = 2e-9 * line["m"] * line["n"] * line["k"] / line["default_ms"]
            what = f"{op} {shape}"
            lines.append(compared(f"{what} TFLOP/s", expected(value, card), rate))
            lines.append(compared(f"{what} tuned", expected(value, card), line["best"]["tflops"]))
    for shape, passes in layer_passes(report["experts"].get("rows", [])).items():
        for name, value in PREDICTED["layers"].get(shape, {}).items():
            if name in passes:
                what = f"layer {name} {shape} TFLOP/s"
                lines.append(compared(what, expected(value, card), passes[name]))
    return lines


def ladder_table(lines: list[dict]) -> list[str]:
    broken = [line for line in lines if line.get("status") not in (None, "pass", "skipped")]
    text = [f"  ladder: {sum(x.get('status') == 'pass' for x in lines)} of {len(lines)} rungs hold"]
    for line in broken:
        text.append(f"  {line['rung']} ({line['way']}) {line['status']}: {line.get('error', '')}")
        text += [
            f"      {key}: {line[key]}" for key in ("look", "legend", "watchdog") if key in line
        ]
    return text


def main() -> int:
    folder = Path(sys.argv[1])
    report = {
        "device": device(),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "torch": output_of(sys.executable, "-c", "import torch; print(torch.__version__)"),
        "sections": sections(folder),
        "clocks": clocks(folder),
        **{name: lines_of(folder, name) for name in STREAMS},
        "tests": tests(folder),
        "bench": figures(folder, "bench"),
        "experts": figures(folder, "experts"),
        "train": figures(folder, "train"),
    }
    target = folder / "gpu_suite.json"
    target.write_text(jsonio.dumps(report, indent=1))
    card = report["device"]
    print(f"\n{card['name']}, driver {card['driver']}, torch {report['torch']}")
    for name, facts in report["sections"].items():
        print(f"  {name:10}{verdict(facts['rc']):17}{facts['seconds']:5} s")
    if c := report["clocks"]:
        print(
            f"  busy: {c['mhz'][1]:.0f} MHz (least {c['mhz'][0]:.0f}), {c['watts'][0]:.0f} W "
            f"(most {c['watts'][1]:.0f}), {c['celsius']:.0f} C"
        )
    if report["ladder"]:
        print("\n".join(ladder_table(report["ladder"])))
    if t := report["tests"]:
        print(f"  {t['tests']} tests: {t['failures'] + t['errors']} failed, {t['skipped']} skipped")
        print("\n".join(f"      {name}" for name in t["failed"][:20]))
    ours = [r for r in report["bench"].get("rows", []) if r["implementation"].startswith("ours")]
    for op in dict.fromkeys(r["op"] for r in ours):
        shares = [r["share_of_copy"] * 100 for r in ours if r["op"] == op]
        print(f"  {op:28}{min(shares):5.0f} to {max(shares):3.0f} % of the copy bandwidth")
    if rows := report["experts"].get("rows"):
        print("  TFLOP/s:")
        print("\n".join(experts_table(rows)))
    if table := against_prediction(report):
        print(f"  {'':50}{'predicted':>9}{'measured':>9}{'ratio':>8}")
        print("\n".join(table))
    print(f"  {target}")
    if any(facts["rc"] == 77 for facts in report["sections"].values()):
        print("  No GPU was here: this run proves nothing about one.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
