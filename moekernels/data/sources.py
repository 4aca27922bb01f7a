"""Where text comes from: files, directories, JSONL, the standard library's own sources."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib
import os
import shutil
import sysconfig
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO

from moekernels import jsonio
from moekernels.errors import UsageError

STDLIB = "stdlib"
JSONL = (".jsonl", ".ndjson")
PACKED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
REMEDY = "name a UTF-8 text file, a directory of them, a .jsonl file, or stdlib"


@dataclass(frozen=True)
class TextFile:
    """A file that may hold text. A fault in a named one is the user's error, else it is skipped."""

    path: Path
    name: str  # relative to what the user named: the order of documents hangs on it
    named: bool
    fault: str = ""  # why it is to be skipped, known without reading it
    source: int = 0  # which of several sources it belongs to


class Unfit(Exception):
    """A file that yields no text: a reason to count it under, and the details for a message."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def is_packed(path: Path) -> bool:
    """Whether what a file holds has to be taken out of it first, by its name."""
    return path.suffix.lower() in PACKED + TABLES


def is_jsonl(path: Path) -> bool:
    """Whether it holds rows; those of tables are taken out as JSONL."""
    if path.suffix.lower() in TABLES:
        return True
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower() in JSONL


def list_files(source: str | Sequence[str]) -> list[TextFile]:
    """`stdlib`, or one or several files and directories -> their files, in a fixed order."""
    if not isinstance(source, str):
        files = [
            dataclasses.replace(file, source=number)
            for number, part in enumerate(source)
            for file in list_files(part)
        ]
    elif source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _walk(root, lambda path: path.suffix == ".py", skip=_NOT_LIBRARY)
    elif os.path.isdir(source):
        files = _walk(Path(source), lambda path: True)
    elif not source:
        raise UsageError(f"data: the name is empty; {REMEDY}")
    else:
        first, *rest = _pair(Path(source))
        files = [TextFile(first, first.name, named=True)]
        files += [TextFile(path, path.name, named=False) for path in rest]
    if not files:
        raise UsageError(f"data: there are no files in {source!r}; {REMEDY}")
    return files


def _pair(path: Path) -> list[Path]:
    """Megatron's .idx and .bin, where either is named or the name that they share."""
    half = path.suffix.lower() in (".idx", ".bin")
    stem = path.with_suffix("") if half else path
    pair = [Path(f"{stem}.idx"), Path(f"{stem}.bin")]
    found = (half or not os.path.exists(path)) and all(map(os.path.isfile, pair))
    return pair if found else [path]


def _walk(
    root: Path, wanted: Callable[[Path], bool], skip: Collection[str] = frozenset()
) -> list[TextFile]:
    """Files below a folder. Linked folders are followed when all that lies here is known, and none
    is read twice: where links make a circle, or lead up to a folder that holds this one, they are
    counted as skipped."""
    files: list[TextFile] = []
    above = {_identity(path) for path in root.resolve().parents}
    seen: set[tuple[int, int]] = set()
    folders, linked = deque([root]), deque[Path]()
    while folders or linked:
        followed = not folders
        folder = linked.popleft() if followed else folders.popleft()

        def leave_out(path: Path, reason: str) -> None:
            files.append(TextFile(path, path.relative_to(root).as_posix(), False, reason))

        try:
            identity = _identity(folder)
            if followed and identity in above | seen:
                leave_out(folder, "a link to a folder that is read already")
                continue
            seen.add(identity)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            if folder == root:
                raise UsageError(f"data: {root} is unreadable; {REMEDY}") from None
            leave_out(folder, "unreadable")
            continue
        for entry in entries:
            path = Path(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if entry.name not in skip:
                    (linked if entry.is_symlink() else folders).append(path)
            elif wanted(path):
                files.append(TextFile(path, path.relative_to(root).as_posix(), False))
    return sorted(files, key=lambda file: file.name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reading it as a file says so
        return False


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def fingerprint(files: list[TextFile]) -> str:
    """A hash over names and contents: equal text gives the same tokens, whatever the clock says."""
    digest = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        try:
            with open_file(file) as handle:
                content = hashlib.file_digest(handle, "sha256")
        except (Unfit, OSError) as error:
            refuse_if_named(file, error if isinstance(error, Unfit) else unreadable(error))
        digest.update(os.fsencode(file.name) + b"\0%d" % file.named + content.digest())
    return digest.hexdigest()


def check_named(source: str | Sequence[str]) -> None:
    """UsageError where a named file is none that can be read, before anything else is."""
    for file in list_files(source):
        if file.named and not is_packed(file.path):
            try:
                open_file(file).close()
            except Unfit as fault:
                refuse_if_named(file, fault)


def refuse_if_named(file: TextFile, fault: Unfit) -> None:
    if file.named:
        where = f"data: {file.path} is {fault.reason}{fault.detail}"
        raise UsageError(f"{where}; {REMEDY}") from None


def unreadable(error: OSError) -> Unfit:
    return Unfit("unreadable", f" ({error.strerror})")


def open_file(file: TextFile) -> BufferedIOBase:
    """The file, to be read; Unfit where that is not possible."""
    if file.fault:
        raise Unfit(file.fault)
    try:
        if file.path.exists() and not file.path.is_file():  # reading a pipe would hang
            raise Unfit("not a regular file")
        return _unpacked(file.path) if is_packed(file.path) else open(file.path, "rb")
    except FileNotFoundError:
        raise Unfit("missing") from None
    except OSError as error:
        raise unreadable(error) from None
    except ValueError as error:  # a zero byte in the name
        raise Unfit("no file", f" ({error})") from None


def _unpacked(path: Path) -> BufferedIOBase:
    """What a compressed file or a table holds, nameless: documents are read in any order."""
    unpack = {".gz": _gunzip, ".zst": _unzstd}.get(path.suffix.lower(), _rows_of_table)
    out = tempfile.TemporaryFile()  # noqa: SIM115, whoever reads it closes it
    try:
        unpack(path, out)
    except BaseException:
        out.close()
        raise
    out.seek(0)
    return out


def _gunzip(path: Path, out: BinaryIO) -> None:
    try:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, out, 1 << 20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Unfit("damaged", f" ({error})") from None


def _unzstd(path: Path, out: BinaryIO) -> None:
    zstandard = _library("zstandard", path)
    # Frame by frame: the library's own reader takes a file that is cut short for a whole one.
    whole, one = True, zstandard.ZstdDecompressor().decompressobj()
    try:
        with open(path, "rb") as packed:
            data = packed.read(1 << 20)
            while data:
                out.write(one.decompress(data))
                whole, data = one.eof, one.unused_data if one.eof else b""
                if one.eof:
                    one = zstandard.ZstdDecompressor().decompressobj()
                data = data or packed.read(1 << 20)
    except zstandard.ZstdError as error:
        raise Unfit("damaged", f" ({error})") from None
    if not whole:
        raise Unfit("damaged", " (it is cut short)")


def _rows_of_table(path: Path, out: BinaryIO) -> None:
    """The columns of text, a row a line. An .arrow file is a stream or a file of Arrow's IPC, as
    `datasets` and pandas write them."""
    pa = _library("pyarrow", path)
    parquet = _library("pyarrow.parquet", path)
    try:
        with contextlib.ExitStack() as stack:
            if path.suffix.lower() == ".parquet":
                table = stack.enter_context(parquet.ParquetFile(path))
                batches = table.iter_batches()
            else:
                mapped = stack.enter_context(pa.memory_map(str(path)))
                try:
                    batches = pa.ipc.open_stream(mapped)
                except pa.ArrowInvalid:
                    mapped.seek(0)
                    file = pa.ipc.open_file(mapped)
                    batches = map(file.get_batch, range(file.num_record_batches))
            for batch in batches:
                text = [
                    f.name
                    for f in batch.schema
                    if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
                ]
                for row in batch.select(text).to_pylist():
                    out.write(jsonio.dumps(row).encode() + b"\n")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise Unfit("damaged", f" ({str(error).splitlines()[0]})") from None


def _library(name: str, path: Path) -> Any:
    """A package of an extra, imported where a file needs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UsageError(
            f"data: {path} needs a package that is not here: pip install {package}"
        ) from None
