"""Checkpoints by torch.distributed.checkpoint: every rank writes its pieces of the full tensors,
under their full names.

Another layout therefore loads them, each rank reading the pieces that it holds now. A checkpoint
is written beside its place and renamed when all of it is on the disk, so a folder `step-<n>` is
whole or it is not there; its list of sizes finds one that was damaged later.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moekernels import jsonio
from moekernels.errors import UsageError
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import ShardInfo

FACTS = "checkpoint.json"
State = list[tuple[str, Tensor, ShardInfo]]


class _SavePlanner(DefaultSavePlanner):
    """Writes the pieces of which this rank is the first holder."""

    def __init__(self, state: State, mesh: Mesh) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {}
        for name, local, info in state:
            if getattr(mesh, info.copies).rank == 0:
                for piece in info.pieces:
                    index = MetadataIndex(name, torch.Size(piece.full))
                    self.pieces[index] = (local.detach(), info, piece)

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(piece.full), torch.Size(piece.size)),
                    properties=TensorProperties(dtype=local.dtype),
                    size=torch.Size(info.full_shape),
                ),
            )
            for index, (local, info, piece) in self.pieces.items()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        local, _, piece = self.pieces[MetadataIndex(index.fqn, index.offset)]
        return piece.of_local(local).contiguous()


class _LoadPlanner(DefaultLoadPlanner):
    """Reads the pieces that this rank holds, out of whichever pieces were written."""

    def __init__(self, state: State) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.state = state
        self.targets = {
            (name, torch.Size(piece.full)): piece.of_local(local.detach())
            for name, local, info in state
            for piece in info.pieces
        }

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, _, info in self.state:
            saved = self.metadata.state_dict_metadata[name]
            wanted = [
                ChunkStorageMetadata(torch.Size(p.full), torch.Size(p.size)) for p in info.pieces
            ]
            items += create_read_items_for_chunk_list(name, saved, wanted)
        return LoadPlan(items)

    def resolve_tensor(self, read_item) -> Tensor:
        target = self.targets[read_item.dest_index.fqn, read_item.dest_index.offset]
        spans = zip(read_item.dest_offsets, read_item.lengths)
        return target[tuple(slice(begin, begin + length) for begin, length in spans)]

    def commit_tensor(self, read_item, tensor) -> None:
        """Nothing is left to do: what was read was copied into a view of its target."""


class Checkpoints:
    """The checkpoints of a run, in `<run>/checkpoints`. Ranks call `save` and `load` together."""

    def __init__(self, folder: Path, mesh: Mesh, keep: int) -> None:
        self.folder, self.mesh, self.keep = folder, mesh, keep

    def save(self, step: int, state: Iterable[tuple[str, Tensor, ShardInfo]], facts: dict) -> Path:
        """Write `step-<step>`; older ones beyond `keep` go once it is whole."""
        final = self.folder / f"step-{step:07d}"
        partial = self.folder / f".partial-{final.name}"
        first = self.mesh.rank == 0
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        self._together()
        with _quietly():
            dcp.save(
                {},
                storage_writer=FileSystemWriter(partial, sync_files=True),
                planner=_SavePlanner(list(state), self.mesh),
                no_dist=self.mesh.world.size == 1,
            )
        if first:
            sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
            with open(partial / FACTS, "w") as file:
                file.write(jsonio.dumps({"step": step, **facts, "sizes": sizes}))
                file.flush()
                os.fsync(file.fileno())
            _sync(partial)
            shutil.rmtree(
                final, ignore_errors=True
            )  # only one that was not whole can be in the way
            partial.rename(final)
            _sync(self.folder)
            for old in _steps(self.folder)[self.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def load(self, path: Path, state: Iterable[tuple[str, Tensor, ShardInfo]]) -> None:
        """Fill the tensors of `state` in place; UsageError where the checkpoint has not all of
        them."""
        state, reader = list(state), FileSystemReader(path)
        saved = reader.read_metadata().state_dict_metadata
        for name, _, info in state:
            if name not in saved or tuple(saved[name].size) != info.full_shape:
                have = f"has shape {list(saved[name].size)}" if name in saved else "is missing"
                raise UsageError(f"{path}: {name} {have}, this model needs {list(info.full_shape)}")
        with _quietly():
            dcp.load(
                {},
                storage_reader=reader,
                planner=_LoadPlanner(state),
                no_dist=self.mesh.world.size == 1,
            )

    def _together(self) -> None:
        if self.mesh.world.size > 1:
            dist.barrier()


def newest_whole(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint whose files are all there in full, and its facts."""
    for path in _steps(folder):
        try:
            facts = json.loads((path / FACTS).read_text())
            if all((path / name).stat().st_size == size for name, size in facts["sizes"].items()):
                return path, facts
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    return None


def check_model(path: Path, facts: dict, model: dict) -> None:
    """Refuse a checkpoint of another model, naming the first key that differs."""
    for key, here in model.items():
        there = facts.get("model", {}).get(key)
        if there != here:
            raise UsageError(
                f"{path}: the checkpoint was saved with model.{key} = {there!r}, this run has "
                f"{here!r}; "
                "give the same model, or another --out"
            )


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


@contextlib.contextmanager
def _quietly():
    """Without torch's remark that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _sync(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
