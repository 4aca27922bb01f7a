"""Files of a checkpoint: safetensors, written as a stream that is hashed, read by slices.

The library's own writer takes a whole file's tensors at once and gives no hash; its reader maps a
file, so that a slice costs its own bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekernels import files, jsonio
from moekernels.errors import RunError, UsageError
from moekernels.train.manifest import Box, Saved

if TYPE_CHECKING:
    from safetensors import safe_open

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
Entry = tuple[str, torch.dtype, tuple[int, ...]]  # key, dtype, shape
BLOCK = 1 << 24  # bytes hashed and written at a time


@contextlib.contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """A failed write of `size` bytes becomes one line: which file, why, and how much is missing.
    What was written of it is removed first."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise RunError(files.no_room(path, error, size)) from error


def write(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write CPU tensors to a new file, down to the disk; its length and sha256."""
    # Wide elements first: each then begins on a multiple of its own size.
    items = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    return write_each(path, [(k, x.dtype, tuple(x.shape)) for k, x in items], tensors.__getitem__)


def write_each(
    path: Path,
    entries: Sequence[Entry],
    produce: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> tuple[int, str]:
    """The same for tensors that are made one by one, in the order of `entries`: no more than one
    is held. The header is spelt as the safetensors library spells it."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for key, dtype, shape in entries:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    head = jsonio.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    digest, size = hashlib.sha256(), 8 + len(head) + end
    with writing(path, size), open(path, "xb") as file:
        for data in _blocks(len(head).to_bytes(8, "little") + head, entries, produce):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _blocks(
    head: bytes, entries: Sequence[Entry], produce: Callable[[str], Tensor]
) -> Iterator[memoryview]:
    yield memoryview(head)
    for key, dtype, shape in entries:
        x = produce(key)
        if x.dtype != dtype or tuple(x.shape) != shape:
            raise ValueError(f"{key}: announced as {dtype} {shape}, is {x.dtype} {tuple(x.shape)}")
        data = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(data), BLOCK):
            yield data[begin : begin + BLOCK]


def copy(source: Path, target: Path) -> tuple[int, str]:
    """Copy a file to a new one, down to the disk, hashed on its way; its length and sha256."""
    digest, size = hashlib.sha256(), 0
    with open(source, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        with writing(target, length), open(target, "xb") as out:
            while block := file.read(BLOCK):
                digest.update(block)
                out.write(block)
                size += len(block)
            out.flush()
            os.fsync(out.fileno())
    if size != length:
        raise RunError(f"{source}: was changed while it was read; start again when it rests")
    return size, digest.hexdigest()


class Reader:
    """Slices of full tensors out of a checkpoint's files, each opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._stack = folder, contextlib.ExitStack()
        self._files: dict[str, safe_open] = {}

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
            found = self._files[box.file].get_slice(box.key)
            if box.form:
                return _formed(found, box, spans)
            inside = len(found.get_shape())  # a box may have leading ones that its key has not
            part = found[tuple(spans[len(spans) - inside :])]
            return part.reshape(*[1] * (len(spans) - inside), *part.shape)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path}: cannot be read: {error}") from None


def _formed(found, box: Box, spans: list[slice]) -> Tensor:
    """The spans of a box [E, 2F, ...] that lies transposed [E, ..., 2F] or with gate and up by
    turns in its file, or both."""
    experts, rows, *rest = spans

    def read(part: slice) -> Tensor:
        if "transposed" in box.form:
            return found[(experts, *rest, part)].mT
        return found[(experts, part, *rest)]

    if "interleaved" not in box.form:
        return read(rows)
    half, parts = box.size[1] // 2, []
    for number in (0, 1):
        low, high = max(rows.start, number * half), min(rows.stop, (number + 1) * half)
        if low < high:
            both = read(slice(2 * (low - number * half), 2 * (high - number * half)))
            parts.append(both[:, number::2])
    return torch.cat(parts, dim=1)
