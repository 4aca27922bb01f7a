"""Ctrl-C and SIGTERM: a run finishes its step, saves, draws and leaves; a second one ends it.

Every rank adds to a message of each step whether it was asked to stop, so that all of them stop
behind the same step, whoever was told.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_REQUEST = 1.0  # seconds: a terminal and torchrun both pass on the same Ctrl-C


class Terminated(BaseException):
    """SIGTERM where nothing is to be finished; as KeyboardInterrupt is for SIGINT."""


def end_now(signum: int, frame=None) -> None:
    """A handler: let every `finally` run, and leave."""
    raise KeyboardInterrupt if signum == signal.SIGINT else Terminated


@contextmanager
def handled(handler: Callable, signals=SIGNALS) -> Iterator[None]:
    """Handle signals so within; a thread beside the main one may not, and leaves them alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, handler) for s in signals}
    try:
        yield
    finally:
        for s, old in before.items():
            signal.signal(s, signal.SIG_DFL if old is None else old)


class Stop:
    """Whether this process was asked to stop.

    `patience`: seconds after a first signal in which another is the same request; None: none ends
    this process, the one that started it does.
    """

    def __init__(self, patience: float | None = 0.0) -> None:
        self.patience, self.signal, self._since = patience, 0, 0.0

    def listening(self):
        return handled(self._heard)

    def _heard(self, signum: int, frame) -> None:
        if not self.signal:
            self.signal, self._since = signum, time.monotonic()
        elif self.patience is not None and time.monotonic() - self._since >= self.patience:
            os._exit(128 + signum)


class Forward:
    """For the process that started the ranks: a first signal goes to rank 0, a second ends all."""

    def __init__(self) -> None:
        self.signal = 0

    def to(self, pid: int):
        def heard(signum: int, frame) -> None:
            if self.signal:
                end_now(signum)
            self.signal = signum
            os.kill(pid, signal.SIGTERM)

        return handled(heard)
