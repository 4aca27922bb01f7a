"""Weights to begin with: those of a Hugging Face folder, of what `import` made of one, or of a run.

Read by slices: a rank reads what it holds, and never a whole tensor of which it holds a part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from moekernels import files
from moekernels.errors import UsageError
from moekernels.model import tensors
from moekernels.model.decoder import DecoderSpec
from moekernels.parallel.average import EMA
from moekernels.parallel.shard import ShardInfo
from moekernels.train import checkpoint, folder, resume
from moekernels.train.manifest import Saved
from moekernels.train.metrics import TOKENIZER

MASTER, AVERAGE = "master.", f"{EMA}."
KINDS = {"model": MASTER, "ema": AVERAGE}  # of weights that a checkpoint holds, by what users say
SOURCE = "source"  # in a run's folder: what lay beside the weights that it began with


@dataclass(frozen=True)
class Weights:
    """spec: of the model that they are. tensors: our full name -> its boxes, in files of `path`.
    facts: of the checkpoint, where they are one's. beside: a folder with config.json and the like,
    where there is one. imported: whether the files are a Hugging Face folder's own."""

    named: Path  # as the user gave it
    path: Path
    spec: DecoderSpec
    tensors: dict[str, Saved] = field(repr=False)
    facts: dict = field(default_factory=dict, repr=False)
    beside: Path | None = None
    imported: bool = False
    files: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json that goes with them."""
        places = (self.named / TOKENIZER, *([self.beside / TOKENIZER] if self.beside else ()))
        return next((path for path in places if path.is_file()), None)


def find(path: Path, peers: resume.Peers | None = None, kind: str = "model") -> Weights:
    """The weights that a user names, or of a run their moving average (`kind` ema); UsageError
    where there are none that are whole."""
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give a Hugging Face folder, or a run's")
    if folder.is_folder(path):
        if kind != "model":
            raise UsageError(f"--weights {kind}: {path} is no run's folder; leave it out")
        hf = folder.read(path)
        return Weights(
            path, path, hf.spec, hf.tensors, {}, beside=path, imported=True, files=hf.files
        )
    found = resume.newest(path / "checkpoints", None, peers, purpose="weights")
    if found.path is None or found.manifest is None:
        why = f": {found.passed[0]}" if found.passed else ""
        raise UsageError(
            f"{path}: holds neither a model ({folder.CONFIG}) nor a whole checkpoint of a run{why}"
        )
    try:
        spec = DecoderSpec(**found.facts["run"]["model"])
    except (KeyError, TypeError):
        raise UsageError(f"{found.path}: does not say of which model it is") from None
    prefix = KINDS[kind]
    if kind == "ema" and not any(name.startswith(prefix) for name in found.manifest.tensors):
        raise UsageError(
            f"--weights {kind}: {found.path} has no moving average of its weights; leave it out, "
            f"or train with --ema"
        )
    held = {
        name.removeprefix(prefix): saved
        for name, saved in found.manifest.tensors.items()
        if name.startswith(prefix) or name.endswith(tensors.SELECTION_BIAS)
    }
    beside = path / SOURCE
    return Weights(
        path,
        found.path,
        spec,
        held,
        found.facts,
        beside if folder.is_folder(beside) else None,
        imported="imported" in found.facts,
        files=tuple(found.manifest.files),
    )


def load(weights: Weights, state: Iterable[tuple[str, Tensor, ShardInfo]]) -> None:
    """Fill the masters and selection biases of a checkpoint's `state` in place; what else it has
    (an optimiser's moments) begins anew. A bias that the weights have not stays as it is."""
    wanted = []
    for name, local, info in state:
        ours = name.removeprefix(MASTER)
        if ours == name and not (name.endswith(tensors.SELECTION_BIAS) and name in weights.tensors):
            continue
        wanted.append((ours, local, info))
    checkpoint.load(weights.path, weights.tensors, wanted)


def check(weights: Weights, model: DecoderSpec) -> None:
    """UsageError where a run's model is another one than its weights'."""
    here, there = asdict(model), asdict(weights.spec)
    for key, value in there.items():
        if here[key] != value and key not in resume.MODEL_MAY_CHANGE:
            raise UsageError(
                f"--init-from {weights.named}: its model.{key} is {value!r}, this run asks for "
                f"{here[key]!r}; leave that to the weights"
            )


def keep_beside(weights: Weights, run: Path) -> None:
    """Copy what lies beside the weights into a run's folder, for its export."""
    if weights.beside is None:
        return
    (run / SOURCE).mkdir(exist_ok=True)
    for name in folder.BESIDE:
        if name != folder.INDEX and (weights.beside / name).is_file():
            files.write(run / SOURCE / name, (weights.beside / name).read_bytes())
