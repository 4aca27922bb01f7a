"""JSON as the standard has it: it knows neither NaN nor Infinity, and many readers take neither."""

from __future__ import annotations

import json
import math
from typing import Any

NAMES = "nonfinite"  # the key that lists an object's keys whose numbers were not finite


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps`, but numbers that are not finite become null, and the object that holds them
    says so: {"loss": nan} -> {"loss": null, "nonfinite": ["loss"]}."""
    return json.dumps(_plain(value), allow_nan=False, **options)


def restore(line: dict[str, Any]) -> dict[str, Any]:
    """The object that `dumps` wrote, its numbers that were not finite as NaN; changed in place."""
    for key in line.pop(NAMES, []):
        line[key] = math.nan if line.get(key) is None else line[key]
    return line


def _plain(value: Any) -> Any:
    """`value` without numbers that are not finite; itself where it has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        plain = {key: _plain(item) for key, item in value.items()}
        bad = [key for key, item in value.items() if _nonfinite(item)]
        return {**plain, NAMES: bad} if bad else plain
    return value


def _nonfinite(value: Any) -> bool:
    """Whether it is such a number or a list with one (an object speaks for itself)."""
    if isinstance(value, (list, tuple)):
        return any(map(_nonfinite, value))
    return isinstance(value, float) and not math.isfinite(value)
