"""exchange: rows put straight into memory that ranks share, at their place by expert, and results
pushed home. `parallel/device_memory.py` calls it; what it does to memory of other ranks no op of
one's own could say, so nothing here is public.

Every rank has a slab of `bytes_of(shape)` zeros that all of the group address. All call in the same
order, each on one stream:

    counts = gather_counts(own rows for each expert)        # what everybody sends everybody
    put(x, weights, slot_of, ...)                           # own rows to the slots of their experts
    rows, weights = take(...)                               # waits for what comes, by expert
    push(rows, weights, ...)                                # results to their owners
    rows, weights = take_home(...)                          # waits for them, in own routing's order

An exchange goes through a slot, one after another through different ones; a sender waits until its
peer has taken what the slot held before. What is awaited lies in the slab, not in arguments: a
recorded launch (a CUDA graph) can be repeated. Where sizes are bounds nothing needs to be read back
from the device: rows beyond them are neither written nor read, zeros come home for them, and
`needed` says how many there would have been.

Legend: T tokens, H hidden, K top-k, P peers, e local experts, R own rows, R' rows that come.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekernels.ops._library import fake, raw
from moekernels.ops._op import wide

__all__: list[str] = []

_bytes = raw._exchange_bytes.default
_word = raw._exchange_word.default
_counts = raw._exchange_counts.default
_send = raw._exchange_send.default
_receive = raw._exchange_receive.default


ENDLESS = 2**63 - 1


class Shape(NamedTuple):
    """Of every slab of a group."""

    peers: int  # at most 16
    experts: int  # e
    slots: int
    rows: int  # that a slot takes in
    back: int  # own rows that come home to a slot: T*K
    row_bytes: int  # of the widest row


class Slabs(NamedTuple):
    """The slabs of a group as one rank sees them."""

    slab: Tensor  # [bytes] uint8, this rank's
    addresses: list[int]  # of all, multiples of 16; this rank's own may be 0
    rank: int
    shape: Shape
    patience: int = 0  # nanoseconds after which a wait gives up, 0: never
    stuck: Tensor | None = None  # int64 [4]: rank, byte of the slab, value, wanted of that wait
    record: tuple[int, ...] = ()  # of the stamps of an exchange, at every rank; (): none are made

    def arguments(self) -> tuple[Tensor, list[int], int, list[int], int, Tensor | None, list[int]]:
        return (*self[:3], list(self.shape), *self[4:6], list(self.record))


class Counts(NamedTuple):
    """What everybody sends, as far as this rank needs it.

    came [P, e]: rows from each peer for each local expert; offsets [e+1]: where each local expert's
    begin, held [e+1]: the same of the rows that there is room for; out, back [P*e+1, 2]: runs of
    own rows and of those that came, and their places; needed [2]: the most rows that come to any
    rank, and that any rank sends. All int64.
    """

    came: Tensor
    offsets: Tensor
    held: Tensor
    out: Tensor
    back: Tensor
    needed: Tensor


@fake("_exchange_counts")
def _(counts, slab, addresses, rank, shape, patience, stuck, record, room, most):
    peers, experts = shape[:2]
    runs = (peers * experts + 1, 2)
    sizes = ((peers, experts), (experts + 1,), (experts + 1,), runs, runs, (2,))
    return tuple(counts.new_empty(size, dtype=torch.int64) for size in sizes)


@fake("_exchange_send")
def _(
    rows,
    weights,
    slot_of,
    top_k,
    runs,
    slab,
    addresses,
    rank,
    shape,
    patience,
    stuck,
    record,
    slot,
    back,
):
    return None


@fake("_exchange_receive")
def _(
    like,
    offsets,
    slab,
    addresses,
    rank,
    shape,
    patience,
    stuck,
    record,
    slot,
    back,
    num_rows,
    weighted,
    units=1,
):
    weights = like.new_empty(num_rows if weighted else 0, dtype=wide(like.dtype))
    return like.new_empty(num_rows, like.shape[1]), weights


def bytes_of(shape: Shape) -> int:
    """Of a slab; it must be zero when the first rank calls."""
    return _bytes(list(shape))


def describe_wait(slabs: Slabs) -> str:
    """Of a wait that gave up and has left its mark in `stuck`: who waits for what."""
    if slabs.stuck is None:
        return ""
    rank, at, value, wanted = slabs.stuck.tolist()
    if wanted == value:
        return ""
    kind, slot, index = _word(list(slabs.shape), at)
    what = (
        f"the counts of peer {index}",
        f"rows of its expert {index}, in slot {slot}",
        f"its results from row {index} on, in slot {slot}",
        f"peer {index} to take the rows that it has in slot {slot}",
        f"peer {index} to take the results that it has in slot {slot}",
    )[kind]
    return f"rank {rank} of the exchange waits for {what}: the counter is {value}, not {wanted}"


def gather_counts(
    counts: Tensor, slabs: Slabs, room: int = ENDLESS, most: Tensor | None = None
) -> Counts:
    """counts [P*e] int64: own rows for each expert of all. Waits for those of all ranks.

    `room`: rows that will be taken at most. `most` [1] int64 grows to `needed[0]`.
    """
    return Counts(*_counts(counts, *slabs.arguments(), room, most))


def put(
    x: Tensor,
    weights: Tensor | None,
    slot_of: Tensor,
    top_k: int,
    counts: Counts,
    slabs: Slabs,
    slot: int,
) -> None:
    """Own rows x[slot_of[r] // K] [T, H] and weights [T, K] to the slot of their experts' ranks;
    slot_of [R] int32 in expert order (`Routing.slot_of`), as `counts` has them."""
    _send(x, weights, slot_of, top_k, counts.out, *slabs.arguments(), slot, False)


def take(
    like: Tensor, counts: Counts, slabs: Slabs, slot: int, num_rows: int, *, weighted: bool
) -> tuple[Tensor, Tensor | None]:
    """Waits for what comes: rows [num_rows, H] by local expert, then by peer, zero behind the last,
    in the dtype and width of `like` [*, H]; weights [num_rows] or None."""
    rows, weights = _receive(
        like, counts.offsets, *slabs.arguments(), slot, False, num_rows, weighted
    )
    return rows, weights if weighted else None


def push(rows: Tensor, weights: Tensor | None, counts: Counts, slabs: Slabs, slot: int) -> None:
    """rows [R', H] and weights [R'], as `take` gave them, to whom they came from."""
    _send(rows, weights, None, 1, counts.back, *slabs.arguments(), slot, True)


def take_home(
    like: Tensor,
    counts: Counts,
    slabs: Slabs,
    slot: int,
    num_rows: int,
    *,
    weighted: bool,
    units: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Waits for what `push` brings: rows [num_rows, H] in the order of the own routing. `units`:
    how often a row is counted by who sends it, once by `push`."""
    rows, weights = _receive(
        like, counts.out, *slabs.arguments(), slot, True, num_rows, weighted, units
    )
    return rows, weights if weighted else None
