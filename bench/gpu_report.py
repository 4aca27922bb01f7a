"""Gathers what gpu_suite.sh left in a folder into one JSON (device, driver, commit, every figure)
and prints a table.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from moekernels import jsonio


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
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


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


def main() -> int:
    folder = Path(sys.argv[1])
    report = {
        "device": device(),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "torch": output_of(sys.executable, "-c", "import torch; print(torch.__version__)"),
        "sections": sections(folder),
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
    if t := report["tests"]:
        print(f"  {t['tests']} tests: {t['failures'] + t['errors']} failed, {t['skipped']} skipped")
    ours = [r for r in report["bench"].get("rows", []) if r["implementation"].startswith("ours")]
    for op in dict.fromkeys(r["op"] for r in ours):
        shares = [r["share_of_copy"] * 100 for r in ours if r["op"] == op]
        print(f"  {op:28}{min(shares):5.0f} to {max(shares):3.0f} % of the copy bandwidth")
    if rows := report["experts"].get("rows"):
        print("  TFLOP/s:")
        print("\n".join(experts_table(rows)))
    print(f"  {target}")
    if any(facts["rc"] == 77 for facts in report["sections"].values()):
        print("  No GPU was here: this run proves nothing about one.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
