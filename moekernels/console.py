"""Output of a program whose reader may be gone, or that was started with none; and what it says in
numbers and columns."""

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


def count(n: float) -> str:
    """31300000 -> `31.3 M`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f}"


def duration(seconds: float) -> str:
    """190 -> `3:10`."""
    seconds = round(seconds)
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d}"
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns of text."""
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"  {name:<{width}}{value}" for name, value in rows)
