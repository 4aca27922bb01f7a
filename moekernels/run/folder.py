"""What every reader of a run's folder knows of it: the metrics file, and how its lines are read."""

from __future__ import annotations

import json
from pathlib import Path

from moekernels import files, jsonio

METRICS = "metrics.jsonl"
LARGEST = 1 << 40  # bytes of it


def read_metrics(path: Path) -> list[dict]:
    """The whole lines of a run's `metrics.jsonl`, numbers that were not finite as NaN; a line
    that a kill cut short, or that something else has damaged, is left out with all behind it."""
    lines: list[dict] = []
    try:
        data = files.read_bytes(path / METRICS, LARGEST)
    except FileNotFoundError:
        return lines
    for text in data.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(jsonio.restore(line))
    return lines
