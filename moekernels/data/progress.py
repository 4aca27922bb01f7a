"""What is seen while a corpus is built: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import rich.progress

T = TypeVar("T")
SECONDS = 5.0  # between plain lines


class Progress:
    """Stages of a long job, one after the other. `log`: says a line; None: nothing is shown."""

    def __init__(self, log: Callable[[str], None] | None) -> None:
        self._log = log
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._name, self._done = "", 0
        self._total: int | None = None
        self._began = self._said = time.monotonic()
        if log is not None and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, transient=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin a stage of so many units; None: nobody knows how many."""
        self._name, self._total, self._done = name, total, 0
        self._began = self._said = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=total)

    def advance(self, units: int = 0) -> None:
        self._done += units
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._log is not None and time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            part = f" {100 * self._done / self._total:.0f} %," if self._total else ""
            self._log(f"{self._name}:{part} {self._said - self._began:.0f} s")

    def wait_for(self, work: Callable[[], T]) -> T:
        """`work()`, in a thread: native code that holds no lock of Python's would keep Ctrl-C
        waiting until it is done."""
        results: list[T] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:  # noqa: BLE001, raised again below
                failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            self.advance()
        if failures:
            raise failures[0]
        return results[0]
