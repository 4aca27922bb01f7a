"""`--profile 10:12`: what torch.profiler sees of those steps, all ranks in one file.

Actions of the pipeline appear by their names (`F3`: forward of microbatch 3), as `pipeline.trace`
marks them under any profiler.
"""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from moekernels import files, jsonio
from moekernels.errors import RunError
from moekernels.parallel.mesh import Mesh
from moekernels.run import files as cfg

NAME = "profile.json.gz"  # chrome://tracing and Perfetto open it as it is


class Profiler:
    """Between `begin` and `end` of its steps it profiles; every rank calls both for every step."""

    def __init__(self, text: str, folder: Path, mesh: Mesh) -> None:
        self._steps = cfg.profiled(text)
        self._folder, self._mesh = folder, mesh
        self._running: profile | None = None

    def begin(self, step: int) -> None:
        """Before a step."""
        if step in self._steps and self._running is None:
            activities = [ProfilerActivity.CPU]
            if self._mesh.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities)
            self._running.start()

    def end(self, step: int, last: bool) -> Path | None:
        """Behind a step; the file, where it was written."""
        if self._running is None or (step + 1 in self._steps and not last):
            return None
        self._running.stop()
        part = self._part(self._mesh.rank)
        self._running.export_chrome_trace(str(part))
        self._running = None
        if not part.exists():  # it writes beside it, and says what failed on stderr alone
            part.with_name(f"{part.name}.tmp").unlink(missing_ok=True)
            error = OSError(errno.ENOSPC, "torch.profiler gave up")
            raise RunError(files.no_room(part, error))
        if self._mesh.world.size > 1:
            dist.barrier()
        if self._mesh.rank != 0:
            return None
        parts = [self._part(rank) for rank in range(self._mesh.world.size)]
        traces = [json.loads(path.read_text(encoding="utf-8")) for path in parts]
        for path in parts:
            path.unlink()
        data = jsonio.dumps(merge(traces)).encode()
        files.write(self._folder / NAME, gzip.compress(data, 6))
        return self._folder / NAME

    def _part(self, rank: int) -> Path:
        return self._folder / f".profile-{rank:05d}.json"


def merge(traces: list[dict[str, Any]]) -> dict[str, Any]:
    """One trace of those of all ranks: its processes are theirs, named and ordered by rank, its
    times count from the earliest rank's origin."""
    origins = [int(trace.get("baseTimeNanoseconds", 0)) for trace in traces]
    events: list[dict[str, Any]] = []
    processes: dict[tuple[int, str], int] = {}
    for rank, (trace, origin) in enumerate(zip(traces, origins)):
        later = (origin - min(origins)) / 1e3
        for event in trace["traceEvents"]:
            process = processes.setdefault((rank, str(event.get("pid"))), len(processes))
            event = {**event, "pid": process}
            if "ts" in event:
                event["ts"] += later
            if "id" in event:  # of an arrow between two events of one rank
                event["id"] = f"{rank}.{event['id']}"
            if event["ph"] == "M" and event["name"] == "process_name":
                event["args"] = {"name": f"rank {rank} {event['args'].get('name', '')}".rstrip()}
            if event["ph"] == "M" and event["name"] == "process_sort_index":
                event["args"] = {"sort_index": process}
            events.append(event)
    kept = {name: value for name, value in traces[0].items() if name.startswith("device")}
    return {**kept, "baseTimeNanoseconds": min(origins), "traceEvents": events}
