"""`moekernels import`: a Hugging Face folder as a run that has not begun.

The checkpoint's files are the folder's own, copied as they are and hashed on the way; its manifest
says which of our boxes each key is. So nothing is converted, and nothing has to be turned back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from moekernels import files
from moekernels.errors import RunError, UsageError
from moekernels.model.layout import Layout
from moekernels.model.tensors import SELECTION_BIAS
from moekernels.run import files as cfg
from moekernels.train import folder, manifest, resume, shards
from moekernels.train.manifest import Manifest
from moekernels.train.metrics import TOKENIZER
from moekernels.train.report import count
from moekernels.train.weights import MASTER, SOURCE


def import_(source: Path, out: Path) -> int:
    """Make the run; the exit code."""
    if not source.is_dir():
        raise UsageError(f"{source}: no such folder; give a Hugging Face folder")
    check_place(out)
    found = folder.read(source)
    identity = secrets.token_hex(8)
    with building(out) as partial:
        step = partial / "checkpoints" / manifest.step_name(0)
        with shards.writing(step):
            step.mkdir(parents=True)
        with ThreadPoolExecutor(min(manifest.HASH_THREADS, os.cpu_count() or 1)) as pool:
            copied = pool.map(lambda name: shards.copy(source / name, step / name), found.files)
            written = dict(zip(found.files, copied))
        tensors = {
            name if name.endswith(SELECTION_BIAS) else MASTER + name: saved
            for name, saved in found.tensors.items()
        }
        facts = {"run": {"model": asdict(found.spec)}, "imported": found.family}
        Manifest(0, identity, asdict(Layout()), facts, written, tensors).write(step)
        resume.write_identity(step.parent, identity)
        (partial / SOURCE).mkdir()
        for name in folder.BESIDE:
            if (source / name).is_file():
                shards.copy(source / name, partial / SOURCE / name)
        for name in (TOKENIZER, "tokenizer_config.json"):
            if (source / TOKENIZER).is_file() and (source / name).is_file():
                shards.copy(source / name, partial / name)
        text = cfg.to_toml(cfg.RunConfig(model=found.spec), ("model",))
        files.write(partial / "config.toml", text)
    size = sum(size for size, _ in written.values())
    print(
        f"{out}: {found.family}, {count(found.spec.parameters_count())} parameters in "
        f"{found.dtype}, {size:,} bytes; train --init-from {out} begins with them"
    )
    return 0


def check_place(out: Path) -> None:
    """UsageError where a new folder cannot come to lie."""
    try:
        there = out.is_symlink() or out.exists()  # a link that leads nowhere, too
        if there and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out}: is there already; give another --out")
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be a folder: {error.strerror}; give another --out"
        ) from None


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder that is filled beside its place, and renamed when whole; gone where it is not."""
    place = Path(os.path.realpath(out))  # a link stays, what it leads to is filled
    partial = place.parent / f".partial-{place.name}-{secrets.token_hex(4)}"
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be a folder: {error.strerror}; give another --out"
        ) from None
    try:
        yield partial
        partial.rename(place)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(error, OSError):
            raise RunError(files.no_room(Path(error.filename or out), error)) from error
        raise
