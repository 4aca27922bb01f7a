"""`moekernels train`: from the command line to ranks that train.

Every rank runs `_work`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from moekernels import assembly, files
from moekernels.data.batch_plan import check
from moekernels.errors import RunError, UsageError
from moekernels.parallel import launch
from moekernels.parallel.launcher import launched
from moekernels.parallel.stop import Forward
from moekernels.plan import host_share, microbatches, room
from moekernels.run import files as cfg
from moekernels.train import loggers, resume, weights
from moekernels.train.checkpoint import sweep
from moekernels.train.loop import Job, Trainer
from moekernels.train.metrics import TOKENIZER, RunFolder, check_name


def train(
    preset: str | None,
    file: Path | None,
    flags: dict,
    *,
    out: Path | None = None,
    name: str | None = None,
    resume_how: str | None = None,
    init_from: Path | None = None,
) -> int:
    """Run a training as the command line describes it; the exit code.

    `init_from`: the weights to begin with, where nothing is resumed.
    `resume_how`: None begins anew; `must` goes on from a checkpoint; `auto` does where there is
    one, and so does a rank that torchrun started again.
    """
    told = launched()
    peers = told or resume.Alone()
    if told is not None and told.attempt:
        resume_how = "auto"
    if name is None:
        name = (file.stem or "run") if file else Path(preset or "tiny").name
    else:
        check_name(name)

    def choose() -> Path:
        return RunFolder.choose(out, name, resume_how is not None)

    folder = RunFolder(choose() if told is None else told.folder(choose))
    speaks = peers.rank == 0
    if resume_how and speaks and folder.path.is_dir():
        folder.open(True)  # before a live run's checkpoints are read: it may delete them meanwhile
    found = _find(folder.path, resume_how, peers) if resume_how else resume.Found(None, None)
    used = folder.path / "config.toml"
    if resume_how and preset is None and file is None and (found.path or used.exists()):
        file = used  # what the run was started with
    begin = None
    if init_from is not None and found.path is None:
        begin = weights.find(init_from, peers)
    world = told.size if told else None
    run = cfg.resolve(preset, file, flags, world, model=begin.spec if begin else None)
    if begin is not None:
        weights.check(begin, run.model)
    loggers.check(run.train.log)
    path, facts = found.path, found.facts
    tune = run.batch.microbatches == cfg.AUTO and "microbatches" not in facts
    if run.batch.microbatches == cfg.AUTO:
        first = min(run.layout.pp, microbatches.most(run))
        run = microbatches.with_count(run, facts.get("microbatches", first))
    layout = assembly.layout_of(run)
    b = run.batch
    check([2] * b.sequences, b.microbatches * b.accumulation, layout.dp, layout.tp, b.policy)
    changes = resume.compare(path, facts, run, tune) if path else []
    notes = [f"resume   {change}" for change in changes]
    if tune:
        microbatches.check(run, facts.get("step", 0))

    device = launch.choose_device(run.train.device, told.local_size if told else layout.world)
    if run.train.offload_optimizer == cfg.AUTO:
        share, said = peers.tell("offload", host_share.choose(run, device))
        run, notes = host_share.with_share(run, share), [*notes, said]
    room.check(run, told.size if told else None, told.local_size if told else None, device)
    if speaks:  # a place that will not do is said before text is read for minutes
        folder.open(resume_how is not None)
    try:
        with _one_line(folder.path):
            corpus = _corpus(run, folder, found, speaks, begin)
    except BaseException:
        folder.abandon()
        raise
    if path and facts["step"] >= run.train.steps:
        done = f"{path}: step {facts['step']} of --steps {run.train.steps} is done"
        if resume_how != "auto":
            raise UsageError(f"{done}; give more --steps to go on")
        if speaks:
            print(f"{done}: nothing is left to do")
        return 0
    for note in notes if speaks else ():
        print(note, flush=True)
    manifest = found.manifest
    identity = manifest.run if manifest else peers.tell("run", secrets.token_hex(8))
    job = Job(run, folder, corpus, found, identity, tune, begin)
    describe = assembly.rank_names(layout)

    if told is not None:
        return launch.run_launched(told, device, _work, job, describe=describe)
    forward = Forward()
    try:
        code = launch.run_local(
            layout.world, device, _work, job, describe=describe, forward=forward
        )
    finally:
        sweep(folder.path / "checkpoints")
    return 128 + forward.signal if code > 128 and forward.signal else code


def _find(folder: Path, how: str, peers: resume.Peers) -> resume.Found:
    """The checkpoint to go on from; UsageError where there must be one, or none is good."""
    checkpoints = folder / "checkpoints"
    found = resume.newest(checkpoints, resume.identity(checkpoints), peers)
    if peers.rank == 0:
        for fault in found.passed:
            print(f"resume   passed over {fault}", flush=True)
    if found.path is not None and "imported" in found.facts:
        raise UsageError(
            f"{folder}: holds weights alone; --init-from {folder} begins with them in another --out"
        )
    if found.path is not None:
        return found
    if found.passed:
        more = f" (and {len(found.passed) - 1} more)" if len(found.passed) > 1 else ""
        raise UsageError(
            f"no checkpoint can be used: {found.passed[0]}{more}; give another --out, or remove "
            f"{checkpoints} to begin anew"
        )
    if how == "must":
        raise UsageError(
            f"{folder}: no checkpoint to resume from; give the run's --out, or --resume auto, "
            f"which begins anew where there is none"
        )
    if peers.rank == 0 and folder.is_dir():
        print(f"resume   no checkpoint in {folder}: the run begins anew", flush=True)
    return found


def _corpus(
    run: cfg.RunConfig,
    folder: RunFolder,
    found: resume.Found,
    speaks: bool,
    begin: weights.Weights | None,
):
    """The run's text in the tokens that the run's folder keeps; UsageError where it cannot be
    cut into the batches that are asked for, or is another than the checkpoint's."""
    from moekernels.data import mixture
    from moekernels.data.corpus import load_corpus
    from moekernels.data.sources import check_named
    from moekernels.data.tokenizer import find_tokenizer

    kept = folder.path / TOKENIZER
    tokenizer = begin.tokenizer if begin else None
    if found.path and kept.exists():
        tokenizer = kept
    elif run.batch.tokenizer:
        tokenizer = find_tokenizer(run.batch.tokenizer)
    sources = mixture.parse(run.batch.data)
    others = mixture.parse(run.batch.eval_data, "--eval-data") if run.batch.eval_data else None
    load = functools.partial(
        load_corpus,
        vocab_size=run.model.vocab_size,
        text_field=files.portable(run.batch.text_field),
        log=print if speaks else None,
    )
    if others:
        check_named([one.name for one in others])
    corpus = load(sources, tokenizer=tokenizer)
    if others:  # in the same tokens
        evaluation = load(others, tokenizer=corpus.folder / "tokenizer.json")
        corpus = dataclasses.replace(corpus, evaluation=evaluation)
    loader = assembly.build_loader(run, corpus)
    if found.path:
        loader.load_state_dict(found.facts["data"])
    if speaks:
        corpus.tokenizer.save(kept)
        if begin is not None:
            weights.keep_beside(begin, folder.path)
    return corpus


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """A file of the run's folder that cannot be written, a disk that is full: RunError."""
    try:
        yield
    except OSError as error:
        place = Path(os.fsdecode(error.filename or folder))
        if error.errno not in files.FULL and not (error.filename and folder in place.parents):
            raise
        raise RunError(files.no_room(place, error)) from error


def _work(env: launch.RankEnv, job: Job) -> int:
    """A rank's training; its exit code."""
    trainer = Trainer(env, job)
    failed = True
    try:
        with _one_line(job.folder.path):
            code = trainer.run_steps()
        failed = False
        return code
    finally:
        trainer.progress.close()
        trainer.log.close()
        trainer.checkpoints.close(failed)
