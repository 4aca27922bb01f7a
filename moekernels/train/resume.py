"""From which checkpoint a run goes on, and whether that is the same run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from moekernels import files, jsonio
from moekernels.errors import RunError, UsageError
from moekernels.parallel.adamw import AdamWConfig
from moekernels.run import files as cfg
from moekernels.run.sections import SECTIONS
from moekernels.train import manifest as manifests
from moekernels.train.checkpoint import steps
from moekernels.train.manifest import Damaged, Manifest

T = TypeVar("T")
RUN = "run.json"


class Peers(Protocol):
    """The processes that decide together, before torch.distributed is up."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def tell(self, key: str, value: T) -> T:
        """Rank 0's value (JSON), on every rank."""

    def first(self, key: str, text: str | None) -> str | None:
        """Any rank's text, on every rank; None where none has one."""


class Alone:
    """One process, which starts the ranks later."""

    rank, size = 0, 1

    def tell(self, key: str, value: T) -> T:
        return value

    def first(self, key: str, text: str | None) -> str | None:
        return text


@dataclass(frozen=True)
class Found:
    """A checkpoint that was verified, both parts of it, or None; `passed`: newer ones that were
    not good, and why."""

    path: Path | None
    manifest: Manifest | None
    passed: tuple[str, ...] = ()

    @property
    def facts(self) -> dict:
        return {} if self.manifest is None else {"step": self.manifest.step, **self.manifest.facts}

    @property
    def trusted(self) -> dict[Path, tuple]:
        if self.path is None or self.manifest is None:
            return {}
        return {self.path: manifests.signature(self.path, self.manifest.files)}


def newest(
    folder: Path, run: str | None = None, peers: Peers | None = None, purpose: str = "resume"
) -> Found:
    """The newest checkpoint of this run that is whole; every file is read and hashed, in parts by
    all peers.

    `run`: the identity that it must have; None: whichever. `purpose`: what the peers' words are
    kept apart by.
    """
    peers = peers or Alone()
    passed: list[str] = []
    names = peers.tell(f"{purpose}/steps", [path.name for path in steps(folder)])
    for number, name in enumerate(names):
        path = folder / name
        manifest, fault = _read(path, run)
        digest = peers.tell(f"{purpose}/digest/{number}", manifest.digest if manifest else None)
        if manifest is not None and digest != manifest.digest:
            fault = f"{manifests.MANIFEST}: is another one on rank {peers.rank}"
        elif manifest is not None:
            fault = manifests.contents_fault(path, manifest, peers.rank, peers.size)
        fault = peers.first(f"{purpose}/fault/{number}", fault)
        if fault is None:
            return Found(path, manifest, tuple(passed))
        passed.append(f"{path}: {fault}")
    return Found(None, None, tuple(passed))


def _read(path: Path, run: str | None) -> tuple[Manifest | None, str | None]:
    """The manifest of a checkpoint of this run whose files have their lengths, or what is wrong."""
    try:
        manifest = manifests.read(path)
    except Damaged as damage:
        return None, str(damage)
    if run is not None and manifest.run != run:
        return None, f"{manifests.MANIFEST}: is of run {manifest.run}, {RUN} says {run}"
    fault = manifests.lengths_fault(path, manifest)
    return (manifest, None) if fault is None else (None, fault)


def identity(folder: Path) -> str | None:
    """Of the run whose checkpoints lie in `folder`; None where it is not known (any more)."""
    try:
        value = json.loads(files.read(folder / RUN))["id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def write_identity(folder: Path, value: str) -> None:
    path, text = folder / RUN, jsonio.dumps({"id": value}) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(path, text)
    except OSError as error:
        raise RunError(files.no_room(path, error, len(text))) from error


# What a checkpoint may go on under with another value, and a word is due; the rest of [model]
# decides what its tensors mean.
MODEL_MAY_CHANGE = (
    "balance_coef",
    "balance_scope",
    "z_coef",
    "bias_update_rate",
    "init_std",
    "embedding_std",
    "recompute_experts",
    "fp8_experts",
)
# Of [train]: what no number of the run depends on.
NO_MATTER = (
    "eval_every",
    "eval_sequences",
    "save_every",
    "keep",
    "weights_at_once",
    "exchange",
    "exchange_parts",
    "exchange_buffers",
    "link",
    "replan",
    "offload_optimizer",
    "eval_weights",
)
TOLD_APART = {"batch": ("microbatches", "accumulation"), "train": ("steps", *NO_MATTER)}


def compare(path: Path, facts: dict, run: cfg.RunConfig, tune: bool = False) -> list[str]:
    """What the run does otherwise than the one that saved the checkpoint, a line each.

    UsageError, naming the key, where the tensors would mean something else. `tune`: the number of
    microbatches is not known yet.
    """
    then, notes = facts.get("run", {}), []
    for section in cfg.FLAG_SECTIONS:
        now, before = asdict(getattr(run, section)), {}
        for key, value in then.get(section, {}).items():
            before[key] = files.native(value) if isinstance(value, str) else value
        changed = [key for key in now if key in before and before[key] != now[key]]
        for key in changed:
            flag = "--" + cfg.flag_of(SECTIONS[section], key)
            if section == "model" and key not in MODEL_MAY_CHANGE:
                raise UsageError(
                    f"{path}: the checkpoint was saved with model.{key} = {before[key]!r}, this "
                    f"run has {now[key]!r}; give the same model, or another --out"
                )
            if key == "tokenizer":
                raise UsageError(
                    f"{path}: the checkpoint was saved with {flag} {before[key]!r}, this run has "
                    f"{now[key]!r}; a run keeps its tokens: leave it out, or give another --out"
                )
            if section == "train" and key == "optimizer":
                raise UsageError(
                    f"{path}: the checkpoint was saved with {flag} {before[key]}, this run has "
                    f"{now[key]}, which keeps other moments; give the same, or begin another --out "
                    f"with its weights by --init-from"
                )
            if section == "layout" or key in TOLD_APART.get(section, ()):
                continue
            notes.append(
                f"{flag} was {before[key]!r} when the checkpoint was saved, is {now[key]!r}"
            )
        if section == "layout" and changed:
            was, now_ = (", ".join(f"{k} {x[k]}" for k in changed) for x in (before, now))
            effect = _of_another_split(run) if "dp" in changed else TO_ROUNDING
            notes.append(f"the layout was {was}, is {now_}: {effect}")
    if "batch" in then:
        was, count = (
            b["microbatches"] * b["accumulation"] for b in (then["batch"], asdict(run.batch))
        )
        if was != count and not tune:
            effect = _of_another_split(run)
            notes.append(f"a step had {was} microbatches, has {count}: {effect}")
    if "train" in then and then["train"]["steps"] != run.train.steps:
        notes.append(_longer(facts["step"] + 1, then["train"], asdict(run.train)))
    return notes


TO_ROUNDING = "sums run in another order, so losses agree to rounding, not bit for bit"


def _of_another_split(run: cfg.RunConfig) -> str:
    """What other tokens in each microbatch change."""
    if run.model.balance_coef == 0 or run.model.balance_scope == "sequence":
        return TO_ROUNDING
    return (
        "the load-balancing loss of a microbatch is another one; --balance-scope sequence has one "
        "that does not depend on it"
    )


def _longer(step: int, then: dict, now: dict) -> str:
    rates = [AdamWConfig.of(x).lr_at(step) for x in (then, now)]
    return (
        f"--steps was {then['steps']}, is {now['steps']}: the learning rate follows the new "
        f"length, {rates[1]:.3g} at step {step} where it was {rates[0]:.3g}"
    )
