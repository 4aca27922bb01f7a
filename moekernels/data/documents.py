"""Documents read where they lie: no more of the text is in memory than is being worked on."""

from __future__ import annotations

import codecs
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedIOBase

import numpy as np

from moekernels.data.sources import (
    REMEDY,
    TextFile,
    Unfit,
    is_jsonl,
    is_packed,
    open_file,
    refuse_if_named,
    unreadable,
)
from moekernels.data.tokenizer import Tokenizer
from moekernels.errors import UsageError

_BLOCK = 1 << 20  # bytes read at once
_BOM = codecs.BOM_UTF8
_OPEN_FILES = 16


@dataclass
class Documents:
    """All documents of some files, in the files' order: where each lies, not what it says."""

    files: list[TextFile]
    text_field: str  # of a JSONL row
    file: np.ndarray  # [D] int64, into files
    offset: np.ndarray  # [D] int64, where a JSONL row begins
    characters: np.ndarray  # [D] int64
    skipped: dict[str, int]  # files that hold no text, by reason
    states: dict[int, tuple[int, int]]  # file -> (size, mtime) when it was surveyed
    _open: dict[int, BufferedIOBase] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.file)

    def parts(self, number: int) -> Iterator[str]:
        """The text of a document, piece by piece."""
        index = int(self.file[number])
        handle = self._handle(index)
        if is_jsonl(self.files[index].path):
            handle.seek(int(self.offset[number]))
            yield _row_text(handle.readline(), 0, self.text_field)
        else:
            handle.seek(0)
            yield from _decoded(handle)

    def encoded(
        self, order: np.ndarray, tokenizer: Tokenizer, dtype: np.dtype
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Documents in that order -> (its place there, tokens), piece by piece; behind each the end
        of text."""
        return tokenizer.encode_documents(map(self.parts, order), dtype)

    def text(self, number: int) -> str:
        return "".join(self.parts(number))

    def beginning(self, number: int, count: int) -> str:
        """The first `count` characters."""
        found, size = [], 0
        for part in self.parts(number):
            found.append(part)
            size += len(part)
            if size >= count:
                break
        return "".join(found)[:count]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _handle(self, index: int) -> BufferedIOBase:
        if index not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            handle = self._open[index] = open_file(self.files[index])
            if _state(self.files[index], handle) != self.states[index]:
                raise UsageError(
                    f"data: {self.files[index].path} was changed while it was read; start again "
                    "when nobody writes to it"
                )
        return self._open[index]


def survey(
    files: list[TextFile], field: str = "text", tell: Callable[[int], None] = lambda size: None
) -> Documents:
    """Read every file once: what is text, how long it is, where its documents begin. `tell` hears
    of the bytes that were read."""
    file, offset, characters = array("q"), array("q"), array("q")
    skipped: dict[str, int] = {}
    states: dict[int, tuple[int, int]] = {}
    for index, one in enumerate(files):
        try:
            with open_file(one) as handle:
                states[index] = _state(one, handle)
                found = _rows(handle, field) if is_jsonl(one.path) else [(0, _inspect(handle))]
        except (Unfit, OSError) as error:
            fault = error if isinstance(error, Unfit) else unreadable(error)
            refuse_if_named(one, fault)
            skipped[fault.reason] = skipped.get(fault.reason, 0) + 1
            continue
        for place, size in found:
            file.append(index)
            offset.append(place)
            characters.append(size)
        tell(states[index][0])
    if not file:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UsageError(f"data: no text in any of the {len(files)} files ({reasons}); {REMEDY}")
    f, o, c = (np.array(column, dtype=np.int64) for column in (file, offset, characters))
    return Documents(files, field, f, o, c, skipped, states)


def _state(file: TextFile, handle: BufferedIOBase) -> tuple[int, int]:
    status = os.stat(file.path) if is_packed(file.path) else os.fstat(handle.fileno())
    return status.st_size, status.st_mtime_ns


def _blocks(handle: BufferedIOBase) -> Iterator[bytes]:
    while block := handle.read(_BLOCK):
        yield block


def _decoded(handle: BufferedIOBase) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    for block in _blocks(handle):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _inspect(handle: BufferedIOBase) -> int:
    """Characters of a file; Unfit where it is blank, binary or no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    count = offset = 0
    blank, fault = True, None
    for block in _blocks(handle):
        blank = blank and not block.strip()
        if (zero := block.find(b"\0")) >= 0:
            raise Unfit("binary", f" (a zero byte at offset {offset + zero})")
        if fault is None:
            pending = len(decoder.getstate()[0])
            try:
                count += len(decoder.decode(block))
            except UnicodeDecodeError as error:  # a zero byte may still tell what the file is
                fault = _not_utf8(error.object[error.start], offset - pending + error.start)
        offset += len(block)
    if blank:
        raise Unfit("empty")
    if fault is None and (rest := decoder.getstate()[0]):
        fault = _not_utf8(rest[0], offset - len(rest))
    if fault is not None:
        raise fault
    return count


def _not_utf8(byte: int, offset: int) -> Unfit:
    return Unfit("not UTF-8", f" (byte 0x{byte:02x} at offset {offset})")


def _rows(handle: BufferedIOBase, field: str) -> Iterable[tuple[int, int]]:
    """(offset, characters) of every row that is not blank."""
    _inspect(handle)
    handle.seek(0)
    found = array("q")
    offset = 0
    for number, line in enumerate(handle, start=1):
        if line.strip() and line.strip() != _BOM:
            text = _row_text(line, number, field)
            if text.strip():
                found.extend((offset, len(text)))
        offset += len(line)
    if not found:
        raise Unfit("empty", f" (every {field!r} is blank)")
    return zip(found[::2], found[1::2])


def _row_text(line: bytes, number: int, field: str) -> str:
    reason = "not JSONL"
    try:
        row = json.loads(line.removesuffix(b"\n").decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise Unfit(reason, f" (line {number}: {error.msg} at column {error.colno})") from None
    except ValueError:  # Python converts no more digits than this
        raise Unfit(reason, f" (line {number}: a number of thousands of digits)") from None
    except RecursionError:
        raise Unfit(reason, f" (line {number}: nested too deeply)") from None
    if not isinstance(row, dict):
        raise Unfit(reason, f" (line {number}: an object was expected, got {type(row).__name__})")
    if not isinstance(row.get(field), str):
        got = type(row[field]).__name__ if field in row else "no such field"
        raise Unfit(reason, f" (line {number}: {field!r} must be a string, got {got})")
    try:
        row[field].encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(row[field][error.start]):04x}"
        raise Unfit(
            reason, f" (line {number}: {half} at character {error.start} is half a character)"
        ) from None
    return row[field]
