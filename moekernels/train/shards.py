"""Files of a checkpoint: safetensors, written as a stream that is hashed on its way, read by
slices.

The library's own writer takes a whole file's tensors at once and gives no hash; its reader maps a
file, so that a slice costs its own bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moekernels import jsonio
from moekernels.errors import RunError, UsageError
from moekernels.train.manifest import Box, Saved

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
BLOCK = 1 << 24  # bytes hashed and written at a time
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """A failed write of `size` bytes becomes one line: which file, why, and how much is missing.
    What was written of it is removed first."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise RunError(no_room(path, error, size)) from error


def no_room(path: Path, error: OSError, size: int | None = None) -> str:
    """The one line: which file, why, and where the disk is full how much is missing."""
    text = f"{path}: cannot be written: {error.strerror}"
    if error.errno in FULL:
        folder = next(p for p in path.absolute().parents if p.exists())
        needs = "" if size is None else f"it needs {size:,} bytes, "
        text += f"; {needs}{shutil.disk_usage(folder).free:,} are free"
    return f"{text}; make room, or give another --out"


def write(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write CPU tensors to a new file, down to the disk; its length and sha256."""
    # Wide elements first: each then begins on a multiple of its own size.
    items = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, end = {}, 0
    for key, x in items:
        begin, end = end, end + x.numel() * x.element_size()
        header[key] = {
            "dtype": NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [begin, end],
        }
    head = jsonio.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest, size = hashlib.sha256(), 8 + len(head) + end
    with writing(path, size), open(path, "xb") as file:
        for data in _blocks(len(head).to_bytes(8, "little") + head, (x for _, x in items)):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _blocks(head: bytes, tensors: Iterator[Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for x in tensors:
        data = memoryview(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for begin in range(0, len(data), BLOCK):
            yield data[begin : begin + BLOCK]


class Reader:
    """Slices of full tensors out of a checkpoint's files, each opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._files, self._stack = folder, {}, contextlib.ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def fill(self, target: Tensor, begin: Sequence[int], saved: Saved) -> bool:
        """Copy the box at `begin` of a full tensor, as large as `target`, into it; whether all of
        it was there."""
        covered = 0
        for box in saved.boxes:
            low = [max(a, b) for a, b in zip(begin, box.begin)]
            ends = zip(begin, target.shape, box.begin, box.size)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if all(a < b for a, b in zip(low, high)):
                part = self._slice(
                    box, [slice(a - o, b - o) for a, b, o in zip(low, high, box.begin)]
                )
                target[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin))] = part
                covered += part.numel()
        return covered == target.numel()

    def _slice(self, box: Box, spans: list[slice]) -> Tensor:
        from safetensors import SafetensorError, safe_open

        path = self.folder / box.file
        try:
            if box.file not in self._files:
                self._files[box.file] = self._stack.enter_context(safe_open(path, "pt"))
            return self._files[box.file].get_slice(box.key)[tuple(spans)]
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path}: cannot be read: {error}") from None
