"""What every reader of a run's folder knows of it: the metrics file, and how its lines are read."""

from __future__ import annotations

import json
from pathlib import Path

from moekernels import jsonio

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict]:
    """The whole lines of a run's `metrics.jsonl`, numbers that were not finite as NaN; a line
    that a kill cut short is left out."""
    lines: list[dict] = []
    try:
        text = (path / METRICS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return lines
    for line in text.splitlines():
        try:
            lines.append(jsonio.restore(json.loads(line)))
        except ValueError:
            break
    return lines
