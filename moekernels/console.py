"""Output of a program whose reader may be gone, or that was started with none."""

from __future__ import annotations

import io
import os
import sys


class _Output(io.TextIOWrapper):
    """Text that shows what its encoding lacks as an escape, and goes nowhere when nobody reads on:
    a run that is being watched through `head` goes on."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            return self._nobody(len(text))

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._nobody(0)

    def _nobody(self, length: int) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return length


def prepare() -> None:
    """Standard input, output and errors exist from here on, and writing to them never fails."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed one would become some file
        pass
    os.close(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        encoding = "utf-8" if old is None else old.encoding
        buffered = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
        terminal = os.isatty(number)
        if old is not None:
            old.flush()
        new = _Output(
            buffered,
            encoding=encoding,
            errors="backslashreplace",
            line_buffering=terminal or name == "stderr",
        )
        setattr(sys, name, new)
