"""How ranks share the cores and the memory of their host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def share_cores() -> None:
    """Schedule this process as a batch job; call before its gloo groups are made, whose threads
    inherit it.

    gloo's event thread polls in a loop for a lock that a sending or receiving thread holds. Woken
    on that thread's core it preempts the holder and spins out its time slice: with more ranks than
    cores a message of 64 bytes took 3 to 7 ms where it takes 0.06. Linux does not let a batch job's
    wake-up preempt.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system, or not permitted
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def bound_primitives() -> None:
    """Have torch keep few of the kernels that oneDNN makes; call before the first product.

    For bf16 products on the CPU one is made for each number of rows, and torch and oneDNN keep
    1,024 of them each: 400 token counts grew a process by 2.9 GB, and by 13 MB with both at 16. A
    step uses about twelve a microbatch, the same in all layers, and 64 outlast it.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def available(root: Path = Path("/")) -> float:
    """Bytes of this machine that a process may still take, its control groups' limits included.
    `root` holds its proc and sys."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    found += [1024 * kilobytes for kilobytes in _numbers(root / "proc/meminfo", "MemAvailable:")]
    for folder, limit, used, cached in _control_groups(root):
        with contextlib.suppress(OSError, ValueError):  # no limit is the word max
            left = float((folder / limit).read_text(encoding="utf-8"))
            left -= float((folder / used).read_text(encoding="utf-8"))
            # Pages of files are given back when they are needed.
            found.append(left + sum(_numbers(folder / "memory.stat", cached)))
    return max(0.0, min(found))


_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _control_groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Where the limits of this process may be: its own group's folder and those around it, and the
    names in them of limit, what is used, and what of it are pages of files."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                yield folder, *(_VERSION_1 if controllers else _VERSION_2)
                if folder == mount:
                    break


def _numbers(file: Path, name: str) -> Iterator[float]:
    """Of the lines `name number ...`; none where there is no such file."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.split()[0] == name:
                yield float(line.split()[1])
