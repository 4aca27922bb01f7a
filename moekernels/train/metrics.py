"""A run's folder: its lock, effective configuration and `metrics.jsonl`; what the user sees
meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import IO

from moekernels import files, jsonio
from moekernels.console import duration
from moekernels.errors import UsageError
from moekernels.run import files as cfg
from moekernels.run.folder import METRICS, read_metrics

TOKENIZER = "tokenizer.json"  # so that a run goes on under another release of tokenizers
LOCK_SECONDS = 1.0


class RunFolder:
    """`<out>`, held by one live run at a time. `open` checks it before it is touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._made: list[Path] = []  # folders that `open` made

    @staticmethod
    def choose(out: Path | None, name: str, resume: bool) -> Path:
        """--out, or runs/<name>; a fresh run without a place of its own takes runs/<name>-2, -3,
        ... when that is used."""
        if out is not None:
            try:
                out.exists()
            except OSError as error:
                raise UsageError(f"{out}: cannot be a run's folder: {error.strerror}") from None
            return out
        path, number = Path("runs") / name, 1
        while not resume and _used(path):
            number += 1
            path = Path("runs") / f"{name}-{number}"
        return path

    def open(self, resume: bool) -> None:
        """Take the folder, or UsageError: no folder, a live run has it, or it is used (not)."""
        try:
            missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
            self._made = self._made or missing  # it may have been opened for its checkpoints
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = files.lock_file(self.path / ".lock")  # held for the life of the run
            _lock(self._lock)
        except BlockingIOError:
            raise UsageError(
                f"{self.path}: another run is writing here; wait for it or give another --out"
            ) from None
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot be a run's folder: {error.strerror}; give another --out"
            ) from None
        for name, fits in ((METRICS, Path.is_file), ("checkpoints", Path.is_dir)):
            place = self.path / name  # what is not read back must not be found out at the end
            if place.exists() and not fits(place):
                kind = "folder" if fits is Path.is_dir else "file"
                raise UsageError(f"{place}: is there and is no {kind}; give another --out")
        if _used(self.path) and not resume:
            raise UsageError(
                f"{self.path}: already holds a run; give --resume to go on with it, or another "
                f"--out"
            )

    def abandon(self) -> None:
        """Leave nothing behind of a run that never began: what `open` made and is empty goes."""
        if self._made:
            (self.path / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def begin(self, config: cfg.RunConfig, step: int) -> None:
        """Write the configuration and cut `metrics.jsonl` behind the step where the run goes on."""
        self.configure(config)
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
        files.write(self.path / METRICS, "".join(jsonio.dumps(line) + "\n" for line in kept))
        self._metrics = open(self.path / METRICS, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def configure(self, config: cfg.RunConfig) -> None:
        """Write the effective configuration, which a run may learn only on its way."""
        files.write(self.path / "config.toml", cfg.to_toml(config))

    def write(self, line: dict) -> None:
        """One step's line, whole or not at all for a reader."""
        assert self._metrics is not None, "begin() comes first"
        try:
            self._metrics.write(jsonio.dumps(line) + "\n")
        except OSError as error:
            error.filename = str(self.path / METRICS)
            raise

    def sync(self) -> None:
        """Have every line on the disk, as before a checkpoint that lets a run go on behind them."""
        assert self._metrics is not None, "begin() comes first"
        os.fsync(self._metrics.fileno())


def check_name(name: str) -> None:
    """UsageError where it cannot be the name of a folder under runs/."""
    if not name or name != Path(name).name or name[0] == "." or len(os.fsencode(name)) > 200:
        raise UsageError(
            f"--name {name!r}: a run's folder under runs/ needs a name of at most 200 bytes, "
            f"without / and not beginning with a dot; --out takes any path"
        )


def _lock(file) -> None:
    """Take the lock, or BlockingIOError. Ranks share their parent's lock, and one that was killed
    a moment ago may take a moment to go: a short wait is not another run."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _used(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.toml", METRICS, "checkpoints"))


class Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, first: int, steps: int, quiet: bool = False) -> None:
        self.steps, self.first = steps, first
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if sys.stdout.isatty() and not quiet:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                expand=True,
            )
            self.bar.start()
            self.task = self.bar.add_task("train", total=steps, completed=first, text="")

    def show(self, line: dict) -> None:
        text = (
            f"loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tokens/s  "
            f"load {line['load_max_over_mean']:.2f}x"
        )
        if "eval_loss" in line:
            text += f"  held out {line['eval_loss']:.4f}"
        step = line["step"]
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
            return
        now = time.monotonic()
        if step in (self.first + 1, self.steps) or now - self.last_line >= 5 or "eval_loss" in line:
            left = (now - self.started) / max(1, step - self.first) * (self.steps - step)
            print(f"step {step}/{self.steps}  {text}  {duration(left)} left", flush=True)
            self.last_line = now

    def say(self, text: str) -> None:
        (self.bar.console.print if self.bar is not None else print)(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
