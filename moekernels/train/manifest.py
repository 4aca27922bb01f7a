"""What a checkpoint says of itself: step, run, layout, facts, every file's length and hash, and
where each tensor's boxes lie in them.

`manifest.json` is written last; `manifest.sha256` holds its own hash, as `sha256sum -c` reads it.
Nothing here is ever unpickled, and nothing of a checkpoint is used that was not hashed before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moekernels import jsonio

FORMAT = 1  # raise it when a reader of today could not read the files
MANIFEST, DIGEST = "manifest.json", "manifest.sha256"
HASH_THREADS = 4  # hashlib lets other threads run meanwhile


class Damaged(Exception):
    """A checkpoint that cannot be used: the file, and why."""


@dataclass(frozen=True)
class Box:
    """A part of a tensor, `key` of a safetensors file."""

    file: str
    key: str
    begin: tuple[int, ...]
    size: tuple[int, ...]
    form: str = ""  # how it lies there, where not as it is: transposed, interleaved


@dataclass(frozen=True)
class Saved:
    """A full tensor: its boxes cover it, each element once."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Manifest:
    step: int
    run: str  # identity of the run that wrote it
    layout: dict[str, int]
    facts: dict
    files: dict[str, tuple[int, str]]  # name -> (bytes, sha256)
    tensors: dict[str, Saved] = field(repr=False)
    digest: str = ""  # of manifest.json itself

    def write(self, folder: Path) -> Manifest:
        """Put it into a folder whose other files are on the disk; the manifest with its digest."""
        body = {"format": FORMAT, **asdict(self)}
        del body["digest"]
        data = jsonio.dumps(body).encode()
        digest = hashlib.sha256(data).hexdigest()
        for name, content in ((MANIFEST, data), (DIGEST, f"{digest}  {MANIFEST}\n".encode())):
            with open(folder / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        return Manifest(**{**self.__dict__, "digest": digest})


def read(folder: Path) -> Manifest:
    """The manifest of `step-<n>`, whose own hash holds; Damaged where it does not or is not of
    that step."""
    data = _bytes_of(folder / MANIFEST)
    digest = hashlib.sha256(data).hexdigest()
    if _bytes_of(folder / DIGEST) != f"{digest}  {MANIFEST}\n".encode():
        raise Damaged(f"{MANIFEST}: its hash is not the one in {DIGEST}")
    try:
        body = json.loads(data)
        if (version := body.pop("format")) != FORMAT:
            raise Damaged(f"{MANIFEST}: has format {version}, this release reads format {FORMAT}")
        tensors = {
            name: Saved(
                x["dtype"],
                tuple(x["shape"]),
                tuple(
                    Box(b["file"], b["key"], tuple(b["begin"]), tuple(b["size"]), b.get("form", ""))
                    for b in x["boxes"]
                ),
            )
            for name, x in body.pop("tensors").items()
        }
        files = {name: (int(size), str(hash_)) for name, (size, hash_) in body.pop("files").items()}
        kinds = {"step": int, "run": str, "layout": dict, "facts": dict}
        if wrong := [k for k, kind in kinds.items() if type(body.get(k)) is not kind]:
            raise Damaged(f"{MANIFEST}: {wrong[0]} is {body.get(wrong[0])!r}")
        plain = all(Path(name).name == name for name in files)
        known = all(box.file in files for x in tensors.values() for box in x.boxes)
        if not (plain and known):
            raise Damaged(f"{MANIFEST}: names files that are not the checkpoint's")
        manifest = Manifest(**body, files=files, tensors=tensors, digest=digest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST}: is no manifest ({type(error).__name__})") from None
    if folder.name != step_name(manifest.step):
        raise Damaged(f"{MANIFEST}: is of step {manifest.step}")
    return manifest


def step_name(step: int) -> str:
    return f"step-{step:07d}"


def lengths_fault(folder: Path, manifest: Manifest) -> str | None:
    """`<file>: <why>` of the first file that is missing or has another length; costs no reading."""
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name}: {'is no file' if path.exists() else 'is missing'}"
        if (here := path.stat().st_size) != size:
            return f"{name}: has {here} bytes of {size}"
    return None


def contents_fault(folder: Path, manifest: Manifest, part: int = 0, of: int = 1) -> str | None:
    """`<file>: <why>` of the first file with other contents, among every `of`-th file."""
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name][0], name))[part::of]
    with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as pool:
        faults = pool.map(lambda name: _content_fault(folder / name, *manifest.files[name]), names)
        return next((fault for fault in faults if fault), None)


def fault(folder: Path, manifest: Manifest) -> str | None:
    return lengths_fault(folder, manifest) or contents_fault(folder, manifest)


def signature(folder: Path, names: Iterable[str]) -> tuple:
    """Changes when a file does: what was verified under it need not be read again."""
    found = [(folder / name).stat() for name in sorted((*names, MANIFEST, DIGEST))]
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in found)


def _content_fault(path: Path, size: int, expected: str) -> str | None:
    try:
        with open(path, "rb") as file:
            here = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None if here == expected else f"{path.name}: its contents changed (sha256)"


def _bytes_of(path: Path) -> bytes:
    if not path.is_file():  # reading a pipe would wait for ever
        raise Damaged(f"{path.name}: {'is no file' if path.exists() else 'is missing'}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from None
