"""A link that can be set: how long a message takes that memory alone would bring at once."""

from __future__ import annotations

import re
from typing import NamedTuple

from moekernels.errors import UsageError

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
BYTES = {"B/s": 1.0, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9}
NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
FORM = re.compile(rf"{NUMBER}({'|'.join(SECONDS)}),{NUMBER}({'|'.join(BYTES)})")
LONGEST = 10.0  # seconds


class Link(NamedTuple):
    """`latency` in seconds and `rate` in bytes a second: bytes that were all posted at a moment
    are there `latency + bytes / rate` later."""

    latency: float
    rate: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.rate


def parse(text: str) -> Link | None:
    """`20us,1GB/s`; None for empty text."""
    if not text:
        return None
    found = FORM.fullmatch(text.replace(" ", ""))
    if not found:
        raise UsageError(
            f"--link must be a latency and a rate, as in 20us,1GB/s (s, ms, us, ns; B/s, kB/s, "
            f"MB/s, GB/s), got {text!r}"
        )
    latency, rate = float(found[1]) * SECONDS[found[2]], float(found[3]) * BYTES[found[4]]
    if not rate:
        raise UsageError(f"--link {text}: a link of zero bytes a second carries nothing")
    if latency > LONGEST:
        raise UsageError(f"--link {text}: use a latency of at most {LONGEST:g} s")
    return Link(latency, rate)
