"""`--microbatches auto`: how many microbatches a flush has, from what the first steps take.

One of m microbatches costs a pipeline stage alpha + W/m seconds: alpha however small it is, W for
the step's tokens. A flush of m fills and drains for `idle` of them besides, whatever m is: p-1 over
p stages, (p-1)/v where they have v chunks each, less where weights' gradients fill what is idle. So

    T(m) = (m + idle) (alpha + W/m),    least at    m* = sqrt(idle W/alpha)

Two settings are run for some steps each. The global batch is the same whatever m is: nothing is
lost to measuring.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from moekernels import assembly
from moekernels.errors import UsageError
from moekernels.parallel.mesh import Mesh
from moekernels.pipeline.build import in_pairs
from moekernels.pipeline.simulate import idle_microbatches
from moekernels.run import buffers
from moekernels.run import files as cfg

WARM, TIMED = 1, 2  # steps of a setting: those that are not counted, and those that are
STEPS = 2 * (WARM + TIMED)
ROOM = 0.9  # of the memory, that a count may be predicted to take


def fit(few: tuple[int, float], many: tuple[int, float]) -> tuple[float, float]:
    """(alpha, W) through two (microbatches, stage seconds of one), neither below 0."""
    (a, slow), (b, fast) = few, many
    work = max(0.0, (slow - fast) / (1 / a - 1 / b))
    return max(0.0, fast - work / b), work


def optimum(alpha: float, work: float, idle: float) -> float:
    """m*, of the fit alone."""
    return math.sqrt(idle * work / alpha) if alpha > 0 else (math.inf if idle * work > 0 else 1.0)


def choose(alpha: float, work: float, idle: float, least: int, most: int) -> int:
    """The whole number from `least` to `most` with the shortest flush."""
    best = optimum(alpha, work, idle)
    if best >= most:
        return most
    near = {min(max(n, least), most) for n in (math.floor(best), math.ceil(best))}
    return min(sorted(near), key=lambda m: (m + idle) * (alpha + work / m))


def settings(least: int, most: int, stages: int) -> tuple[int, int] | None:
    """Two counts to measure, a factor of four apart where there is room; None: no choice."""
    if least >= most:
        return None
    many = min(most, 4 * max(least, stages))
    return max(least, min(stages, many // 2)), many


def with_count(run: cfg.RunConfig, count: int) -> cfg.RunConfig:
    """The configuration with so many microbatches in a flush; AUTO: still to be measured."""
    batch = dataclasses.replace(run.batch, microbatches=count, accumulation=1)
    return dataclasses.replace(run, batch=batch)


def most(run: cfg.RunConfig) -> int:
    """A microbatch holds a sequence at least."""
    return max(1, run.batch.sequences // run.layout.dp)


def least(run: cfg.RunConfig, corpus, memory: float, device: str, at_once: int = 1) -> int:
    """The smallest count of which the planner says that it fits into `memory` bytes a rank.
    `at_once`: see `Strategy`."""
    from moekernels.plan.evaluate import squares_together
    from moekernels.plan.memory import stage_memory
    from moekernels.plan.problem import configured

    model = run.model

    def fits(count: int) -> bool:
        tried = with_count(run, count)
        s = dataclasses.replace(configured(tried), at_once=at_once)
        loader = assembly.build_loader(tried, corpus)
        plan = loader.plan(1)
        tokens = max(max(rank) for rank in plan.rows)
        squares = squares_together(loader.sequence_lengths(1), plan) if model.masked else 0.0
        parts = tried.train.exchange_parts
        bound = buffers.parse(tried.train.exchange_buffers) or 0.0
        stages = [
            stage_memory(
                model,
                s,
                r,
                tokens,
                device=device,
                parts=parts,
                bound=bound,
                squares=squares,
            )
            for r in range(s.layout.pp)
        ]
        return max(stage.total for stage in stages) <= ROOM * memory

    low, high = 0, most(run)  # low does not fit, high is the best there is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def memory_of(device: torch.device, local_ranks: int) -> float:
    """Bytes that a rank may use."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local_ranks


def check(run: cfg.RunConfig, done: int) -> None:
    if in_pairs(run.layout.schedule) and run.layout.pp == 1:
        raise UsageError(
            f"--microbatches auto takes the fewest that fit where one stage waits for nobody, and "
            f"--schedule {run.layout.schedule} hides more with more; give a number of 2 or more"
        )
    if run.layout.pp > 1 and run.train.steps - done <= STEPS:
        raise UsageError(
            f"--microbatches auto measures for {STEPS} steps, --steps is {run.train.steps}"
            + (f", {done} of them done" if done else "")
            + "; give more steps, or a number of microbatches"
        )


def agree(value: int, mesh: Mesh) -> int:
    """Rank 0's value, on every rank."""
    told = torch.tensor([value], device=mesh.device)
    if mesh.world.size > 1:
        dist.broadcast(told, 0)
    return int(told)


@dataclass
class Tuner:
    """Measures `tried` in turn from behind `done` steps on, then decides."""

    least: int
    most: int
    tried: tuple[int, int]
    idle: float
    done: int = 0
    seconds: dict[int, list[float]] = field(default_factory=dict)  # of a stage, a token
    tokens: list[int] = field(default_factory=list)

    def count(self, step: int) -> int:
        return self.tried[(step - self.done - 1) // (WARM + TIMED)]

    def saw(self, step: int, stage_seconds: float, tokens: int) -> bool:
        """Note what a step took of its busiest stage; whether it was the last one to measure."""
        place = step - self.done - 1
        if place % (WARM + TIMED) >= WARM:
            self.seconds.setdefault(self.count(step), []).append(stage_seconds / tokens)
            self.tokens.append(tokens)
        return place == STEPS - 1

    def decide(self) -> tuple[int, str]:
        """(the choice, what to say of it)."""
        tokens = sum(self.tokens) / len(self.tokens)
        few, many = ((m, min(self.seconds[m]) * tokens / m) for m in self.tried)
        alpha, work = fit(few, many)
        chosen = choose(alpha, work, self.idle, self.least, self.most)
        return chosen, (
            f"auto     a stage takes {1e3 * few[1]:.1f} ms for one of {few[0]} microbatches, "
            f"{1e3 * many[1]:.1f} ms for one of {many[0]}: alpha {1e3 * alpha:.2f} ms, "
            f"W {1e3 * work:.1f} ms, m* = {optimum(alpha, work, self.idle):.1f}; "
            f"of {self.least} to {self.most}: {chosen}"
        )


def begin(run: cfg.RunConfig, corpus, mesh: Mesh, done: int) -> tuple[Tuner | None, int, str]:
    """(what measures, or None where nothing is to be chosen; the first count; what to say). Called
    by every rank together; rank 0's memory decides."""
    lay = run.layout
    local_ranks = len(mesh.nodes.mates(mesh.rank))
    low = 1
    if mesh.rank == 0:
        memory, at_once = memory_of(mesh.device, local_ranks), assembly.at_once_of(run, mesh)
        low = least(run, corpus, memory, mesh.device.type, at_once)
    low, high = agree(low, mesh), most(run)
    tried = settings(low, high, lay.pp)
    if lay.pp == 1:
        return None, low, f"auto     one stage waits for nobody: the fewest that fit, {low}"
    if tried is None:
        return None, low, f"auto     nothing to choose: {low}"
    text = (
        f"auto     {tried[0]}, then {tried[1]} microbatches for {STEPS // 2} steps each, then "
        f"the best of {low} to {high}"
    )
    idle = idle_microbatches(lay.schedule, lay.pp, lay.virtual_stages)
    return Tuner(low, high, tried, idle, done), tried[0], text
