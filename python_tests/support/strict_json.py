"""JSON as the standard has it."""

from __future__ import annotations

import json


def strict(text):
    """Parsed as the standard has it."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)
