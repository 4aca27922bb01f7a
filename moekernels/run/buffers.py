"""How much memory the exchange's rows get: what they need, or a bound that is known beforehand."""

from __future__ import annotations

import re

from moekernels.errors import UsageError

EXACT = "exact"
FORM = re.compile(r"bounded:(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})")


def parse(text: str) -> float | None:
    """`exact` is None, `bounded:1.25` the rows that a rank takes in at most, over the mean."""
    if text == EXACT:
        return None
    found = FORM.fullmatch(text.replace(" ", ""))
    if not found:
        raise UsageError(
            f"--exchange-buffers must be exact or a bound over the mean rows of a rank, as in "
            f"bounded:1.25, got {text!r}"
        )
    bound = float(found[1])
    if bound < 1:
        raise UsageError(
            f"--exchange-buffers {text}: below 1 not even rows that are spread evenly fit; give 1 "
            f"or more, or exact"
        )
    return bound
