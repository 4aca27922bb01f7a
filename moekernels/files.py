"""Files that a user names: where they may lie, and how they are written."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

PIPE_SECONDS = 2.0  # how long a pipe may wait for its other end
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file whole or not at all; text as UTF-8.

    A regular file is replaced by renaming, the target of a link too (the link stays). What is no
    regular file (a device, a pipe, the program's own output) is written to. OSError, its filename
    and its `size` (the bytes that it needs) set, where neither can be.
    """
    path = Path(path)
    data = _utf8(content) if isinstance(content, str) else content
    try:
        try:
            there = os.stat(path)
        except FileNotFoundError:
            there = None
        if there is not None and stat.S_ISDIR(there.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if there is not None and (number := _output(there)) is not None:
            (sys.stdout if number == 1 else sys.stderr).flush()
            _write_all(os.dup(number), data)
        elif there is not None and not stat.S_ISREG(there.st_mode):
            _write_all(_open_special(path, there), data)
        else:
            _replace(Path(os.path.realpath(path)), data, there)
    except OSError as error:
        error.filename = str(path)
        error.size = len(data)  # type: ignore[attr-defined]
        raise


def read(path: str | os.PathLike, most: int = 1 << 26) -> str:
    """The text of a file that a user names, UTF-8 with or without a mark. OSError or ValueError,
    also where it is larger than `most` bytes or a pipe that nobody writes to."""
    data = read_bytes(path, most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(
            f"it is not UTF-8 text (byte 0x{byte:02x} at offset {error.start})"
        ) from None


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """What a file holds; OSError or ValueError as `read` has them."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY), "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            ready, _, _ = select.select([file], [], [], PIPE_SECONDS)
            if not ready:
                raise ValueError("nobody writes to this pipe")
            os.set_blocking(file.fileno(), True)
        data = bytearray()
        while len(data) <= most and (block := file.read(1 << 20)):
            data += block
    if len(data) > most:
        raise ValueError(f"it is larger than {most} bytes")
    return bytes(data)


def said(error: Exception) -> str:
    """Why a file could not be read or written, without its name."""
    return getattr(error, "strerror", None) or str(error)


def no_room(
    path: Path, error: OSError, size: int | None = None, remedy: str = "give another --out"
) -> str:
    """The one line of a file that cannot be written: which, why, and where the disk is full how
    much is missing. `size`: the bytes that it needs, where `write` has not said it."""
    size = getattr(error, "size", size)
    text = f"{path}: cannot be written: {said(error)}"
    if error.errno in FULL:
        folder = next(p for p in path.absolute().parents if p.exists())
        needs = "" if size is None else f"it needs {size:,} bytes, "
        text += f"; {needs}{shutil.disk_usage(folder).free:,} are free"
        remedy = f"make room, or {remedy}"
    return f"{text}; {remedy}"


def lock_file(path: Path) -> IO[str]:
    """A file that is there to be locked, made where it is missing and never changed. OSError, also
    for a pipe."""

    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666)

    return open(path, "a", opener=without_waiting)


def cache_folder() -> Path:
    """Where results are kept between runs: $XDG_CACHE_HOME, ~/.cache, and where there is no home,
    or none that can be written, a private folder among the temporary ones."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "moekernels"
    with contextlib.suppress(RuntimeError):  # no HOME, and a user that nobody knows
        home = Path.home()
        if home != Path(home.anchor or ".") and _writable(home / ".cache"):
            return home / ".cache" / "moekernels"
    private = Path(tempfile.gettempdir()) / f"moekernels-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid():
        raise PermissionError(errno.EACCES, "another user's", str(private))
    return private


def native(text: str) -> str:
    """A path that was written down as UTF-8, as this process's file system calls take it: under
    another locale they do not count in UTF-8."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def portable(text: str) -> str:
    """The other way: a path of this process, to be written down. ValueError: it is no UTF-8."""
    return os.fsencode(text).decode("utf-8")


def _utf8(text: str) -> bytes:
    """Always UTF-8, also where a path in it was read under a locale that does not count in that."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8").encode("utf-8")
    except UnicodeError:
        return text.encode("utf-8", "backslashreplace")


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def _output(there: os.stat_result) -> int | None:
    """1 or 2 where that is what the program's own output goes to."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            mine = os.fstat(number)
            if os.path.samestat(there, mine) and not stat.S_ISCHR(mine.st_mode):
                return number
    return None


def _open_special(path: Path, there: os.stat_result) -> int:
    if not stat.S_ISFIFO(there.st_mode):
        return os.open(path, os.O_WRONLY | os.O_NOCTTY)
    deadline = time.monotonic() + PIPE_SECONDS
    while True:
        try:
            number = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(number, True)
            return number
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                if error.errno == errno.ENXIO:
                    error.strerror = "nobody reads this pipe"
                raise
            time.sleep(0.02)


def _write_all(number: int, data: bytes) -> None:
    with open(number, "wb") as file:
        file.write(data)


def _replace(path: Path, data: bytes, there: os.stat_result | None) -> None:
    mask = os.umask(0)
    os.umask(mask)
    mode = 0o666 & ~mask if there is None else stat.S_IMODE(there.st_mode)
    number, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with open(number, "wb") as file:
            file.write(data)
            os.fchmod(number, mode)
            file.flush()
            os.fsync(number)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
