"""What the contract test knows of exchange: all of it in a group of one rank, whose slab is its own
alone. More ranks are threads in `parallel/test_device_exchange.py`, and virtual devices in
`cuda/test_exchange_emulated.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops import exchange as kernels
from python_tests.support.spec import Case, OpSpec, ids_cases, randn, register, wide

SLOTS, PATIENCE = 2, 20_000_000_000  # nanoseconds


def exchange(
    x: Tensor, weights: Tensor | None, slot_of: Tensor, top_k: int, counts: Tensor, room: int
) -> list[Tensor | None]:
    """x [T, H], weights [T, K] out and, as they came, home again: rows and weights [room], offsets
    [e+1], the most rows that came, and [R] home. Slot by slot, in a slab that is made for it."""
    x, weights = x.contiguous(), None if weights is None else weights.contiguous()
    rows, experts = slot_of.shape[0], counts.shape[0]
    shape = kernels.Shape(1, experts, SLOTS, room, rows, x.shape[1] * x.element_size())
    slab = torch.zeros(kernels.bytes_of(shape), dtype=torch.uint8, device=x.device)
    slabs = kernels.Slabs(slab, [0], 0, shape, PATIENCE)
    most = torch.zeros(1, dtype=torch.int64, device=x.device)
    known = kernels.gather_counts(counts, slabs, room, most)
    weighted = weights is not None
    for slot in (0, 1, 0):  # the last is what stays: of a slot that was used before
        kernels.put(x, weights, slot_of, max(top_k, 1), known, slabs, slot)
        come = kernels.take(x[:0], known, slabs, slot, room, weighted=weighted)
        kernels.push(*come, known, slabs, slot)
        home = kernels.take_home(x[:0], known, slabs, slot, rows, weighted=weighted)
    return [*come, known.held, known.came, most, *home]


def _plain(
    x: Tensor, weights: Tensor | None, slot_of: Tensor, top_k: int, counts: Tensor, room: int
) -> list[Tensor | None]:
    used = int(counts.sum())
    slots = slot_of[:used].long()
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))

    def cut(values: Tensor, size: int) -> Tensor:
        """The rows that there was room for, and zeros up to `size`."""
        out = values.new_zeros(size, *values.shape[1:])
        out[: min(used, room)] = values[:room]
        return out

    sent = [x[slots // max(top_k, 1)], None if weights is None else weights.flatten()[slots]]
    come, home = (
        [None if s is None else cut(s, size) for s in sent] for size in (room, len(slot_of))
    )
    return [*come, offsets.clamp(max=room), counts[None], counts.sum()[None], *home]


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, ids, experts in ids_cases():
        routing = reference.route(ids, experts)
        weights = randn(wide(dtype), *ids.shape, seed=1)
        rows = len(routing.slot_of)
        inputs = {
            "x": randn(dtype, ids.shape[0], 7),
            "weights": weights,
            "slot_of": routing.slot_of,
            "top_k": ids.shape[1],
            "counts": routing.counts,
            "room": rows + 3,
        }
        yield Case(name, inputs, again=not routing.counts.any())
        if name in ("ordinary", "dropped_ids"):
            yield Case(f"{name}-no_weights", {**inputs, "weights": None}, again=False)
            yield Case(f"{name}-bounded", {**inputs, "room": rows // 3}, again=False)


def _messages():
    shape = kernels.Shape(1, 2, 1, 4, 4, 16)
    slab, counts = torch.zeros(kernels.bytes_of(shape), dtype=torch.uint8), torch.zeros(2).long()
    slabs = kernels.Slabs(slab, [0], 0, shape)
    runs, x = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 4)
    known = kernels.Counts(*[counts] * 3, runs, runs, counts)
    yield (
        lambda: kernels.bytes_of(shape._replace(peers=17)),
        "exchange_bytes: peers must be 1 to 16, got 17",
    )
    yield (
        lambda: kernels.gather_counts(counts[:1], slabs),
        "exchange_counts: counts must be int64 [P*e=2], got int64 [1]",
    )
    yield (
        lambda: kernels.gather_counts(counts, slabs, room=-1),
        "exchange_counts: room must not be negative, got -1",
    )
    yield (
        lambda: kernels.gather_counts(counts, slabs._replace(slab=slab[1:])),
        f"exchange_counts: slab must be uint8 [bytes={len(slab)}], got uint8 [{len(slab) - 1}]",
    )
    yield (
        lambda: kernels.gather_counts(counts, slabs._replace(addresses=[1 << 20])),
        "exchange_counts: addresses[0] must be the slab's own address, or 0",
    )
    yield (
        lambda: kernels.put(x, None, counts.int(), 1, known, slabs, 3),
        "exchange_send: slot must be 0 to 0, got 3",
    )
    yield (
        lambda: kernels.put(x.repeat(1, 2), None, counts.int(), 1, known, slabs, 0),
        "exchange_send: rows of 32 bytes are wider than the slab's 16",
    )
    yield (
        lambda: kernels.take(x, known._replace(offsets=runs[0]), slabs, 0, -1, weighted=False),
        "exchange_receive: num_rows must not be negative, got -1",
    )


register(
    OpSpec(
        name="exchange",
        fn=exchange,
        reference=_plain,
        cases=_cases,
        sized=lambda tokens: {},
        exact=True,
        messages=_messages,
        private=True,
    )
)
