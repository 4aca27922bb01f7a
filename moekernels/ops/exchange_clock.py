"""exchange_clock: what the clocks of ranks that exchange rows differ by, found by asking each other
the time over memory that they share. `parallel/device_stamps.py` calls it; what it does to memory
of other ranks no op of one's own could say, so nothing here is public.

Legend: P peers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels.ops._library import fake, raw

__all__: list[str] = []

_bytes = raw._exchange_clock_bytes.default
_record_words = raw._exchange_record_words.default
_clock = raw._exchange_clock.default


@fake("_exchange_clock")
def _(words, addresses, rank, patience, stuck):
    return words.new_empty(len(addresses) + 1, dtype=torch.int64)


def bytes_of(peers: int) -> int:
    """Of the words that each rank has for it; they must be zero when the first rank calls."""
    return _bytes(peers)


def record_words(peers: int) -> int:
    """How many numbers of 64 bits the stamps of an exchange are (`exchange.Slabs.record`)."""
    return _record_words(peers)


def read_clocks(
    words: Tensor, addresses: list[int], rank: int, patience: int, stuck: Tensor | None
) -> Tensor:
    """[P+1] int64, nanoseconds: by how much each peer's clock is ahead of this rank's, then the
    time here. Waits for all ranks, so that what each did before is done; `patience` and `stuck` are
    those of `exchange.Slabs`.

    The quickest of a few answers counts: what is found is wrong by half of what it took, at most.
    """
    return _clock(words, addresses, rank, patience, stuck)
