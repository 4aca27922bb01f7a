"""What a run leaves when it ends: traces, plots, the closing table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from moekernels import files, jsonio
from moekernels.console import table
from moekernels.parallel.measure import Flight, flights_of
from moekernels.pipeline.schedule import Kind, Schedule
from moekernels.pipeline.simulate import Simulator
from moekernels.pipeline.trace import Event, exchange_events, trace_events, write_trace
from moekernels.run.folder import read_metrics
from moekernels.train.generating import SAMPLE_PROMPT, sample
from moekernels.train.report import closing

if TYPE_CHECKING:
    from moekernels.train.loop import Trainer


def finish(trainer: Trainer, events: list[Event], step: int, seconds: float) -> None:
    """Traces of the last step, plots and the closing table, by rank 0; every rank calls it."""
    mine: tuple[list[Event], int, list[Flight], dict[int, Flight]]
    mine = ([], trainer.mesh.pp.rank, [], {})
    if trainer.mesh.tp.rank == 0 and trainer.mesh.dp.rank == 0:
        flights = flights_of(trainer.exchanges.stamps, trainer.origin)
        sums = trainer.optimizer.sums.flights(trainer.origin)
        mine = (events, trainer.mesh.pp.rank, flights, sums)
    gathered = [mine] * trainer.env.world
    if trainer.env.world > 1:
        dist.gather_object(mine, gathered if trainer.env.leader else None, 0)
    if not trainer.env.leader:
        return
    from moekernels.train.plots import draw

    path = trainer.job.folder.path
    measured = sorted((e for part, *_ in gathered for e in part), key=lambda e: e.start)
    entries = trace_events(measured, step=step)
    for _, stage, flights, sums in gathered:
        entries += exchange_events(stage, flights, step=step) if flights else []
        for chunk, flight in sums.items():  # those of several chunks may be under way at once
            entries += exchange_events(stage, [flight], flight.name, 1 + chunk, step=step)
    write_trace(path / "trace.json", entries)
    write_trace(
        path / "trace_planned.json", trace_events(planned(trainer.runtime.schedule, measured))
    )
    lines = read_metrics(path)
    entropy = trainer.job.corpus.stats.unigram_entropy
    files.write(path / "loads.json", jsonio.dumps(trainer.heat.tolist()) + "\n")
    record = trainer.monitor.record(trainer.heat)
    if record is not None:
        record.write(path)
    for said in draw(path, lines, trainer.heat.numpy(), entropy, record):
        print(said)
    rows = closing(lines, trainer.first_step, seconds, entropy, path)
    text = sample(
        path, trainer.run.model.parameters_count(), trainer.loader.held_out_tokens(SAMPLE_PROMPT)
    )
    if text is not None:
        rows.insert(-1, ("sample", text))
    print(table(rows), flush=True)


def planned(schedule: Schedule, measured: list[Event]) -> list[Event]:
    """The same schedule under the clock, each computation at its virtual stage's measured mean."""
    spent: dict = {}  # by a pass, which may be in pieces
    for e in measured:
        if e.kind.computes:
            one = e.stage, e.chunk, e.kind, e.microbatch
            spent.setdefault(one, []).append(e.end - e.start)
    costs: dict = {}
    layers = [0] * schedule.stages  # that cut a forward, in two places each
    for (rank, chunk, kind, _), pieces in spent.items():
        costs.setdefault((schedule.virtual_stage(rank, chunk), kind), []).append(sum(pieces))
        if kind is Kind.F:
            layers[rank] = max(layers[rank], len(pieces) // 2)
    mean = {one: sum(each) / len(each) for one, each in costs.items()}
    return Simulator(schedule).run(lambda stage, _, kind: mean[stage, kind], layers=layers).events
