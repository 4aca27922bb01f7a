"""Virtual ranks of an exchange, for the emulator: slabs, what they hold, and what is to come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import exchange
from python_tests.support.devices import Devices, emulated_devices
from python_tests.support.spec import randn, random_ids, wide

MODES = [{}, {"lazy": True}, {"schedule": 1}, {"schedule": 2, "lazy": True}]
HIDDEN = 12


def all_ids(name: str, peers: int, experts: int) -> list[Tensor]:
    """ids [T, K] of each rank, over peers * experts; T differs from rank to rank."""
    every, top_k = peers * experts, 2
    tokens = [4 + p for p in range(peers)]
    ids = [random_ids(t, every, top_k, seed=p) for p, t in enumerate(tokens)]
    match name:
        case "many":  # more than come home in one block
            ids = [random_ids(36 + t, every, top_k, seed=t) for t in tokens]
        case "uneven":  # the same, at one rank alone
            ids = [random_ids(1 + 32 * (p == 0), every, top_k, seed=p) for p in range(peers)]
        case "one_rank":  # all to the experts of rank 1
            ids = [experts + random_ids(t, experts, top_k, seed=t) for t in tokens]
        case "one_expert":
            ids = [torch.full((t, 1), every - 1, dtype=torch.int32) for t in tokens]
        case "nothing":
            ids = [torch.full_like(i, -1) for i in ids]
        case "no_tokens":
            ids = [i[:0] for i in ids]
        case "one_token":
            ids = [i[: int(p == peers - 1)] for p, i in enumerate(ids)]
        case "k_is_e":
            ids = [random_ids(2 + p % 3, every, every, seed=p) for p in range(peers)]
        case "dropped":
            for p, i in enumerate(ids):
                i[p::3, 0] = -1
                i[1::4, 1] = every
            ids[0] = ids[0][:0]
    return ids


ROUTINGS = ("ordinary", "one_rank", "one_expert", "nothing", "no_tokens", "one_token", "k_is_e")
ROUTINGS = (*ROUTINGS, "dropped")


class Ranks:
    """Virtual ranks with a slab each, and what they hold."""

    def __init__(
        self,
        ids: list[Tensor],
        experts: int,
        dtype: torch.dtype,
        hidden: int = HIDDEN,
        **room: int,
    ) -> None:
        self.peers, self.experts, self.dtype = len(ids), experts, dtype
        self.ids, every, self.hidden = ids, self.peers * experts, hidden
        self.routings = [reference.route(i, every) for i in ids]
        self.x = [randn(dtype, len(i), hidden, seed=p) for p, i in enumerate(ids)]
        self.weights = [randn(wide(dtype), *i.shape, seed=9 + p) for p, i in enumerate(ids)]
        self.counts = [r.counts for r in self.routings]
        rows = sum(int(c.sum()) for c in self.counts)
        sizes = {"slots": 1, "rows": rows, "back": max(i.numel() for i in ids)} | room
        self.shape = exchange.Shape(self.peers, experts, **sizes, row_bytes=hidden * dtype.itemsize)
        self.memory = [aligned(exchange.bytes_of(self.shape)) for _ in ids]
        addresses = [m.data_ptr() for m in self.memory]
        self.slabs = [
            exchange.Slabs(m, addresses, p, self.shape) for p, m in enumerate(self.memory)
        ]
        self.sent = [[x + n for x in self.x] for n in range(3)]
        self.known: list = [None] * self.peers

    @contextmanager
    def devices(self, **how) -> Iterator[Devices]:
        with emulated_devices(**how) as devices:
            for memory in self.memory:
                devices.emulator.know(memory, lasts=True)
            try:
                yield devices
            finally:
                for memory in self.memory:
                    del devices.emulator.lasting[memory.data_ptr()]

    def gather(self, devices: Devices) -> None:
        for p in range(self.peers):
            with devices.on(p):
                self.known[p] = exchange.gather_counts(self.counts[p], self.slabs[p])

    def put(self, p: int, x: Tensor, weights: Tensor | None, slot: int = 0) -> None:
        slot_of, top_k = self.routings[p].slot_of, max(self.ids[p].shape[1], 1)
        exchange.put(x, weights, slot_of, top_k, self.known[p], self.slabs[p], slot)

    def take(self, p: int, rows: int, weighted: bool = True, slot: int = 0):
        like = self.x[p]
        return exchange.take(like, self.known[p], self.slabs[p], slot, rows, weighted=weighted)

    def expected(self, weighted: bool = True) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        every = zip(self.x, self.weights, self.routings)
        messages = [
            reference.pack(x, w if weighted else None, r.slot_of, max(w.shape[1], 1))
            for x, w, r in every
        ]
        return reference.exchange(
            messages, [c.view(self.peers, -1) for c in self.counts], self.hidden
        )


def aligned(nbytes: int) -> Tensor:
    memory = torch.zeros(nbytes + 128, dtype=torch.uint8)
    return memory[(first := -memory.data_ptr() % 128) : first + nbytes]


class SlabsOfDevices:
    """Slabs for all ranks, made when the first asks for one; `made` is how many rounds there
    were."""

    def __init__(self, emulator, peers: int) -> None:
        self.emulator, self.made, self.asked = emulator, [], [0] * peers

    def __enter__(self) -> SlabsOfDevices:
        return self

    def __exit__(self, *_) -> None:
        for memory in (memory for mine in self.made for memory in mine):
            del self.emulator.lasting[memory.data_ptr()]

    def of(self, rank: int) -> SlabsOfRank:
        return SlabsOfRank(self, rank)


class SlabsOfRank:
    def __init__(self, slabs: SlabsOfDevices, rank: int) -> None:
        self.slabs, self.rank = slabs, rank

    def allocate(self, nbytes: int) -> tuple[Tensor, list[int]]:
        slabs, number = self.slabs, self.slabs.asked[self.rank]
        slabs.asked[self.rank] += 1
        if number == len(slabs.made):
            slabs.made.append([aligned(nbytes) for _ in slabs.asked])
            for memory in slabs.made[-1]:
                slabs.emulator.know(memory, lasts=True)
        mine = slabs.made[number]
        assert mine[self.rank].numel() == nbytes  # all ranks ask for the same
        return mine[self.rank], [memory.data_ptr() for memory in mine]


def arrived(ranks: Ranks, p: int, rows: int) -> list[Tensor]:
    with_weights = ranks.take(p, rows)
    return [*with_weights, ranks.known[p].offsets]


def same(found, expected) -> None:
    """Of two lists of tensors, bit for bit; rows of `found` behind the last are zero."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine[: len(theirs)], theirs)
        assert not mine[len(theirs) :].any()
