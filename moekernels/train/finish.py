"""What a run leaves when it ends: its trace, plots, the closing table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from moekernels import files, jsonio
from moekernels.console import table
from moekernels.parallel.measure import Flight, flights_of
from moekernels.pipeline.trace import Event, exchange_events, write_trace
from moekernels.run.folder import read_metrics
from moekernels.train.generating import SAMPLE_PROMPT, sample
from moekernels.train.report import closing
from moekernels.train.traces import Tracks, entries_of, plan_of

if TYPE_CHECKING:
    from moekernels.train.loop import Trainer


def finish(trainer: Trainer, events: list[Event], step: int, seconds: float) -> None:
    """The trace of the last step, plots and the closing table, by rank 0; every rank calls it."""
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
    ran = sorted((e for part, *_ in gathered for e in part), key=lambda e: e.start)
    measured = Tracks(ran, {stage: flights for _, stage, flights, _ in gathered if flights})
    planned = plan_of(trainer.runtime.schedule, measured)
    entries = entries_of(measured, planned, step=step)
    for _, stage, _, sums in gathered:
        for chunk, flight in sums.items():  # those of several chunks may be under way at once
            entries += exchange_events(stage, [flight], flight.name, 1 + chunk, step=step)
    write_trace(path / "trace.json", entries)
    lines = read_metrics(path)
    entropy = trainer.job.corpus.stats.unigram_entropy
    files.write(path / "loads.json", jsonio.dumps(trainer.heat.tolist()) + "\n")
    record = trainer.monitor.record(trainer.heat)
    if record is not None:
        record.write(path)
    flush = {"measured": measured, "planned": planned}
    for said in draw(path, lines, trainer.heat.numpy(), entropy, record, flush):
        print(said)
    rows = closing(lines, trainer.first_step, seconds, entropy, path)
    text = sample(
        path, trainer.run.model.parameters_count(), trainer.loader.held_out_tokens(SAMPLE_PROMPT)
    )
    if text is not None:
        rows.insert(-1, ("sample", text))
    print(table(rows), flush=True)
