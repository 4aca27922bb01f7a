"""Whether a run can fit into memory at all, asked before anything of it is allocated.

A lower bound: what certainly will be there. What passes here may still not fit; what does not pass
never would, and would take the machine with it before it failed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from moekernels.errors import UsageError
from moekernels.model.experts import one_expert
from moekernels.model.spec import WIDTH
from moekernels.run import files as cfg
from moekernels.run.sections import RunConfig

RANK = 100e6  # bytes of a process that has imported torch, shared pages left out
SEQUENCE = 400  # bytes of an empty tensor pair and its place in a plan
RANKS_A_CORE, RANKS = 8, 64


def available() -> float:
    """Bytes of this machine that a process may still take, its control groups' limits included."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(float(line.split()[1]) * 1024)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no limit is the word max
            root = Path("/sys/fs/cgroup")
            left = [float((root / name).read_text(encoding="utf-8")) for name in (limit, used)]
            found.append(left[0] - left[1] + _cached(root))
    return max(0.0, min(found))


def _cached(root: Path) -> float:
    """Pages of files, which are given back when they are needed."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "memory.stat").read_text(encoding="utf-8").splitlines():
            if line.startswith("inactive_file "):
                return float(line.split()[1])
    return 0.0


def needed(run: RunConfig) -> dict[str, float]:
    """Bytes over all ranks, by what takes them."""
    lay, b, t = run.layout, run.batch, run.train
    model = run.model
    experts = model.moe_layers * model.num_experts * one_expert(model)
    everything = model.parameters_count()
    edp = max(1, lay.tp * lay.dp // (lay.ep * lay.etp))
    copies = (everything - experts) * lay.dp + experts * edp
    moments = 2 * (2 if t.optimizer_state == "bf16" else max(4, WIDTH[t.dtype]))
    gradient = max(4, WIDTH[t.dtype])
    low = (cfg.length_range(b.lengths, b.context) or (2, 2))[0]
    batch = (b.sequences + t.eval_sequences) * (SEQUENCE + 16.0 * low)
    return {
        "weights and gradients": float(copies * (WIDTH[t.dtype] + gradient)),
        "moments of the optimizer": float(everything * moments),
        "batches": batch,
        "processes": RANK * (lay.tp * lay.dp * lay.pp - 1),
    }


def check(run: RunConfig, world: int | None, local: int | None, device: str = "cpu") -> None:
    """UsageError where this machine's part of the run fits into no memory. `world`, `local`: ranks
    that torchrun started, in all and here; None: all are started here."""
    lay = run.layout
    ranks = lay.tp * lay.dp * lay.pp
    cores = os.cpu_count() or 1
    if world is None and ranks > max(RANKS, RANKS_A_CORE * cores):
        raise UsageError(
            f"tp {lay.tp} x dp {lay.dp} x pp {lay.pp} = {ranks} ranks are too many for the {cores} "
            f"cores of one machine; give smaller degrees, or start them on more with torchrun"
        )
    share = 1.0 if world is None else (local or world) / world
    parts = needed(run)
    if device == "cuda":
        parts.pop("processes")
        here = sum(
            torch.cuda.get_device_properties(i).total_memory
            for i in range(torch.cuda.device_count())
        )
    else:
        here = available()
    total = share * sum(parts.values())
    if total <= here:
        return
    worst = max(parts, key=parts.get)
    flags = {
        "batches": "a smaller --sequences, --eval-sequences or --lengths",
        "processes": "smaller degrees",
    }
    would = flags.get(worst, "fewer --layers or --experts, a smaller width or vocabulary")
    raise UsageError(
        f"the run needs at least {total / 1e9:,.1f} GB here, {share * parts[worst] / 1e9:,.1f} GB "
        f"of it for {worst}, and {here / 1e9:,.1f} GB are free; {would}, or more machines, would do"
    )
