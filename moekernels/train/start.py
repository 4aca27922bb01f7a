"""`moekernels train`: from the command line to ranks that train.

Every rank runs `_work`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from moekernels.errors import UsageError
from moekernels.train import assembly, checkpoint, launch, microbatches
from moekernels.train import config as cfg
from moekernels.train.loop import Job, Trainer
from moekernels.train.metrics import RunFolder


def train(
    preset: str | None,
    file: Path | None,
    flags: dict,
    *,
    out: Path | None = None,
    name: str | None = None,
    resume: bool = False,
) -> int:
    """Run a training as the command line describes it; the exit code."""
    world = launch.torchrun_world()
    name = name or (file.stem if file else preset or "tiny")
    folder = RunFolder(RunFolder.choose(out, name, resume))
    found = checkpoint.newest_whole(folder.path / "checkpoints") if resume else None
    if resume and found is None:
        raise UsageError(
            f"{folder.path}: no checkpoint to resume from; leave --resume out, or give the run's "
            f"--out"
        )
    if resume and preset is None and file is None:
        file = folder.path / "config.toml"  # what the run was started with
    run = cfg.resolve(preset, file, flags, world)
    path, facts = found or (None, {})
    tune = run.batch.microbatches == cfg.AUTO and "microbatches" not in facts
    if run.batch.microbatches == cfg.AUTO:
        first = min(run.layout.pp, microbatches.most(run))
        run = microbatches.with_count(run, facts.get("microbatches", first))
    layout = assembly.layout_of(run)
    if found:
        checkpoint.check_model(path, facts, asdict(run.model))
    if tune and run.layout.pp > 1:
        microbatches.check(run, facts.get("step", 0))

    from moekernels.data.corpus import load_corpus

    speaks = world is None or launch.torchrun_rank() == 0
    corpus = load_corpus(
        run.batch.data, vocab_size=run.model.vocab_size, log=print if speaks else None
    )
    loader = assembly.build_loader(run, corpus)
    if found:
        loader.load_state_dict(facts["data"])
        if facts["step"] >= run.train.steps:
            raise UsageError(
                f"{path}: step {facts['step']} of --steps {run.train.steps} is done; give more "
                f"--steps to go on"
            )
    if speaks:
        folder.open(resume)
    job = Job(run, folder, corpus, path, facts, tune)
    describe = assembly.rank_names(layout)

    if world is None:
        device = launch.choose_device(run.train.device, layout.world)
        return launch.run_local(layout.world, device, _work, job, describe=describe)
    device = launch.choose_device(run.train.device, launch.local_world())
    return launch.run_torchrun(device, _work, job, describe=describe)


def _work(env: launch.RankEnv, job: Job) -> int:
    """A rank's training."""
    trainer = Trainer(env, job)
    try:
        trainer.run_steps()
        return 0
    finally:
        trainer.progress.close()
