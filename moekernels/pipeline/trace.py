"""Times of actions, and Chrome traces of them, planned or measured: open those in Perfetto or
chrome://tracing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from moekernels import files, jsonio

from .schedule import Action, Kind

THREADS = ("compute", "communication")


class Event(NamedTuple):
    """One action of one stage; seconds from an origin that all stages share."""

    stage: int
    kind: Kind
    chunk: int
    microbatch: int
    start: float
    end: float


class PieceOf(NamedTuple):
    """Of a pass that a pair runs piece by piece, one; where it is not `cut`, the whole pass."""

    stage: int
    chunk: int
    kind: Kind
    cut: bool
    number: int


def pieces_of(events: Iterable[Event]) -> Iterator[tuple[Event, PieceOf]]:
    """Each computation of some flush, and which piece of its pass it is."""
    passes: dict[tuple[int, int, Kind, int], list[Event]] = {}
    for e in sorted((e for e in events if e.kind.computes), key=lambda e: e.start):
        passes.setdefault((e.stage, e.chunk, e.kind, e.microbatch), []).append(e)
    for (stage, chunk, kind, _), pieces in passes.items():
        for number, e in enumerate(pieces):
            yield e, PieceOf(stage, chunk, kind, len(pieces) > 1, number)


class Clock:
    """Times of actions: the host's on the CPU, the device's own on a GPU, which runs behind."""

    def __init__(self, device: torch.device, origin: float | None, record: bool):
        self._record = record
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Action, Any, Any]] = []
        if not record:
            return
        self._start = self._now()
        host = time.perf_counter()
        self._origin = host if origin is None else origin
        self._offset = host - self._origin

    def time(self, action: Action) -> Span:
        return Span(self, action)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def events(self, stage: int) -> list[Event]:
        if not self._record:
            return []
        if not self._cuda:
            return [
                Event(stage, *action, start - self._origin, end - self._origin)
                for action, start, end in self._spans
            ]
        torch.cuda.current_stream().synchronize()
        since = self._start.elapsed_time
        return [
            Event(
                stage, *action, self._offset + since(start) / 1e3, self._offset + since(end) / 1e3
            )
            for action, start, end in self._spans
        ]


class Span:
    """Records one action of a clock as a context manager."""

    __slots__ = ("_action", "_clock", "_mark", "_start")

    def __init__(self, clock: Clock, action: Action):
        self._clock, self._action = clock, action

    def __enter__(self) -> None:
        self._mark = None
        if torch.autograd._profiler_enabled():  # a millionth of a second where none runs
            self._mark = torch.profiler.record_function(_name(self._action))
            self._mark.__enter__()
        self._start = self._clock._now() if self._clock._record else None

    def __exit__(self, *_: object) -> None:
        if self._clock._record:
            self._clock._spans.append((self._action, self._start, self._clock._now()))
        if self._mark is not None:
            self._mark.__exit__(None, None, None)


def _name(action: Action) -> str:
    kind, chunk, microbatch = action
    return f"{kind.name}{microbatch}" + (f" chunk {chunk}" if chunk else "")


def trace_events(
    events: Iterable[Event], label: str = "", beside: int = 0, **args: Any
) -> list[dict[str, Any]]:
    """Trace entries for `events` of any number of stages: pid is the stage, names `F3`, `B3`, ...

    `args` (a step number) go into each entry beside chunk and microbatch. `label` says in the
    stages' names what the events are; where a file has others, pids begin at `beside`, and each
    stage is drawn below the one that it is compared with.
    """
    events = sorted(events, key=lambda event: (event.stage, event.start))
    entries: list[dict[str, Any]] = []
    for stage in sorted({event.stage for event in events}):
        pid, place = beside + stage, 2 * stage + bool(beside)
        entries.append(_metadata("process_name", pid, 0, {"name": f"stage {stage}{label}"}))
        entries.append(_metadata("process_sort_index", pid, 0, {"sort_index": place}))
        for thread, name in enumerate(THREADS):
            entries.append(_metadata("thread_name", pid, thread, {"name": name}))
    for event in events:
        entries.append(
            {
                "ph": "X",
                "pid": beside + event.stage,
                "tid": 0 if event.kind.computes else 1,
                "name": f"{event.kind}{event.microbatch}",
                "cat": "forward" if event.kind.forward else "backward",
                "ts": round(event.start * 1e6, 3),
                "dur": round((event.end - event.start) * 1e6, 3),
                "args": {"chunk": event.chunk, "microbatch": event.microbatch, **args},
            }
        )
    return entries


class Traveller(Protocol):
    """Rows on their way between the ranks of a stage; seconds from the events' origin. `waits`:
    what is known of who waited for them."""

    @property
    def name(self) -> str: ...

    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...

    @property
    def size(self) -> int: ...

    @property
    def waits(self) -> Mapping[str, float]: ...


def exchange_events(
    pid: int, flights: Iterable[Traveller], track: str = "exchange", place: int = 0, **args: Any
) -> list[dict[str, Any]]:
    """Trace entries of what travels between a stage's ranks, on a track of their own, the one in
    that place beside `THREADS`."""
    thread = len(THREADS) + place
    entries = [_metadata("thread_name", pid, thread, {"name": track})]
    for flight in flights:
        facts = {f"{key}_us": round(value * 1e6, 3) for key, value in flight.waits.items()}
        entries.append(
            {
                "ph": "X",
                "pid": pid,
                "tid": thread,
                "name": flight.name,
                "cat": track,
                "ts": round(flight.start * 1e6, 3),
                "dur": round((flight.end - flight.start) * 1e6, 3),
                "args": {"bytes": flight.size, **facts, **args},
            }
        )
    return entries


def write_trace(path: str | Path, entries: list[dict[str, Any]]) -> None:
    """Write `{"traceEvents": [...]}` whole or not at all."""
    files.write(path, jsonio.dumps({"traceEvents": entries, "displayTimeUnit": "ms"}))


def _metadata(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}
