"""What started this process as one of several: torchrun, or a scheduler that sets RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. Before torch.distributed is up, they talk through its store.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from moekernels import jsonio
from moekernels.errors import PlaceError

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=10)  # of collectives, and of waiting for one another
OTHERWISE = "start the ranks with torchrun, or unset RANK and WORLD_SIZE to have them started here"


@dataclass(frozen=True)
class Launched:
    """This process among its peers.

    `attempt` counts torchrun's restarts. `store` is this attempt's own: torchrun's still holds the
    keys of the one before, which a new group would take for its peers'.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    attempt: int
    store: dist.Store
    all_attempts: dist.Store

    def tell(self, key: str, value: T) -> T:
        """Rank 0's value (JSON), on every rank."""
        if self.rank == 0:
            self.store.set(f"tell/{key}", jsonio.dumps(value))
            return value
        return json.loads(self.store.get(f"tell/{key}"))

    def first(self, key: str, text: str | None) -> str | None:
        """Of the lowest rank that has a text, on every rank; None where none has one."""
        self.store.set(f"first/{key}/{self.rank}", text or "")
        if self.rank == 0:
            said = (self.store.get(f"first/{key}/{rank}").decode() for rank in range(self.size))
            text = next((text for text in list(said) if text), None)
        return self.tell(f"first/{key}", text)

    def folder(self, choose: Callable[[], Path]) -> Path:
        """Where the run writes: rank 0's choice, kept over restarts."""
        chosen = ""
        if self.rank == 0:
            if not self.all_attempts.check(["folder"]):
                self.all_attempts.set("folder", str(choose()))
            chosen = self.all_attempts.get("folder").decode()
        return Path(self.tell("folder", chosen))


def wanted() -> bool:
    """Whether a launcher started this process as one of its ranks; nobody is met."""
    return bool(os.environ.get("RANK") or os.environ.get("WORLD_SIZE"))


def launched() -> Launched | None:
    """None where this process was started by hand. PlaceError where half of what a launcher sets
    is missing or cannot be true."""
    rank, size = _number("RANK"), _number("WORLD_SIZE", least=1)
    if rank is None and size is None:
        return None
    if rank is None or size is None:
        there, missing = ("WORLD_SIZE", "RANK") if rank is None else ("RANK", "WORLD_SIZE")
        raise PlaceError(f"{there} is set and {missing} is not; {OTHERWISE}")
    if rank >= size:
        raise PlaceError(f"RANK {rank} is not below WORLD_SIZE {size}; {OTHERWISE}")
    address, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT")
    for name, given in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if not given:
            raise PlaceError(
                f"RANK and WORLD_SIZE are set and {name}, where rank 0 is met, is not; {OTHERWISE}"
            )
    local_rank, local_size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", least=1)
    attempt = _number("TORCHELASTIC_RESTART_COUNT") or 0
    try:
        base, _, _ = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    except (OSError, RuntimeError, ValueError) as error:
        raise PlaceError(
            f"rank 0 cannot be met at MASTER_ADDR {address}, MASTER_PORT {port}: {error}"
        ) from error
    store = dist.PrefixStore(f"moekernels/attempt-{attempt}", base)
    if local_rank is None or local_size is None:
        store.set(f"host/{rank}", _host())
        hosts = [store.get(f"host/{r}").decode() for r in range(size)]
        local_rank = hosts[:rank].count(hosts[rank]) if local_rank is None else local_rank
        local_size = hosts.count(hosts[rank])
        os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(local_rank), str(local_size)
    everything = dist.PrefixStore("moekernels", base)
    return Launched(rank, size, local_rank, local_size, attempt, store, everything)


def _number(name: str, least: int = 0) -> int | None:
    """An environment variable; None where it is not set."""
    text = os.environ.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise PlaceError(
            f"{name} must be a whole number of at least {least}, got {text!r}; {OTHERWISE}"
        )
    return int(text)


def _host() -> str:
    """What shares cards: a machine, or a container of one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text(encoding='ascii') if boot.exists() else ''}"
