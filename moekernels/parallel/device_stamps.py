"""Stamps of exchanges that kernels make (`device_exchange.py`), on the clocks of their GPUs, and
read with a step's other numbers: nobody waits for them.

An exchange has a record at every rank (`Record` in csrc/include/moekernels/exchange.h). Kernels of
this rank write when rows were first asked for, how long readers waited and how long they copied;
peers write when they began to send and had given this rank its last row, by their own clocks. At
the end of a step the ranks ask each other the time, by which those become times of this rank's.

What a GPU's stamps mean beside those of a CPU (`measure.py`):

    post, last  a rank began to send, or had, where nothing ran beside that; where a product brought
                the rows, it had ended. Rows that fly under their own product's tiles are no
                flight, so nothing of that counts as hidden
    need, got   the first that asked, and that plus what readers waited for, a mean over the blocks
                of the product, or the warps of the kernel, that read: a card of which half waits
                for 10 us has waited for 5
    moving      of the whole card: sending beside a product takes the share of its multiprocessors
                that its blocks hold

Legend: P peers.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moekernels import _host
from moekernels.ops import exchange_clock as clocks
from moekernels.parallel.measure import Stamps

if TYPE_CHECKING:
    from moekernels.parallel.device_exchange import Memory

ROOM = 1024  # records of a chunk of memory
_END = 2**63 - 1  # of all time: first moments are kept as what is left until then
_EACH = 3  # words of a record for each peer, behind those of this rank:
_NEED, _WAITED, _READERS, _WAITED_TAKING, _TAKERS, _COPIED, _ROWS, _, _PEERS = range(9)


class _Posted(NamedTuple):
    """What the host knows of an exchange."""

    label: int
    row_bytes: int
    share: float  # of the card, that sending holds


class _Chunk(NamedTuple):
    words: Tensor  # [ROOM, words of a record] int64, this rank's
    addresses: list[int]  # of all ranks'
    here: Tensor  # the same, where the host reads it


class DeviceStamps:
    """Of one rank's exchanges; all ranks of the group post in the same order, and call `read` and
    `take` once a step, together."""

    def __init__(self, memory: Memory, rank: int, size: int, patience: int) -> None:
        self.memory, self.rank, self.size, self.patience = memory, rank, size, patience
        self.width = clocks.record_words(size)
        # Of two steps in turn: peers write into those of the next while these are read.
        self._chunks: tuple[list[_Chunk], list[_Chunk]] = ([], [])
        self._turn = 0
        self._posted: list[_Posted] = []
        self._read: list[_Posted] = []
        self._words, self._addresses = memory.allocate(clocks.bytes_of(size))
        on_gpu = self._words.is_cuda
        self._stuck = torch.zeros(4, dtype=torch.int64, pin_memory=on_gpu)
        self._ahead = torch.zeros(size + 1, dtype=torch.int64, pin_memory=on_gpu)
        self._done: torch.cuda.Event | None = None
        # What the machine's clock is ahead of the own at least, as it was asked before it answered.
        self._least: deque[int] = deque(maxlen=32)
        self._asked = 0

    def begin(self, label: int, row_bytes: int, share: float = 1.0) -> tuple[int, ...]:
        """The addresses of the next exchange's record at every rank, for its kernels."""
        number, chunks = len(self._posted), self._chunks[self._turn]
        if number == len(chunks) * ROOM:
            slab, addresses = self.memory.allocate(ROOM * self.width * 8)
            words = slab.view(torch.int64).view(ROOM, self.width)
            here = torch.empty(words.shape, dtype=torch.int64, pin_memory=slab.is_cuda)
            chunks.append(_Chunk(words, addresses, here))
        self._posted.append(_Posted(label, row_bytes, share))
        at = number % ROOM * self.width * 8
        return tuple(address + at for address in chunks[number // ROOM].addresses)

    def read(self) -> None:
        """Of what was posted since the last call: all ranks meet on the device, behind all that
        they did, and the stamps are on their way to the host, which does not wait."""
        if self._posted:
            self.copy(self.meet())

    def meet(self) -> Tensor:
        self._asked = _host.now()
        return clocks.read_clocks(
            self._words, self._addresses, self.rank, self.patience, self._stuck
        )

    def copy(self, ahead: Tensor) -> None:
        """`ahead` is what `meet` gave."""
        self._ahead.copy_(ahead, non_blocking=True)
        left = len(self._posted)
        for chunk in self._chunks[self._turn]:
            used = min(left, ROOM)
            chunk.here[:used].copy_(chunk.words[:used], non_blocking=True)
            chunk.words[:used].zero_()
            left -= used
        if self._words.is_cuda:
            self._done = torch.cuda.current_stream(self._words.device).record_event()
        self._read, self._posted = self._posted, []
        self._turn = 1 - self._turn

    def take(self) -> list[Stamps]:
        """What the last `read` sent for, on the clock of the machine. The host has read something
        else of the device since, or waits here."""
        read, self._read = self._read, []
        if not read:
            return []
        if self._done is not None:
            self._done.synchronize()
        *ahead, now = self._ahead.tolist()
        self._least.append(self._asked - now)
        shift = max(self._least)
        chunks = self._chunks[1 - self._turn]
        records = [row for chunk in chunks for row in chunk.here[: len(read)].tolist()]
        return [
            stamps_of(record, self.rank, ahead, posted, shift)
            for record, posted in zip(records, read)
        ]


def stamps_of(
    record: list[int], rank: int, ahead: list[int], posted: _Posted, shift: int = 0
) -> Stamps:
    """The record of one of P ranks, whose peers' clocks are `ahead` of its own; times are by that,
    and `shift` later."""
    peers = [record[at : at + 2] for at in range(_PEERS, len(record), _EACH)]
    began = [first - off for (first, _), off in zip(peers, ahead)]
    ended = [last - off if last else 0 for (_, last), off in zip(peers, ahead)]
    given = max(record[_PEERS + 2 :: _EACH])  # 0: a product gave the rows away
    post, last = began[rank], max(began)
    moving = int(max(0, given - post) * posted.share) + record[_COPIED]
    if posted.share == 1:  # nothing ran beside it
        post = max(post, given)
    readers, takers = max(record[_READERS], 1), max(record[_TAKERS], 1)
    waited = record[_WAITED] // readers + record[_WAITED_TAKING] // takers
    ready = max(post, last, *ended)
    need = _END - record[_NEED] if record[_NEED] else ready
    post, last, ready, need = (t + shift for t in (post, last, ready, need))
    size = record[_ROWS] * posted.row_bytes
    return Stamps(post, last, ready, need, need + waited, moving, size, posted.label)
