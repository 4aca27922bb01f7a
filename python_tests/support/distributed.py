"""Run a function on several local ranks of torch.distributed from inside one test.

Ranks are forked, not spawned: the parent has imported torch already, so eight of them start in
about half a second instead of ten, and a test may pass closures. A rank that raises, dies or hangs
fails the test with that rank's own traceback within the timeout; nothing is left running.

    def work(rank, scale):                       # torch.distributed is initialised here
        x = torch.full((4,), float(rank)) * scale
        dist.all_reduce(x)
        return x

    results = run_ranks(4, work, 2.0)            # [result of rank 0, ..., result of rank 3]

    with RankPool(4) as pool:                    # the same ranks for several calls
        pool.run(work, 2.0)
        pool.run(work, 3.0)
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from moekernels.parallel.host import share_cores

GRACE_SECONDS = 0.3  # after a first failure: how long others may report an earlier one
PR_SET_PDEATHSIG = 1


class RankError(AssertionError):
    """A rank raised, died or hung; `rank` says which."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


class RankPool:
    """`world` forked processes, each a rank of one gloo process group."""

    def __init__(self, world: int, *, timeout: float = 60.0, _task: tuple | None = None):
        self.world = world
        self.timeout = timeout
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        context = multiprocessing.get_context("fork")
        self._processes, self._connections = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, world, self._directory.name, there, timeout, _task),
                name=f"rank{rank}",
                daemon=True,
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `fn(rank, *args)`, `fn` a module's own, on every rank; the results in rank order."""
        message = pickle.dumps((fn, args))
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(message)
            except OSError:
                error = RankError(
                    rank, f"{self._obituary(rank)}: a pool cannot be used after a failure"
                )
                self.close()
                raise error from None
        return self._collect()

    def _collect(self) -> list[Any]:
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        results: list[Any] = [None] * self.world
        failures: list[tuple[bool, float, int, str]] = []  # (raised rather than died, when, ...)
        deadline = time.monotonic() + self.timeout
        while pending and time.monotonic() < deadline:
            for connection in wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
                rank = pending.pop(connection)
                raised = True
                try:
                    ok, when, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    ok, when, value = False, time.monotonic(), self._obituary(rank)
                    raised = False
                if ok:
                    results[rank] = value
                else:
                    if not failures:  # do not wait for others that may wait for this rank
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                    failures.append((raised, when, rank, value))
        if failures:
            self.close(kill=True)
            _, _, rank, text = min(failures)  # a death is the cause of lost connections elsewhere
            raise RankError(rank, f"rank {rank} of {self.world} failed:\n{text}")
        if pending:
            stacks = "\n".join(self._stack(rank) for rank in sorted(pending.values()))
            first = min(pending.values())
            self.close(kill=True)
            raise RankError(
                first,
                f"no answer after {self.timeout:g} s "
                f"from ranks {sorted(pending.values())}:\n{stacks}",
            )
        return results

    def _obituary(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(5)
        code = process.exitcode
        if code is not None and code < 0:
            return f"rank {rank} was killed by {signal.Signals(-code).name}"
        return f"rank {rank} exited with code {code} before it answered"

    def _stack(self, rank: int) -> str:
        """Where a rank hangs, by its own faulthandler."""
        path = Path(self._directory.name, f"stack{rank}")
        if self._processes[rank].is_alive():
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            until = time.monotonic() + 30.0
            while time.monotonic() < until and not (path.exists() and path.stat().st_size):
                time.sleep(0.02)
            time.sleep(0.05)
        return f"rank {rank}:\n{path.read_text() if path.exists() else '(no stack)'}"

    def close(self, *, kill: bool = False) -> None:
        """End the ranks: asked to leave, or killed."""
        for connection in self._connections:
            if not kill:
                with contextlib.suppress(OSError):  # a rank that ran its one task has left already
                    connection.send_bytes(b"")
            connection.close()
        for process in self._processes:
            if not kill:
                process.join(5)
            if process.is_alive():
                process.kill()
            process.join()
        self._connections, self._processes = [], []
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._processes:
            self.close(kill=kind is not None)


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """`fn(rank, *args)` on `world` forked ranks with a gloo process group; results in rank order.

    Results travel by pickle (tensors by value). Raises `RankError` with the traceback of the rank
    that failed first.
    """
    with RankPool(world, timeout=timeout, _task=(fn, args)) as pool:
        return pool._collect()


def _serve(
    rank: int,
    world: int,
    directory: str,
    connection: Connection,
    timeout: float,
    task: tuple | None,
) -> None:
    ctypes.CDLL(None).prctl(
        PR_SET_PDEATHSIG, signal.SIGKILL
    )  # the ranks of a killed test do not linger
    with open(Path(directory, f"stack{rank}"), "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        share_cores()
        torch.set_num_threads(1)  # a forked child has none of its parent's OpenMP threads
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(Path(directory, "store")), world),
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=timeout),
            )
        except BaseException:  # noqa: BLE001
            _answer(connection, False, traceback.format_exc())
            return
        if task is not None:
            _perform(rank, connection, *task)
            return
        while message := connection.recv_bytes():
            fn, args = pickle.loads(message)
            if not _perform(rank, connection, fn, args):
                return
        dist.destroy_process_group()


def _perform(rank: int, connection: Connection, fn: Callable[..., Any], args: tuple) -> bool:
    try:
        result = fn(rank, *args)
        dist.barrier()  # nobody leaves while another still needs its messages
        _answer(connection, True, result)
        return True
    except BaseException:  # noqa: BLE001, whatever it is, the parent reports it
        _answer(connection, False, traceback.format_exc())
        return False


def _answer(connection: Connection, ok: bool, value: Any) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # the parent may have given up already
        connection.send_bytes(pickle.dumps((ok, time.monotonic(), value)))
