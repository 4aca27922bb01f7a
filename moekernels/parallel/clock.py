"""Times of what a process does now and then, on whichever clock the device has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SpanClock:
    """Adds up spans, and what was counted in them, while it is `running`: the host's time on the
    CPU, the stream's on a GPU."""

    def __init__(self) -> None:
        self.running = False
        self.now = time.perf_counter  # of the host
        self._seconds, self._count = 0.0, 0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def span(self, device: torch.device, count: int = 0) -> Iterator[None]:
        if not self.running:
            yield
            return
        self._count += count
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._spans.append((begin, end))
        else:
            before = self.now()
            yield
            self._seconds += self.now() - before

    def take(self) -> tuple[float, int]:
        """(seconds, count) since the last call; waits for the device where it has spans to read."""
        if self._spans:
            self._spans[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
            self._spans.clear()
        taken = self._seconds, self._count
        self._seconds, self._count = 0.0, 0
        return taken
