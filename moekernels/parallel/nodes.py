"""Which ranks share a machine: asked once, of the ranks themselves."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Nodes:
    """`of[rank]`: the number of the node that a rank runs on, counted as ranks first name them."""

    of: tuple[int, ...]

    @staticmethod
    def named(names: Iterable[object]) -> Nodes:
        numbers: dict[object, int] = {}
        return Nodes(tuple(numbers.setdefault(name, len(numbers)) for name in names))

    @property
    def count(self) -> int:
        return max(self.of) + 1

    def together(self, ranks: Iterable[int]) -> bool:
        """Whether all of them run on one node."""
        return len({self.of[rank] for rank in ranks}) == 1

    def split(self, ranks: Iterable[int]) -> list[tuple[int, ...]]:
        """The ranks of each node, in the order in which the nodes come up among them."""
        found: dict[int, list[int]] = {}
        for rank in ranks:
            found.setdefault(self.of[rank], []).append(rank)
        return [tuple(mates) for mates in found.values()]

    def order(self) -> tuple[int, ...]:
        """All ranks, those of a node one after the other, however a launcher dealt them."""
        return tuple(sorted(range(len(self.of)), key=lambda rank: (self.of[rank], rank)))

    def mates(self, rank: int) -> list[int]:
        """The ranks of a rank's node, itself included."""
        return [r for r, node in enumerate(self.of) if node == self.of[rank]]


def node_name() -> str:
    """What processes must have in common to open one another's memory: machine, boot, and the
    names by which they know each other's process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    booted = boot.read_text(encoding="ascii").strip() if boot.exists() else ""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return f"{socket.gethostname()} {booted} {processes}"


def gather(value: T, world: int, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order; all ranks of the run, or of a group, call it together."""
    if world == 1:
        return [value]
    values = [value] * world
    dist.all_gather_object(values, value, group=group)
    return values


def cores() -> int:
    """That the processes of this machine may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
