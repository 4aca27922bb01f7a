"""Ranks: local ones that this process starts and watches, or the ones that a launcher gave.

Local CPU ranks are forked: this process has imported torch already, so eight of them stand in half
a second where eight interpreters take ten. CUDA cannot be forked, so its ranks are spawned. Either
way a rank dies with its parent (even one that is killed), and a rank that fails ends the run
within seconds under its own name.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moekernels.errors import RunError, UsageError, one_line
from moekernels.parallel import nccl
from moekernels.parallel.host import bound_primitives, share_cores
from moekernels.parallel.launcher import TIMEOUT, Launched
from moekernels.parallel.stop import ONE_REQUEST, Forward, Stop, end_now, handled

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 0.3  # after a first failure, how long the others may report an earlier one
# What a rank says when another one died under it: a consequence, never the cause.
CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
)


@dataclass(frozen=True)
class RankEnv:
    """Where a rank stands. `leader`: it speaks for its machine where all would say the same."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    stop: Stop = field(default_factory=Stop)

    @property
    def leader(self) -> bool:
        return self.rank == 0


class RankFailure(RuntimeError):
    """A rank raised or died; the message names it. `details`: its traceback, where it left one."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


def has_cuda_kernels() -> bool:
    """Whether the library has a CUDA kernel for every op that a training step calls."""
    import moekernels.ops  # noqa: F401, registers the ops

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has(f"moekernels::{op}", "CUDA") for op in ("_gate", "_permute", "_experts"))


def choose_device(name: str, local_ranks: int) -> str:
    """`cpu` or `cuda` for auto|cpu|cuda and the ranks of this machine: one card a rank, and a
    library that has kernels for it."""
    if name == "cpu":
        return "cpu"
    cards = torch.cuda.device_count()
    built = has_cuda_kernels()
    if cards >= local_ranks and built:
        return "cuda"
    if name == "auto":
        return "cpu"
    if not built:
        raise UsageError(
            "--device cuda: this build has no CUDA kernels; rebuild with MOEKERNELS_CUDA=1 or "
            "give cpu"
        )
    raise UsageError(
        f"--device cuda: {local_ranks} ranks need a card each, {cards} are here; give --device cpu"
    )


class Failure(NamedTuple):
    """What a rank says when it fails: a kind, a time of the monotonic clock, and the message, with
    its traceback where the kind is `error`."""

    kind: str
    when: float
    rank: int
    value: Any


def run_local(
    world: int,
    device: str,
    target: Callable[..., Any],
    *args: Any,
    describe: Callable[[int], str] | None = None,
    forward: Forward | None = None,
) -> Any:
    """`target(RankEnv, *args)` on `world` local ranks; rank 0's result.

    Raises UsageError and RunError as a rank raised them, RankFailure where one failed or died. One
    rank on the CPU runs here. `describe(rank)` is how a rank is called in messages. `forward`:
    signals go to rank 0, which ends the run in order, rather than end it here.
    """
    bound_primitives()
    if world == 1 and device == "cpu":
        return target(RankEnv(0, 1, 0, torch.device("cpu")), *args)
    get = multiprocessing.get_context
    context = get("fork") if device == "cpu" else get("spawn")
    describe = describe or (lambda rank: f"rank {rank}")
    sys.stdout.flush()
    sys.stderr.flush()
    if device == "cpu":
        torch.set_num_threads(1)  # a pool of threads would not live through the fork
    # SIGTERM as Ctrl-C: an exception, so that what follows is cleaned up.
    terminating = handled(end_now, (signal.SIGTERM,))
    with terminating, tempfile.TemporaryDirectory(prefix="moekernels-") as directory:
        store = str(Path(directory, "store"))
        processes: list[BaseProcess] = []
        pipes: dict[Connection, int] = {}
        try:
            process: BaseProcess
            for rank in range(world):
                here, there = context.Pipe(duplex=False)
                process = context.Process(
                    target=_serve,
                    args=(rank, world, device, store, os.getpid(), there, target, args),
                    daemon=True,
                )
                with _tokenizers_left_behind():
                    process.start()
                there.close()
                processes.append(process)
                pipes[here] = rank
            leader = processes[0].pid
            assert leader is not None  # it was started
            with forward.to(leader) if forward else contextlib.nullcontext():
                return _watch(processes, pipes, describe)
        except RankFailure:
            if forward and forward.signal:  # rank 0 had not begun to listen, and died of it
                end_now(forward.signal)
            raise
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                process.join()
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # a killed rank cannot give the cursor back


@contextlib.contextmanager
def _tokenizers_left_behind() -> Iterator[None]:
    """Around a fork: releases of tokenizers before 0.23 warn on stderr, in every child of a process
    that built a corpus, unless they are told that the child will use no threads of theirs."""
    name = "TOKENIZERS_PARALLELISM"
    told = name in os.environ
    os.environ.setdefault(name, "false")
    try:
        yield
    finally:
        if not told:
            del os.environ[name]


def _watch(
    processes: list[BaseProcess], pipes: dict[Connection, int], describe: Callable[[int], str]
) -> Any:
    """Wait for every rank; rank 0's result, or the failure that came first."""
    result, failures = None, list[Failure]()
    deadline: float | None = None
    while pipes:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        ready = wait(list(pipes), timeout=left)
        for pipe in [pipe for pipe in pipes if pipe in ready]:
            rank = pipes.pop(pipe)
            try:
                kind, when, value = pipe.recv()
            except (EOFError, OSError):
                kind, when, value = "died", 0.0, _obituary(processes[rank])
            if kind == "done":
                result = value if rank == 0 else result
                continue
            failures.append(Failure(kind, when, rank, value))
            deadline = deadline or time.monotonic() + GRACE_SECONDS
    if not failures:
        return result
    for wanted, error in (("usage", UsageError), ("run", RunError)):
        for kind, _, _, value in failures:
            if kind == wanted:
                raise error(value)

    def order(failure: Failure) -> tuple[bool, float]:
        said = failure.value[0] if failure.kind == "error" else ""
        return any(text in said for text in CONSEQUENCES), failure.when

    kind, _, rank, value = min(failures, key=order)
    message, details = value if kind == "error" else (value, "")
    raise RankFailure(f"{describe(rank)}: {message}", details)


def _obituary(process: BaseProcess) -> str:
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"left with exit code {code} before it was done"


def _serve(
    rank: int,
    world: int,
    device: str,
    store: str,
    parent: int,
    pipe: Connection,
    target: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """A local rank's whole life."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and says who stops
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    answer: tuple[str, float, Any]
    try:
        try:
            if device == "cpu" and sys.platform == "linux":
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            shared = dist.FileStore(store, world) if world > 1 else None
            env = _join(rank, world, rank, device, shared, Stop(patience=None))
            answer = ("done", time.monotonic(), target(env, *args))
            code = 0
        except (UsageError, RunError) as error:
            kind = "usage" if isinstance(error, UsageError) else "run"
            answer = (kind, time.monotonic(), str(error))
        except BaseException as error:  # noqa: BLE001, whatever it is the parent reports it
            answer = ("error", time.monotonic(), (say(error), traceback.format_exc()))
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            pipe.send(answer)
        if code:
            # Peers would report closed connections; the parent ends us all sooner.
            time.sleep(10 * GRACE_SECONDS)
    finally:
        # No destructors: those of a process group wait for ranks that may be gone.
        os._exit(code)


def _join(
    rank: int, world: int, local_rank: int, device: str, store: dist.Store | None, stop: Stop
) -> RankEnv:
    if device == "cpu":
        share_cores()
        torch.set_num_threads(1)
        place = torch.device("cpu")
    else:
        for name, value in nccl.DEFAULTS.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(local_rank)
        place = torch.device("cuda", local_rank)
    if store is not None:
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return RankEnv(rank, world, local_rank, place, stop)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def run_launched(
    launched: Launched,
    device: str,
    target: Callable[..., int],
    *args: Any,
    describe: Callable[[int], str],
) -> int:
    """`target(RankEnv, *args)` as the rank that a launcher made of this process; the exit code,
    which is the target's own if it returns."""
    bound_primitives()
    rank = launched.rank
    place = (rank, launched.size, launched.local_rank, device)
    code = 1
    try:
        code = target(_join(*place, launched.store, Stop(ONE_REQUEST)), *args)
        dist.barrier()
        dist.destroy_process_group()
        return code
    except (UsageError, RunError) as error:
        if _first_to_say():
            print(f"moekernels: {one_line(str(error))}", file=sys.stderr)
        code = 2 if isinstance(error, UsageError) else 1
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        print(f"moekernels: {describe(rank)}: {say(error)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: the launcher ends the others when it sees this one go


def _first_to_say() -> bool:
    """Whether no other rank of this run has reported a usage error yet; most arise on all."""
    try:
        return dist.distributed_c10d._get_default_store().add("moekernels/usage_error", 1) == 1
    except Exception:  # noqa: BLE001, no store (any more): twice is better than never
        return True


def say(error: BaseException) -> str:
    """`Type: message` on one line; KeyboardInterrupt and the like say only their name."""
    text = one_line(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
