"""Checkpoints: every rank writes the boxes of the full tensors that it is the first to hold, under
their full names, so that another layout loads them, each rank reading the slices that it holds now.

A step waits for the copy of its tensors to the CPU's memory only; the rest happens behind it. The
ranks meet in the folder: each leaves a note of what it has written, and rank 0, when all are
there, writes the manifest and renames. So a folder `step-<n>` is whole, or it is not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moekernels import jsonio
from moekernels.errors import RunError, UsageError
from moekernels.parallel.host import available
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import ShardInfo
from moekernels.train import manifest as manifests
from moekernels.train import shards
from moekernels.train.manifest import Box, Damaged, Manifest, Saved

FILE_BYTES = 1 << 30  # several files per rank are hashed at once, when written and when read
POLL_SECONDS = 0.02
ROOM = 0.5  # of the free memory, that the copies of a machine's ranks may take

State = Iterable[tuple[str, Tensor, ShardInfo]]


class Checkpoints:
    """The checkpoints of a run, in `<run>/checkpoints`. Ranks call every method together.

    `run`: its identity. `trusted`: folders that were verified, with their signatures.
    `local_ranks`: how many share this machine's memory.
    """

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        keep: int,
        *,
        run: str = "",
        trusted: dict[Path, tuple] | None = None,
        local_ranks: int = 1,
    ) -> None:
        self.folder, self.mesh, self.keep, self.run = folder, mesh, keep, run
        self.trusted, self.local_ranks = dict(trusted or {}), local_ranks
        if mesh.rank == 0:
            sweep(folder)
        self.token = _agreed_token(mesh)  # no note of an earlier attempt is taken for one of ours
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._partial: Path | None = None  # where the save under way is written
        self._given_up = threading.Event()

    def save(self, step: int, state: State, facts: dict) -> Path:
        """Begin to write `step-<step>`; older ones beyond `keep` go once it is whole.

        Waits for the save before it. RunError where that one could not be written.
        """
        self._own_part()
        own = [
            (name, info, piece, piece.of_local(local.detach()))
            for name, local, info in state
            if getattr(self.mesh, info.copies).rank == 0
            for piece in info.pieces
        ]
        manifest = Manifest(step, self.run, asdict(self.mesh.layout), facts, {}, {})
        partial = self.folder / f".partial-{manifests.step_name(step)}-{self.token}"
        if _fits(sum(x.numel() * x.element_size() for *_, x in own) * self.local_ranks):
            own = [
                (name, info, piece, x.to("cpu", copy=True).contiguous())
                for name, info, piece, x in own
            ]
            self._pending = self._worker.submit(self._write, partial, own, manifest)
        else:  # no memory for a copy: the step waits for the disk
            self._write_own(partial, own)
            self._pending = self._worker.submit(self._complete, partial, manifest)
        self._partial = partial
        return self.folder / manifests.step_name(step)

    def poll(self) -> None:
        """Raise what went wrong in the save under way, if that is known by now."""
        if self._pending is not None and self._pending.done():
            self._own_part()

    def wait(self) -> None:
        """Until the save under way is whole, on every rank; RunError where it cannot be."""
        self._own_part()
        while self._partial is not None and self._partial.exists():
            time.sleep(POLL_SECONDS)  # for rank 0 to rename it, which ends the run if it cannot

    def _own_part(self) -> None:
        """Until this rank's part of the save under way is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except BaseException:
                self._partial = None
                raise

    def close(self, failed: bool = False) -> None:
        """Finish the save under way; with `failed`, no longer wait for what other ranks write."""
        if failed:
            self._given_up.set()
        else:
            self.wait()
        self._worker.shutdown()

    def _write(self, partial: Path, own: list, manifest: Manifest) -> None:
        self._write_own(partial, own)
        self._complete(partial, manifest)

    def _write_own(self, partial: Path, own: list) -> None:
        """This rank's files, and the note that they are there."""
        parts: list[dict[str, Tensor]] = []
        places, room = [], 0
        for name, info, piece, x in own:
            size = x.numel() * x.element_size()
            if not parts or size > room:
                parts.append({})
                room = FILE_BYTES
            room -= size
            key = f"{name}@{','.join(map(str, piece.full))}"
            parts[-1][key] = x
            file = f"rank-{self.mesh.rank:05d}-{len(parts) - 1:03d}.safetensors"
            box = Box(file, key, piece.full, piece.size)
            places.append((name, str(x.dtype).removeprefix("torch."), info.full_shape, box))
        paths = [
            partial / f"rank-{self.mesh.rank:05d}-{i:03d}.safetensors" for i in range(len(parts))
        ]
        note = partial / f"note-{self.mesh.rank}.json"
        try:
            with shards.writing(partial):
                partial.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(min(manifests.HASH_THREADS, os.cpu_count() or 1)) as pool:
                written = list(pool.map(shards.write, paths, parts))
            data = jsonio.dumps(
                {
                    "files": {path.name: entry for path, entry in zip(paths, written)},
                    "boxes": [(*what, asdict(box)) for *what, box in places],
                }
            )
            with shards.writing(note, len(data)):
                note.with_suffix(".tmp").write_text(data, encoding="utf-8")
                note.with_suffix(".tmp").rename(note)
        except BaseException:  # make room; other ranks may still be writing theirs
            for path in (*paths, note, note.with_suffix(".tmp")):
                path.unlink(missing_ok=True)
            if self.mesh.world.size == 1:  # else it may be the folder that another just made
                with contextlib.suppress(OSError):
                    partial.rmdir()
            raise

    def _complete(self, partial: Path, manifest: Manifest) -> None:
        """Rank 0, when all notes are there: manifest, rename, prune."""
        if self.mesh.rank != 0:
            return
        notes = []
        for rank in range(self.mesh.world.size):
            path = partial / f"note-{rank}.json"
            while not path.exists():
                if self._given_up.wait(POLL_SECONDS):
                    return
            notes.append(json.loads(path.read_text(encoding="utf-8")))
            path.unlink()
        boxes: dict[str, list] = {}
        for name, dtype, shape, box in (entry for note in notes for entry in note["boxes"]):
            boxes.setdefault(name, [dtype, shape, []])[2].append(Box(**box))
        manifest.tensors.update(
            {
                name: Saved(dtype, tuple(shape), tuple(b))
                for name, (dtype, shape, b) in boxes.items()
            }
        )
        manifest.files.update({k: tuple(v) for note in notes for k, v in note["files"].items()})
        final = self.folder / manifests.step_name(manifest.step)
        try:
            with shards.writing(partial / manifests.MANIFEST):
                manifest.write(partial)
                _sync(partial)
                if not final.is_dir() and os.path.lexists(final):
                    raise RunError(f"{final}: is there and is no folder; take it out of the way")
                if final.exists():  # one that could not be used is in the way
                    old = self.folder / f".partial-old-{self.token}"
                    final.rename(old)
                    partial.rename(final)
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    partial.rename(final)
                _sync(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.trusted[final] = manifests.signature(final, manifest.files)
        self._prune(final)

    def _prune(self, written: Path) -> None:
        """Delete what is older than the `keep` newest that are verified: those count alone, so the
        last good one always stays, and so does the one just written."""
        good = 0
        for path in steps(self.folder):
            if good >= self.keep and path != written:
                shutil.rmtree(path, ignore_errors=True)
            elif self._good(path):
                good += 1

    def _good(self, path: Path) -> bool:
        """Whether it is whole and of this run; read again only if it changed since."""
        try:
            manifest = manifests.read(path)
            here = manifests.signature(path, manifest.files)
            if self.trusted.get(path) != here:
                self.trusted.pop(path, None)
                if manifest.run != self.run or manifests.fault(path, manifest):
                    return False
                self.trusted[path] = here
            return True
        except (Damaged, OSError):
            return False


def load(folder: Path, tensors: Mapping[str, Saved], state: State) -> None:
    """Fill the tensors of `state` in place from `tensors`, as verified files of a folder hold them;
    UsageError where not all of them are there."""
    state = list(state)
    for name, _, info in state:
        saved = tensors.get(name)
        if saved is None or saved.shape != info.full_shape:
            have = "is missing" if saved is None else f"has shape {list(saved.shape)}"
            raise UsageError(f"{folder}: {name} {have}, this model needs {list(info.full_shape)}")
    with shards.Reader(folder) as reader, torch.no_grad():
        for name, local, info in state:
            for piece in info.pieces:
                target = piece.of_local(local.detach())
                if not reader.fill(target, piece.full, tensors[name]):
                    raise UsageError(f"{folder}: {name}: a part of it was never written")


def steps(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdecimal() and p.name.isascii()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def sweep(folder: Path) -> None:
    """Remove what saves that came to no end have left."""
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def _agreed_token(mesh: Mesh) -> str:
    token = torch.tensor([secrets.randbits(62)], device=mesh.device)
    if mesh.world.size > 1:
        dist.broadcast(token, 0)
    return f"{token.item():016x}"


def _fits(size: int) -> bool:
    """Whether this machine has memory for a copy of so many bytes."""
    return size <= ROOM * available()


def _sync(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
