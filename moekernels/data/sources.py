"""Where text comes from: files, directories, JSONL, the standard library's own sources."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moekernels.errors import UsageError

STDLIB = "stdlib"
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_REMEDY = "name a UTF-8 text file, a directory of them, a .jsonl file, or stdlib"


@dataclass(frozen=True)
class TextFile:
    """A file that may hold text. A fault in a named one is the user's error, else it is skipped."""

    path: Path
    name: str  # relative to what the user named: the order of documents hangs on it
    named: bool


class _Unfit(Exception):
    """A file that yields no text: a reason to count it under, and the details for a message."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def list_files(source: str | Sequence[str]) -> list[TextFile]:
    """`stdlib`, or one or several files and directories -> their files, in a fixed order."""
    if not isinstance(source, str):
        files = [file for part in source for file in list_files(part)]
    elif source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _walk(root, lambda path: path.suffix == ".py", skip=_NOT_LIBRARY)
    elif os.path.isdir(source):
        files = _walk(Path(source), lambda path: True)
    else:
        files = [TextFile(Path(source), Path(source).name, named=True)]
    if not files:
        raise UsageError(f"data: there are no files in {source!r}; {_REMEDY}")
    return files


def _walk(root: Path, wanted, skip: set[str] = frozenset()) -> list[TextFile]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        files += [TextFile(p, p.relative_to(root).as_posix(), False) for p in paths if wanted(p)]
    return sorted(files, key=lambda file: file.name)


def fingerprint(files: list[TextFile]) -> str:
    """A hash over names and contents: equal text gives the same tokens, whatever the clock says."""
    digest = hashlib.sha256()
    for file in files:
        try:
            content = _read(file.path)
        except _Unfit as fault:
            _refuse_if_named(file, fault)
            content = b""
        digest.update(f"{file.name}\0{file.named}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def read_documents(files: list[TextFile], field: str = "text") -> tuple[list[str], dict[str, int]]:
    """All documents in the files' order, and how many files were skipped, by reason."""
    documents: list[str] = []
    skipped: dict[str, int] = {}
    for file in files:
        try:
            documents += _documents_of(file, field)
        except _Unfit as fault:
            _refuse_if_named(file, fault)
            skipped[fault.reason] = skipped.get(fault.reason, 0) + 1
    if not documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UsageError(f"data: no text in any of the {len(files)} files ({reasons}); {_REMEDY}")
    return documents, skipped


def _refuse_if_named(file: TextFile, fault: _Unfit) -> None:
    if file.named:
        where = f"data: {file.path} is {fault.reason}{fault.detail}"
        raise UsageError(f"{where}; {_REMEDY}") from None


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would hang
            raise _Unfit("not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise _Unfit("missing") from None
    except OSError as error:
        raise _Unfit("unreadable", f" ({error.strerror})") from None


def _documents_of(file: TextFile, field: str) -> list[str]:
    content = _read(file.path)
    if not content.strip():
        raise _Unfit("empty")
    if (zero := content.find(b"\0")) >= 0:
        raise _Unfit("binary", f" (a zero byte at offset {zero})")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise _Unfit("not UTF-8", f" (byte 0x{byte:02x} at offset {error.start})") from None
    if file.path.suffix != ".jsonl":
        return [text]
    documents = [
        _jsonl_text(line, number, field)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise _Unfit("empty", f" (every {field!r} is blank)")
    return documents


def _jsonl_text(line: str, number: int, field: str) -> str:
    reason = "not JSONL"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Unfit(reason, f" (line {number}: {error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise _Unfit(reason, f" (line {number}: an object was expected, got {type(row).__name__})")
    if not isinstance(row.get(field), str):
        got = type(row[field]).__name__ if field in row else "no such field"
        raise _Unfit(reason, f" (line {number}: {field!r} must be a string, got {got})")
    return row[field]
