"""Rung 15: the exchange through memory that devices share, with the ranks on one card: all but the
link between cards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ladder.diagnose import same
from ladder.kit import Kit, rung
from ladder.product_rungs import BF16, normal
from moekernels import reference
from moekernels.ops import exchange as kernels
from python_tests.support.devices import emulated_devices

PEERS, EXPERTS, TOP_K = 3, 2, 2
PATIENCE = 2_000_000_000  # nanoseconds on a card


class _Streams:
    """A rank is a stream of the one card, as a device is in the emulator."""

    def __init__(self) -> None:
        self.streams = [torch.cuda.Stream() for _ in range(PEERS)]

    def on(self, rank: int) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self.streams[rank])

    def run(self) -> None:
        torch.cuda.synchronize()


@contextlib.contextmanager
def _ranks(kit: Kit, slabs: list[Tensor]) -> Iterator:
    if kit.hardware:
        torch.cuda.synchronize()
        yield _Streams()
        return
    with emulated_devices(**kit.how) as devices:
        for slab in slabs:
            devices.emulator.know(slab, lasts=True)
        try:
            yield devices
        finally:
            for slab in slabs:
                del devices.emulator.lasting[slab.data_ptr()]


def _slabs(kit: Kit, shape: kernels.Shape) -> list[kernels.Slabs]:
    size = kernels.bytes_of(shape)
    room = [torch.zeros(size + 128, dtype=torch.uint8, device=kit.device) for _ in range(PEERS)]
    memory = [r[(first := -r.data_ptr() % 128) : first + size] for r in room]
    addresses = [m.data_ptr() for m in memory]
    patience = PATIENCE if kit.hardware else 0
    return [kernels.Slabs(m, addresses, p, shape, patience) for p, m in enumerate(memory)]


@rung(15, "simt", look="csrc/cuda/exchange.cu, common/flags.cuh; streams that do not run together")
def exchange(kit: Kit) -> dict:
    """Rows out and home between ranks of one card, twice over one slot, to the bit."""
    tokens, hidden = (4096, 2048) if kit.hardware else (5, 16)
    x = [normal(BF16, tokens + p, hidden, seed=p) for p in range(PEERS)]
    every = PEERS * EXPERTS
    draw = torch.Generator().manual_seed(1)
    ids = [torch.rand(len(v), every, generator=draw).argsort(1)[:, :TOP_K].int() for v in x]
    routings = [reference.route(i, every) for i in ids]
    counts = [r.counts.view(PEERS, EXPERTS) for r in routings]
    messages = [reference.pack(v, None, r.slot_of, TOP_K) for v, r in zip(x, routings)]
    wanted = reference.exchange(messages, counts, hidden)
    most = max(len(rows) for rows, _, _ in wanted)
    back = max(i.numel() for i in ids)
    slabs = _slabs(kit, kernels.Shape(PEERS, EXPERTS, 1, most, back, 2 * hidden))
    placed = [
        kit.place({"x": v, "slot_of": r.slot_of, "counts": r.counts}) for v, r in zip(x, routings)
    ]
    put = kit.wrong("put", kernels.put)
    seconds = 0.0
    with _ranks(kit, [s.slab for s in slabs]) as devices:
        for _ in range(2):
            came, home = [], []
            began = time.perf_counter()
            for p, given in enumerate(placed):
                with devices.on(p):
                    known = kernels.gather_counts(given["counts"], slabs[p])
                    put(given["x"], None, given["slot_of"], TOP_K, known, slabs[p], 0)
                    like, rows = given["x"], len(wanted[p][0])
                    taken = kernels.take(like, known, slabs[p], 0, rows, weighted=False)[0]
                    kernels.push(taken, None, known, slabs[p], 0)
                    size = ids[p].numel()
                    returned = kernels.take_home(like, known, slabs[p], 0, size, weighted=False)
                    came.append(taken)
                    home.append(returned[0])
            devices.run()
            seconds = time.perf_counter() - began
            for p in range(PEERS):
                same(f"rows that came to rank {p}", came[p], wanted[p][0])
                same(f"rows that came home to rank {p}", home[p], messages[p])
    moved = 4 * sum(t.numel() * 2 for t in came)  # read and written, out and home
    return {"ranks": PEERS, "gigabytes_a_second_with_launches": moved / seconds / 1e9}
